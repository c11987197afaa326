"""The live page's server: ``rlproxi dashboard`` and the page beside a run. It only reads.

Neither Ray nor torch is imported here: this process may run beside a run on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..run_directory import RunDirectory
from ..telemetry.catalogue import CATALOGUE
from ..telemetry.live import files as live_files
from ..telemetry.live.hub import Hub
from ..telemetry.values import dig, whole
from . import ASSETS, asset
from .process import MORE_PORTS, address, bind, is_loopback

DEFAULT_PORT = 8270
#: Bytes of a query, pages that may listen at once, and bytes of pictures that are kept.
QUERY_LIMIT, STREAMS, PICTURE_CACHE = 2048, 32, 16 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """The ASGI wrapper that every request passes: GET and HEAD only, with bounded queries.

    On loopback the Host header must name loopback too. Else a foreign page could reach this one by a name of its own
    that resolves to this machine.
    """

    def __init__(self, app, loopback: bool):
        self.app, self.loopback = app, loopback

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        await (refused or self.app)(scope, receive, _with_headers(send))

    def _refused(self, scope, headers: dict) -> JSONResponse | None:
        if scope["method"] not in ("GET", "HEAD"):
            return _error(405, f"{scope['method'][:20]} is not allowed: this page only reads", {"Allow": "GET, HEAD"})
        if len(scope["query_string"]) > QUERY_LIMIT or len(scope["raw_path"] or b"") > QUERY_LIMIT:
            return _error(414, f"path and query have at most {QUERY_LIMIT} bytes each")
        try:
            scope["query_string"].decode()
        except UnicodeDecodeError:  # Starlette would fail on it
            return _error(400, "the query is not UTF-8")
        if self.loopback and not _is_here(headers.get(b"host", b"").decode("latin-1")):
            return _error(403, "the Host header is not this machine's: use http://127.0.0.1 or http://localhost")
        return None


def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) and (name in ("localhost", "::1") or name.replace(".", "").isdecimal())


def _with_headers(send):
    async def sending(message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message["headers"] = [*message["headers"], *own]
        await send(message)

    return sending


def _error(status: int, words: str, headers: dict | None = None) -> JSONResponse:
    return JSONResponse({"error": words, "status": status}, status, {"Cache-Control": "no-store", **(headers or {})})


class Page:
    """The endpoints. Reading of files runs in threads; the event loop only passes updates on."""

    def __init__(self, hub: Hub):
        self.hub, self.streams = hub, 0
        self.stopping = asyncio.Event()
        self._pictures: OrderedDict[tuple, tuple[bytes, list]] = OrderedDict()
        self._drawing = threading.Lock()

    def routes(self) -> list[Route]:
        """The paths, each with its endpoint."""
        one = "/api/runs/{run}"
        return [
            Route("/", self.file),
            Route("/{name:str}", self.file),
            Route("/api/catalogue", _json(self.catalogue)),
            Route("/api/runs", _json(self.runs)),
            Route(one, _json(self.run)),
            Route(f"{one}/config", _json(self.config)),
            Route(f"{one}/timeline", _json(self.timeline)),
            Route(f"{one}/galleries/{{step:int}}", _json(self.gallery)),
            Route(f"{one}/galleries/{{step:int}}/{{group:int}}.png", self.gallery_picture),
            Route(f"{one}/evaluations", _json(self.evaluations)),
            Route(f"{one}/evaluations/{{tag:str}}/{{steps:int}}/{{prompt:int}}.png", self.evaluation_picture),
            Route(f"{one}/evaluations/{{tag:str}}/{{steps:int}}/{{prompt:int}}", _json(self.evaluation_scores)),
            Route("/api/events", self.events),
        ]

    def file(self, request: Request) -> Response:
        """A file of the page."""
        name = request.path_params.get("name", "index.html")
        if name not in ASSETS:
            raise HTTPException(404, f"there is no {name[:100]!r} here")
        return Response(asset(name), media_type=ASSETS[name], headers={"Cache-Control": "no-cache"})

    def catalogue(self, request: Request) -> list[dict]:
        """The unit and the explanation of every known metric."""
        return [{"name": m.name, "unit": m.unit, "help": m.help, "reading": m.reading} for m in CATALOGUE]

    def runs(self, request: Request) -> dict:
        """The list of runs."""
        return {"runs": self.hub.listing(), "cursor": self.hub.cursor()}

    def run(self, request: Request) -> dict:
        """All curves and events of a run."""
        return self.hub.snapshot(request.path_params["run"])

    def config(self, request: Request) -> dict:
        """A run's config.yaml, and its number of denoising steps."""
        run = self.hub.opened(request.path_params["run"])
        with run.lock:
            text, values = run.config()
        return {"text": text, "headline_steps": whole(dig(values, "sampler", "num_inference_steps"))}

    def timeline(self, request: Request) -> dict:
        """The last iterations of a run's timeline."""
        run = self.hub.opened(request.path_params["run"])
        with run.lock:
            return {"iterations": run.timeline.read()}

    def gallery(self, request: Request) -> dict:
        """The gallery of a step."""
        return live_files.gallery(self._folder(request), request.path_params["step"])

    def gallery_picture(self, request: Request) -> Response:
        """The picture of a gallery's group."""
        at = request.path_params
        return _png(live_files.gallery_picture(self._folder(request), at["step"], at["group"]))

    def evaluations(self, request: Request) -> dict:
        """The list of a run's evaluations."""
        return {"evaluations": live_files.evaluations(self._folder(request))}

    def evaluation_picture(self, request: Request) -> Response:
        """The samples of an evaluation's prompt."""
        return _png(self._evaluation(request)[0])

    def evaluation_scores(self, request: Request) -> dict:
        """The held-out scores of an evaluation's prompt."""
        return {"heldout": self._evaluation(request)[1]}

    def _evaluation(self, request: Request) -> tuple[bytes, list]:
        at, folder = request.path_params, self._folder(request)
        # A resumed run may write a picture's file again.
        file = RunDirectory(folder).evaluation_samples(at["tag"][:100], at["steps"])
        try:
            changed = os.stat(file).st_mtime_ns
        except (OSError, ValueError):  # a name may be longer than a file's can be, or none
            changed = 0
        place = folder, at["tag"], at["steps"], at["prompt"]
        key = (*place, changed)
        with self._drawing:  # one at a time: each may hold many megabytes while it is drawn
            found = self._pictures.get(key) or live_files.evaluation_picture(*place)
            self._pictures[key] = found
            while sum(len(picture) for picture, _ in self._pictures.values()) > PICTURE_CACHE:
                self._pictures.popitem(last=False)
        return found

    def _folder(self, request: Request) -> Path:
        return self.hub.folders()[request.path_params["run"]]

    async def events(self, request: Request) -> Response:
        """Server-sent events of ?run=ID[&run=ID..] since ?after=CURSOR, or since the Last-Event-ID of a reconnect."""
        names = set(request.query_params.getlist("run"))
        unknown = names - set(await run_in_threadpool(self.hub.folders))
        if not names or unknown:
            raise HTTPException(404, f"ask for ?run=ID of /api/runs; unknown: {', '.join(sorted(unknown))[:200]}")
        if self.streams >= STREAMS:
            raise HTTPException(503, f"{STREAMS} pages are listening already; close one")
        cursor = request.headers.get("last-event-id") or request.query_params.get("after") or ""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(self._stream(names, cursor), media_type="text/event-stream", headers=headers)

    async def _stream(self, names: set[str], cursor: str):
        self.streams += 1
        try:
            yield b"retry: 1000\n\n"
            quiet = 0.0
            while not self.stopping.is_set():
                cursor, fresh = self.hub.after(cursor, names)
                if fresh is None:
                    yield f"id: {cursor}\nevent: lost\ndata: {{}}\n\n".encode()
                for at, text in fresh or ():
                    yield f"id: {at}\ndata: {text}\n\n".encode()
                quiet = 0.0 if fresh or fresh is None else quiet + 0.25
                if quiet >= 15:  # shows a proxy, and us, that both ends are alive
                    quiet = 0.0
                    yield b": still here\n\n"
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), 0.25)
        finally:
            self.streams -= 1


def _json(answer: Callable[[Request], object]):
    """An endpoint that sends what ``answer`` returns as JSON, without NaN."""

    def endpoint(request: Request) -> Response:
        try:
            body = json.dumps(answer(request), allow_nan=False, separators=(",", ":"))
        except KeyError as error:
            raise HTTPException(404, f"there is no run {str(error)[:100]}; /api/runs lists them") from None
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    return endpoint


def _png(data: bytes) -> Response:
    return Response(data, media_type="image/png", headers={"Cache-Control": "no-cache"})


def application(hub: Hub, loopback: bool = True) -> tuple[Guard, Page]:
    """(ASGI application, its page, whose ``stopping`` ends the streams)."""
    page = Page(hub)
    handlers = {
        HTTPException: lambda request, error: _error(error.status_code, error.detail, error.headers),
        KeyError: lambda request, error: _error(404, "there is no such run; /api/runs lists them"),
        live_files.NotThere: lambda request, error: _error(404, str(error)),
        Exception: lambda request, error: _error(500, "this failed; the server's terminal says why"),
    }
    return Guard(Starlette(routes=page.routes(), exception_handlers=handlers), loopback), page


class _Server(uvicorn.Server):
    """A server that calls ``on_exit`` when a signal ends it, so that open streams end too."""

    on_exit: Callable[[], object] = staticmethod(lambda: None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.on_exit()
        super().handle_exit(sig, frame)


def serve(hub: Hub, listener: socket.socket, host: str, until: Callable[[], object] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM, or until ``until``, which runs in a thread, returns."""

    async def main() -> None:
        app, page = application(hub, is_loopback(host))
        quiet: dict[str, Any] = {"access_log": False, "log_level": "error", "server_header": False}
        # h11 lets us bound a request's head. The other implementation does not bound a path.
        bounds: dict[str, Any] = {"h11_max_incomplete_event_size": 16384, "limit_concurrency": 256}
        parts: dict[str, Any] = {"http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off"}
        server = _Server(uvicorn.Config(app, **parts, **quiet, **bounds, timeout_graceful_shutdown=2))
        loop = asyncio.get_running_loop()

        def stop() -> None:
            page.stopping.set()
            server.should_exit = True

        def wait(done: Callable[[], object]) -> None:
            done()
            loop.call_soon_threadsafe(stop)

        if until is not None:
            threading.Thread(target=wait, args=[until], daemon=True).start()
        server.on_exit = lambda: loop.call_soon_threadsafe(page.stopping.set)
        await server.serve(sockets=[listener])

    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(main())
    finally:
        hub.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server that ``rlproxi.dashboard.process`` starts, with a socket that listens already."""
    parser = argparse.ArgumentParser("rlproxi.dashboard.server")
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--until-stdin-ends", action="store_true")
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args(argv)
    os.nice(options.nice)
    until = sys.stdin.buffer.read if options.until_stdin_ends else None
    serve(Hub(options.run_dirs), socket.socket(fileno=options.fd), options.host, until)
    return 0


def command(run_dirs: list[Path], host: str, port: int | None) -> int:
    """Serve ``run_dirs`` until Ctrl-C, for ``rlproxi dashboard``.

    Raises FileNotFoundError for a path that is no run, ValueError if the port is taken.
    """
    hub, wanted = Hub(run_dirs), DEFAULT_PORT if port is None else port
    try:
        listener = bind(host, wanted, MORE_PORTS if port is None else 0)
    except OSError as error:
        raise ValueError(f"--host {host} --port {wanted}: {error}; choose another") from None
    if not is_loopback(host):
        print(f"warning: anyone who reaches {host} can read these runs; the page has no passwords", file=sys.stderr)
    print(f"dashboard      {address(listener)}  (Ctrl-C ends it)", flush=True)
    serve(hub, listener, host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
