"""``rlproxi serve``: a trained model behind HTTP, by Ray Serve.

Two deployments. The ``Frontend`` reads and checks requests and limits how many are under way. The ``Painter`` replicas
hold the model and gather concurrent requests into batches.
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
OTHER_OPTIONS = (
    "Ray Serve was running on this cluster with other HTTP options, which cannot be changed; give its host "
    "and port, or end it first"
)


class Painter:
    """A replica that holds the model.

    Requests that arrive together and ask for the same steps and guidance share a batch. With ``exact`` the images of a
    batch are drawn one at a time, so that an image never depends, not in its last digit, on what was beside it.

    Args:
        model: path of a run directory or model folder, as this node sees it.
        precision: of the network's arithmetic: auto, float32 or bfloat16.
        exact: None: on a CPU only, where a batch gains little.
        threads: torch threads of the replica.
        limits: the size of a batch, and how long it waits to fill up.
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
        for (steps, guidance), rows in groups.items():
            images = self._images([requests[i][0] for i in rows], [requests[i][1] for i in rows], steps, guidance)
            done.update({i: (image, len(rows)) for i, image in zip(rows, images, strict=True)})
        return [done[i] for i in range(len(requests))]

    def _images(self, prompts: list[str], seeds: list[int], steps: int, guidance: float) -> list[np.ndarray | str]:
        try:
            return list(self.model(prompts, steps, guidance, seeds, batch_size=1 if self.exact else len(prompts)))
        except Exception as error:
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {error}"]
        # One prompt's failure, such as NaN, must not fail the others of its batch: each is tried alone.
        alone = zip(prompts, seeds, strict=True)
        return [self._images([prompt], [seed], steps, guidance)[0] for prompt, seed in alone]


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


class Frontend:
    """Answers HTTP: POST /generate, GET /healthz, GET /info. An answer never holds a traceback.

    Args:
        painter: handle of the painters.
        schedule, sampler: of the model; a request's defaults.
        limits: of requests.
        identity: what /healthz returns, so that ``up`` recognises its own deployment.
    """

    def __init__(self, painter: DeploymentHandle, schedule: Schedule, sampler: Sampler, limits: Limits, identity: str):
        self.painter, self.schedule, self.sampler = painter, schedule, sampler
        self.limits, self.identity = limits, identity
        self.under_way = 0
        self.seconds = 1.0  # of an answer, a running average
        self.counts: Counter[str] = Counter()
        self.batches: Counter[int] = Counter()

    async def __call__(self, request: Request) -> Response:
        route = (request.method, request.scope["path"].removeprefix(request.scope.get("root_path", "")))
        try:
            if route == ("GET", "/healthz"):
                return JSONResponse({"status": "ok", "id": self.identity})
            if route == ("GET", "/info"):
                return JSONResponse(await self._info())
            if route == ("POST", "/generate"):
                return await self._generate(request)
            known = {"/healthz": "GET", "/info": "GET", "/generate": "POST"}
            if route[1] in known:
                return JSONResponse({"error": f"{route[1]} takes {known[route[1]]}"}, 405, {"Allow": known[route[1]]})
            return JSONResponse({"error": f"no such path; known are {', '.join(known)}"}, 404)
        except Refused as refused:
            self.counts["refused"] += 1
            return JSONResponse({"error": str(refused)}, refused.status)

    async def _generate(self, request: Request) -> Response:
        prompt, seed, steps, guidance = parse(await self._body(request), self.limits, self.sampler, self.schedule)
        if self.under_way >= self.limits.queue:
            self.counts["turned away"] += 1
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
        return Response(
            png,
            media_type="image/png",
            headers={"X-Seed": str(seed), "X-Steps": str(steps), "X-Guidance-Scale": f"{guidance:g}"},
        )

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

    async def _info(self) -> dict[str, Any]:
        """The model's facts, the limits, and counts; ``images_by_batch`` counts images by the size of their batch."""
        return {
            "model": await self.painter.facts.remote(),
            "sampler": self.sampler.model_dump(),
            "schedule": self.schedule.model_dump(),
            "limits": asdict(self.limits),
            "under_way": self.under_way,
            "served": self.counts["served"],
            "refused": self.counts["refused"],
            "turned_away": self.counts["turned away"],
            "failed": self.counts["failed"],
            "images_by_batch": {str(size): count for size, count in sorted(self.batches.items())},
        }


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
    """The Serve application of a model folder or run directory.

    Args:
        model: the folder. identity: what /healthz returns.
        replicas: painters, each with ``cpus`` and ``gpus``.
        precision, exact, limits: as ``Painter`` takes them.

    Raises FileNotFoundError or ValueError, before anything is started, for a folder without a model.
    """
    from rlproxi.models.folders import ModelFolder  # heavy, and the frontend does not need it

    found = ModelFolder.find(model)
    folder, schedule, sampler = found.path.resolve(), found.settings.schedule, found.settings.sampler
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    painters: Any = serve.deployment(  # its types take it for a decorator with arguments
        Painter,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # One batch is drawn while the next gathers; the rest waits in the frontend, for whichever replica is free.
        max_ongoing_requests=2 * limits.batch,
        logging_config=quiet,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=1,  # a model that cannot be loaded once cannot be loaded twice
    )
    frontend: Any = serve.deployment(
        Frontend,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
        # Beyond the queue there is room for requests that are turned away, and for /healthz.
        max_ongoing_requests=2 * limits.queue + 64,
        graceful_shutdown_timeout_s=10,
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
    """Raises ValueError where nothing can listen at the address or, with Ray Serve ``running``, where nothing does."""
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
    """Takes the application down after the requests under way; ``everything``: Serve as well."""
    if name in serve.status().applications:
        serve.delete(name)
    if everything:
        serve.shutdown()


def check_size(replicas: int, cpus: float, gpus: float) -> None:
    """Raises ValueError where the cluster is too small for the replicas, which would wait for ever."""
    have = ray.cluster_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if replicas * each > have.get(kind, 0) + 1e-9:
            raise ValueError(
                f"{replicas} replicas of {each:g} {kind}s each, and the cluster has "
                f"{have.get(kind, 0):g}: lower --replicas or --{kind.lower()}s"
            )
