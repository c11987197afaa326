"""``rlproxi serve``: a trained model behind HTTP, by Ray Serve.

The ``Frontend`` checks requests and limits how many are under way. The ``Painter`` replicas draw them in batches.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import socket
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rlproxi.config.sections import Sampler, Schedule
from rlproxi.errors import last_error_line

from .image_request import Limits, Refused, parse

DEFAULT_LIMITS = Limits()
#: How long a client may take to send its request.
READ_SECONDS = 10.0
OTHER_OPTIONS = "this cluster's Ray Serve runs with other HTTP options; give its host and port, or end it first"


class Painter:
    """A replica that holds the model. Requests with the same steps and guidance that arrive together share a batch.

    ``model``: path of a run directory or model folder, as this node sees it. ``exact``: draw the images of a batch one
    at a time, so that the others cannot change an image's last digit; None: on a CPU only, where a batch gains little.
    """

    def __init__(self, model: str, precision: str, exact: bool | None, threads: int, limits: Limits):
        import torch

        from rlproxi.models.pipeline import TextToImage

        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.exact = device == "cpu" if exact is None else exact
        self.device = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.model = TextToImage.from_pretrained(model, precision).to(device)
        self.executor = ThreadPoolExecutor(1)  # Serve's loop stays free, and the model draws one batch at a time
        batching: Any = self.draw  # Serve adds these methods to the function, and its types do not say so
        batching.set_max_batch_size(limits.batch)
        batching.set_batch_wait_timeout_s(limits.wait_ms / 1000)

    async def facts(self) -> dict[str, Any]:
        """What /info shows of the model."""
        return {"size": self.model.size, "device": self.device, "precision": self.model.precision, "exact": self.exact}

    async def paint(self, prompt: str, seed: int, steps: int, guidance: float) -> tuple[bytes, int]:
        """(PNG, the number of requests in its batch). Raises RuntimeError with the model's error message."""
        batched: Any = self.draw  # one request in, one answer out: Serve's decorator makes the lists
        image, size = await batched((prompt, seed, steps, guidance))
        if isinstance(image, str):
            raise RuntimeError(image)
        return await asyncio.to_thread(_png, image), size

    @serve.batch  # its size and wait are set in __init__
    async def draw(self, requests: list[tuple[str, int, int, float]]) -> list[tuple[np.ndarray | str, int]]:
        """For each request its image uint8 [H, W, 3], or an error message, and the size of its batch."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, self._draw, requests)

    def _draw(self, requests: list[tuple[str, int, int, float]]) -> list[tuple[np.ndarray | str, int]]:
        groups: dict[tuple[int, float], list[int]] = {}
        for i, (_, _, steps, guidance) in enumerate(requests):
            groups.setdefault((steps, guidance), []).append(i)
        done: dict[int, tuple[np.ndarray | str, int]] = {}
        for rows in groups.values():
            for i, image in zip(rows, self._images([requests[i] for i in rows]), strict=True):
                done[i] = image, len(rows)
        return [done[i] for i in range(len(requests))]

    def _images(self, requests: list[tuple[str, int, int, float]]) -> list[np.ndarray | str]:
        """The images, or error messages, of requests with the same steps and guidance."""
        prompts, seeds, (steps, *_), (guidance, *_) = zip(*requests, strict=True)
        try:
            size = 1 if self.exact else len(prompts)
            return list(self.model(list(prompts), steps, guidance, list(seeds), size))
        except Exception as error:
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {error}"]
        # One prompt's failure, such as NaN, must not fail the others of its batch: each is tried alone.
        return [self._images([request])[0] for request in requests]


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


class Frontend:
    """Answers HTTP: POST /generate, GET /healthz, GET /info. An answer never holds a traceback.

    The model's ``schedule`` and ``sampler`` give a request's defaults. /healthz returns ``identity``, by which ``up``
    recognises its own deployment.
    """

    def __init__(self, painter: DeploymentHandle, schedule: Schedule, sampler: Sampler, limits: Limits, identity: str):
        self.painter, self.schedule, self.sampler = painter, schedule, sampler
        self.limits, self.identity = limits, identity
        self.under_way = 0
        self.seconds = 1.0  # of an answer, a running average
        self.counts: Counter[str] = Counter()
        self.batches: Counter[int] = Counter()

    async def __call__(self, request: Request) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        known = {"/healthz": ("GET", self._health), "/info": ("GET", self._info), "/generate": ("POST", self._generate)}
        if path not in known:
            return JSONResponse({"error": f"no such path; known are {', '.join(known)}"}, 404)
        method, answer = known[path]
        if request.method != method:
            return JSONResponse({"error": f"{path} takes {method}"}, 405, {"Allow": method})
        try:
            return await answer(request)
        except Refused as refused:
            self.counts["refused"] += 1
            return JSONResponse({"error": str(refused)}, refused.status)

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "id": self.identity})

    async def _generate(self, request: Request) -> Response:
        prompt, seed, steps, guidance = parse(await self._body(request), self.limits, self.sampler, self.schedule)
        if self.under_way >= self.limits.queue:
            self.counts["turned_away"] += 1
            message = f"{self.under_way} requests are under way, as many as are allowed: try again later"
            return JSONResponse({"error": message}, 503, {"Retry-After": str(max(1, round(self.seconds)))})
        self.under_way += 1
        start = time.monotonic()
        try:
            png, batch = await self.painter.paint.remote(prompt, seed, steps, guidance)
        except Exception as error:  # Ray wraps the replica's errors, and its own, in many classes
            self.counts["failed"] += 1
            logging.getLogger("ray.serve").error("a request failed: %s", error)
            return JSONResponse({"error": "the model could not draw this image"}, 500)
        finally:
            self.under_way -= 1
        self.seconds += 0.2 * (time.monotonic() - start - self.seconds)
        self.counts["served"] += 1
        self.batches[batch] += 1
        headers = {"X-Seed": str(seed), "X-Steps": str(steps), "X-Guidance-Scale": f"{guidance:g}"}
        return Response(png, headers=headers, media_type="image/png")

    async def _body(self, request: Request) -> bytes:
        limit, body = self.limits.body_bytes, bytearray()
        too_large = Refused(413, f"the body is larger than {limit} bytes")
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
            raise too_large

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > limit:
                    raise too_large

        try:
            await asyncio.wait_for(read(), READ_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not arrive in {READ_SECONDS:g} seconds") from None
        return bytes(body)

    async def _info(self, _: Request) -> Response:
        """The model's facts, the limits, and counts; ``images_by_batch`` counts images by the size of their batch."""
        facts = {
            "model": await self.painter.facts.remote(),
            "sampler": self.sampler.model_dump(),
            "schedule": self.schedule.model_dump(),
            "limits": asdict(self.limits),
            "under_way": self.under_way,
            **{name: self.counts[name] for name in ("served", "refused", "turned_away", "failed")},
            "images_by_batch": {str(size): count for size, count in sorted(self.batches.items())},
        }
        return JSONResponse(facts)


def application(
    model: str | os.PathLike,
    identity: str = "",
    replicas: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    precision: str = "float32",
    exact: bool | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> serve.Application:
    """The Serve application of a model folder or run directory, with ``replicas`` of ``Painter``.

    Raises FileNotFoundError or ValueError, before anything is started, for a folder without a model.
    """
    from rlproxi.models.folders import ModelFolder  # heavy, and the frontend does not need it

    found = ModelFolder.find(model)
    folder, schedule, sampler = found.path.resolve(), found.settings.schedule, found.settings.sampler
    common: dict[str, Any] = {
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "graceful_shutdown_timeout_s": 10,
    }
    painters: Any = serve.deployment(  # its types take it for a decorator with arguments
        Painter,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # One batch is drawn while the next gathers; the rest waits in the frontend, for whichever replica is free.
        max_ongoing_requests=2 * limits.batch,
        max_constructor_retry_count=1,  # a model that cannot be loaded once cannot be loaded twice
        **common,
    )
    frontend: Any = serve.deployment(
        Frontend,
        ray_actor_options={"num_cpus": 0},
        # Beyond the queue there is room for requests that are turned away, and for /healthz.
        max_ongoing_requests=2 * limits.queue + 64,
        **common,
    )
    painter = painters.bind(str(folder), precision, exact, max(1, int(cpus)), limits)
    return frontend.bind(painter, schedule, sampler, limits, identity)


def up(app: serve.Application, identity: str, name: str, host: str, port: int, route: str = "/") -> str:
    """Deploys an application on the running Ray, waits until it answers, and returns its address.

    Raises ValueError, with nothing left deployed, for a port that is taken, a Ray Serve that listens elsewhere or a
    model that a replica cannot load.
    """
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://{shown}:{port}{route.rstrip('/')}"
    check_address(host, port, running=bool(serve.status().proxies))
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        serve.run(app, name=name, route_prefix=route)
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            if json.load(answer).get("id") != identity:
                raise OSError("another service answers there")
    except (OSError, ValueError) as error:  # a URLError is an OSError
        serve.delete(name)
        raise ValueError(f"{url} does not answer ({error}): {OTHER_OPTIONS}") from None
    except Exception as error:
        found = serve.status().applications
        messages = [d.message for d in found[name].deployments.values()] if name in found else []
        if name in found:
            serve.delete(name)
        line = last_error_line("\n".join([str(error), *messages]))
        raise ValueError(f"the model cannot be served: {line}") from None
    return url


def check_address(host: str, port: int, running: bool) -> None:
    """Raise ValueError where nothing can listen at the address or, with Ray Serve ``running``, where nothing does."""
    try:
        if running:
            socket.create_connection(("127.0.0.1" if host in ("0.0.0.0", "::") else host, port), 5).close()
            return
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        remedy = OTHER_OPTIONS if running else "choose another"
        raise ValueError(f"--host {host} --port {port} cannot be had ({error}): {remedy}") from None


def down(name: str, everything: bool = False) -> None:
    """Take the application down after the requests under way; ``everything``: Serve as well."""
    if name in serve.status().applications:
        serve.delete(name)
    if everything:
        serve.shutdown()


def check_size(replicas: int, cpus: float, gpus: float) -> None:
    """Raise ValueError where the cluster is too small for the replicas, which would wait for ever."""
    have = ray.cluster_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if replicas * each > have.get(kind, 0) + 1e-9:
            asked = f"{replicas} replicas of {each:g} {kind}s each, and the cluster has {have.get(kind, 0):g}"
            raise ValueError(f"{asked}: lower --replicas or --{kind.lower()}s")
