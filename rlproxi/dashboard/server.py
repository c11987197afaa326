"""The live page's server, which only reads. It imports neither Ray nor torch, for it may run beside a run."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..telemetry.catalogue import CATALOGUE
from ..telemetry.live import files as live_files
from ..telemetry.live.hub import Hub
from . import ASSETS, DOCUMENTS, asset
from .process import MORE_PORTS, address, bind, is_loopback

DEFAULT_PORT = 8270
#: Bytes of a query, and pages that may listen at once.
QUERY_LIMIT, STREAMS = 2048, 32
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

    On loopback the Host header must name loopback: a foreign page's name for this machine is refused.
    """

    def __init__(self, app, loopback: bool):
        self.app, self.loopback = app, loopback

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def sending(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await (self._refused(scope) or self.app)(scope, receive, sending)

    def _refused(self, scope) -> JSONResponse | None:
        if scope["method"] not in ("GET", "HEAD"):
            return _error(405, f"{scope['method'][:20]} is not allowed: this page only reads", {"Allow": "GET, HEAD"})
        if len(scope["query_string"]) > QUERY_LIMIT or len(scope["raw_path"] or b"") > QUERY_LIMIT:
            return _error(414, f"path and query have at most {QUERY_LIMIT} bytes each")
        try:
            scope["query_string"].decode()
        except UnicodeDecodeError:  # Starlette would fail on it
            return _error(400, "the query is not UTF-8")
        if self.loopback and not _is_here(Headers(scope=scope).get("host", "")):
            return _error(403, "the Host header is not this machine's: use http://127.0.0.1 or http://localhost")
        return None


def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) and (name in ("localhost", "::1") or name.replace(".", "").isdecimal())


def _error(status: int, words: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": words, "status": status}, status, {"Cache-Control": "no-store", **(headers or {})})


class Page:
    """The endpoints, which read files in threads. ``stopping`` says whether the open streams have to end."""

    def __init__(self, hub: Hub, stopping: Callable[[], bool]):
        self.hub, self.stopping, self.streams = hub, stopping, 0
        self._drawing = threading.Lock()

    def routes(self) -> list[Route]:
        """The paths, each with its endpoint."""
        one = "/api/runs/{name}"
        gallery, evaluation = f"{one}/galleries/{{step:int}}", f"{one}/evaluations/{{tag}}/{{steps:int}}/{{prompt:int}}"
        return [
            Route("/", self.file),
            Route("/{name:str}", self.file),
            Route("/docs/{name:str}", self.document),
            Route("/api/documents", _answer(lambda: sorted(DOCUMENTS))),
            Route("/api/events", self.events),
            Route("/api/catalogue", _answer(lambda: [asdict(metric) for metric in CATALOGUE])),
            Route("/api/runs", _answer(self.hub.listing)),
            Route(one, _answer(self.hub.snapshot)),
            Route(f"{one}/config", _answer(lambda name: {"text": self.hub.opened(name).config()[0]})),
            Route(f"{one}/timeline", _answer(self.timeline)),
            Route(gallery, _answer(self._reader(live_files.gallery))),
            Route(f"{gallery}/{{index:int}}.png", _answer(self._reader(live_files.gallery_picture))),
            Route(f"{one}/evaluations", _answer(self._reader(live_files.evaluations))),
            Route(f"{evaluation}.png", _answer(self._reader(self.evaluation_picture))),
            Route(evaluation, _answer(self._reader(live_files.evaluation_scores))),
        ]

    def _reader(self, read: Callable[..., object]) -> Callable[..., object]:
        """``read``, which takes a run directory, for a run's id."""
        return lambda name, **place: read(self.hub.folders()[name], **place)

    def file(self, request: Request) -> Response:
        """A file of the page."""
        name = request.path_params.get("name", "index.html")
        if name not in ASSETS:
            raise HTTPException(404, f"there is no {name[:100]!r} here")
        return Response(asset(name), media_type=ASSETS[name], headers={"Cache-Control": "no-cache"})

    def document(self, request: Request) -> Response:
        """A document of the project's folder docs/, as plain text."""
        name = request.path_params["name"]
        if name not in DOCUMENTS:
            raise HTTPException(404, f"there is no document {name[:100]!r} here")
        return Response(DOCUMENTS[name].read_bytes(), media_type="text/plain; charset=utf-8")

    def timeline(self, name: str) -> list[dict]:
        """The last iterations of a run's timeline."""
        run = self.hub.opened(name)
        with run.lock:
            return run.timeline.read()

    def evaluation_picture(self, folder: Path, **place: Any) -> bytes:
        """The samples of an evaluation's prompt, drawn one at a time: each may hold many megabytes meanwhile."""
        with self._drawing:
            return live_files.evaluation_picture(folder, **place)

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
            while not self.stopping():
                cursor, fresh = self.hub.after(cursor, names)
                if fresh is None:
                    yield f"id: {cursor}\nevent: lost\ndata: {{}}\n\n".encode()
                for at, text in fresh or ():
                    yield f"id: {at}\ndata: {text}\n\n".encode()
                quiet = 0.0 if fresh or fresh is None else quiet + 0.25
                if quiet >= 15:  # shows a proxy, and us, that both ends are alive
                    quiet = 0.0
                    yield b": still here\n\n"
                await asyncio.sleep(0.25)
        finally:
            self.streams -= 1


def _answer(read: Callable[..., object]) -> Callable[[Request], Response]:
    """An endpoint that sends what ``read`` returns for the path's parameters: bytes as PNG, others as JSON."""

    def endpoint(request: Request) -> Response:
        found = read(**request.path_params)
        if isinstance(found, bytes):
            return Response(found, media_type="image/png", headers={"Cache-Control": "no-cache"})
        body = json.dumps(found, allow_nan=False, separators=(",", ":"))
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    return endpoint


def application(hub: Hub, loopback: bool = True, stopping: Callable[[], bool] = lambda: False) -> Guard:
    """The ASGI application, whose streams end when ``stopping`` returns True."""
    handlers = {
        HTTPException: lambda request, error: _error(error.status_code, error.detail, error.headers),
        KeyError: lambda request, error: _error(404, f"there is no run {str(error)[:100]}; /api/runs lists them"),
        live_files.NotThere: lambda request, error: _error(404, str(error)),
        Exception: lambda request, error: _error(500, "this failed; the server's terminal says why"),
    }
    return Guard(Starlette(routes=Page(hub, stopping).routes(), exception_handlers=handlers), loopback)


def serve(hub: Hub, listener: socket.socket, host: str, until: Callable[[], object] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM, or until ``until``, which runs in a thread, returns."""
    app = application(hub, is_loopback(host), lambda: server.should_exit)
    quiet: dict[str, Any] = {"access_log": False, "log_level": "error", "server_header": False}
    # h11 lets us bound a request's head. The other implementation does not bound a path.
    bounds: dict[str, Any] = {"h11_max_incomplete_event_size": 16384, "limit_concurrency": 256}
    parts: dict[str, Any] = {"http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(app, **parts, **quiet, **bounds, timeout_graceful_shutdown=2))

    def wait(done: Callable[[], object]) -> None:
        done()
        server.should_exit = True

    if until is not None:
        threading.Thread(target=wait, args=[until], daemon=True).start()
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        hub.close()


def main(run_dir: str, host: str, file: str) -> None:
    """Run the server that ``process.PageProcess`` starts, with the descriptor of its socket, until stdin ends."""
    os.nice(10)
    serve(Hub([Path(run_dir)]), socket.socket(fileno=int(file)), host, sys.stdin.buffer.read)


def command(run_dirs: list[Path], host: str, port: int | None) -> int:
    """Serve ``run_dirs`` until Ctrl-C. Raises FileNotFoundError where no run is, ValueError for a taken port."""
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
    main(*sys.argv[1:])
