"""A small server for the ``http`` scorer: any scorer, in an environment of its own.

    python -m rlproxi.rewards.serve_http --reward NAME --params '{"path": "..."}' --port 8100

It does not authenticate: whoever reaches its address may use it. The default address is the loopback one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from . import wire
from .base import RewardError, Scorer, checked_scores
from .registry import build

#: Answers that are kept for repeated requests: a client that timed out and asks again does not wait twice.
KEPT_ANSWERS = 256


class ScoringServer(ThreadingHTTPServer):
    """POST scores a group, at any path; GET returns the reward's name, a health check.

    Requests are read in parallel and scored one at a time.

    Args:
        scorer: the reward.
        name: its name, for errors and for GET.
        host, port: where to listen; port 0 takes a free one.
        max_bytes: limit of a request's body, and of its images once they are decoded.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, scorer: Scorer, name: str, host: str = "127.0.0.1", port: int = 0, max_bytes: int = 256 * 2**20):
        super().__init__((host, port), _Handler)
        self.scorer, self.name, self.max_bytes = scorer, name, max_bytes
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, np.ndarray] = OrderedDict()

    @property
    def url(self) -> str:
        """The address it listens on."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def scores(self, images: np.ndarray, prompts: list[str], request: str) -> np.ndarray:
        """images uint8 [B, H, W, 3] and B prompts -> float32 [B]; ``request`` is their hash. Raises RewardError."""
        with self._lock:
            if request not in self._answers:
                self._answers[request] = checked_scores(self.scorer, self.name, images, prompts)
                if len(self._answers) > KEPT_ANSWERS:
                    self._answers.popitem(last=False)
            return self._answers[request]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback, except of a client that went away."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may be silent in the middle of a request
    server: ScoringServer

    def do_GET(self) -> None:
        """Answers with the reward's name."""
        self._answer(200, wire.JSON, json.dumps({"reward": self.server.name}).encode())

    def do_POST(self) -> None:
        """Answers with the scores of a request, or with a status and one line of text."""
        length, media = self.headers.get("Content-Length", ""), wire.media_type(self.headers.get("Content-Type"))
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            return self._refuse(411, "the request needs a Content-Length")
        if int(length) > self.server.max_bytes:
            return self._refuse(413, f"the body has {length} bytes, {self.server.max_bytes} are allowed", int(length))
        if media not in wire.CONTENT_TYPES.values():
            return self._refuse(415, f"content type {media!r}: expected {wire.NPZ} or {wire.JSON}", int(length))
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return self._refuse(400, f"the body ended after {len(body)} of {length} bytes")
        try:
            images, prompts = wire.decode_request(media, body, self.server.max_bytes)
        except wire.WireError as error:
            return self._answer(400, "text/plain; charset=utf-8", str(error).encode())
        request = wire.request_id(images, prompts)  # the client's header could name another request
        try:
            scores = self.server.scores(images, prompts, request)
        except RewardError as error:
            self.log_error("%s", str(error))
            return self._answer(500, "text/plain; charset=utf-8", str(error).encode("utf-8", "replace"))
        self._answer(200, media, wire.encode_scores(media, scores), request)

    def _refuse(self, status: int, message: str, unread: int = 0) -> None:
        """Answers after dropping up to ``unread`` bytes of the body: many clients read only after sending all of it."""
        left = min(unread, 2 * self.server.max_bytes)
        while left > 0 and (chunk := self.rfile.read(min(left, 65536))):
            left -= len(chunk)
        self.close_connection = True
        self._answer(status, "text/plain; charset=utf-8", message.encode())

    def _answer(self, status: int, content_type: str, body: bytes, request: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if request:
            self.send_header("X-Request-Id", request)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Logs failures only."""
        if code != 200:  # a run makes thousands of good requests
            super().log_request(code, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until interrupted. Returns 0, or 2 for a reward that cannot be built or a port that is not free."""
    parser = argparse.ArgumentParser(
        prog="python -m rlproxi.rewards.serve_http", description="Serves one reward to the `http` scorer."
    )
    parser.add_argument("--reward", required=True, metavar="NAME", help="a registered scorer, or package.module:Class")
    parser.add_argument("--params", default="{}", metavar="JSON", help="its parameters, a JSON object")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one (default 8100)")
    parser.add_argument("--max-mb", type=int, default=256, metavar="N", help="limit of a request in MiB (default 256)")
    arguments = parser.parse_args(argv)
    try:
        params = json.loads(arguments.params)
        if not isinstance(params, dict):
            raise ValueError(f"--params {arguments.params} is not a JSON object")
        scorer = build(arguments.reward, params)
        server = ScoringServer(scorer, arguments.reward, arguments.host, arguments.port, arguments.max_mb * 2**20)
    except (ValueError, OSError, OverflowError) as error:
        message = f"--params is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"serving reward {arguments.reward!r} at {server.url}", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
