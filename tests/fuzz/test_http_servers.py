"""What comes over HTTP, to the scorer's server and client, the image service and the live page: never a fault."""

import asyncio
import base64
import http.client
import io
import json
import random
import socket
import threading
import urllib.parse
import zipfile

import pytest

from fuzz.hunt import Reader, examples, hunted
from fuzz.spoil import spoil, spoilt_json

INPUTS = {
    "scoring request": 700,
    "scoring answer": 400,
    "scoring server": 400,
    "scoring client": 150,
    "image request": 800,
    "image service": 500,
    "live page": 700,
    "raw sockets": 150,
}


def _inflated(images: bytes, prompts: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("prompts.npy", prompts)
    return stream.getvalue()


def _npy(shape: str, descr: str = "'|u1'", data: bytes = b"", length: int | None = None) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + (len(text) if length is None else length).to_bytes(2, "little") + text + data


def requests_of_old(wire, good: bytes) -> list[tuple[str, bytes]]:
    """Requests that stand for more than they are."""
    from fuzz.test_shard_files import bombs

    texts = _npy("(6,)", data=b'["ab"]')
    npz = [
        _inflated(bytes(80 << 20), texts),
        _inflated(_npy("(1, 2, 2, 3)", data=bytes(12)), _npy("(60000000,)", data=bytes(60_000_000))),
        _inflated(_npy("(1, 2, 2, 3)", data=bytes(12)), _npy("(100000,)", data=b"[" * 100_000)),
        _inflated(_npy(f"(1, 2, {2**62}, 3)", data=bytes(12)), texts),
        _inflated(_npy("(1, -2, -2, 3)", data=bytes(12)), texts),
        _inflated(_npy("(1, True, 12, 1)", data=bytes(12)), texts),
        _inflated(_npy("(1, 2, 2, 3)", "'|O'", bytes(96)), texts),
        _inflated(_npy("(" * 200 + "1" + ")" * 200), texts),
        _inflated(_npy("(1, 2, 2, 3)", "[('f', [('g', " * 20), texts),
        _inflated(_npy("(0, 2, 2, 3)", "'|V0'"), texts),
        _inflated(_npy("(1, 2, 2, 3)", "'|S0'"), texts),
        _inflated(b"\x93NUMPY\2\0" + b"\xff" * 4, texts),
        _inflated(_npy("(1, 2, 2, 3)", data=bytes(12)), _npy("(1,)", "'<U1'", b"\0\xd8\0\0")),
        _inflated(_npy("(1, 2, 2, 3)", data=bytes(12)), _npy("(1,)", "'<U1'", b"\xff" * 4)),
        b"PK\5\6" + bytes(18),
        good[:40],
    ]
    encoded = [{"images": [base64.b64encode(bomb).decode()] * 3, "prompts": ["a"] * 3} for bomb in bombs()]
    return [
        *((wire.NPZ, body) for body in npz),
        *((wire.JSON, json.dumps(body).encode()) for body in encoded),
        (wire.JSON, b"[" * 100_000),
        (wire.JSON, b"9" * 5000),
    ]


class Wire:
    """A connection whose client has sent ``data`` and listens."""

    def __init__(self, data: bytes):
        self.data, self.answer = data, b""

    def settimeout(self, seconds) -> None:
        pass

    def makefile(self, *_) -> io.BytesIO:
        return io.BytesIO(self.data)

    def sendall(self, data: bytes) -> None:
        self.answer += bytes(data)


def head(
    draw: random.Random, targets, host: str, methods=("GET", "POST", "HEAD", "PUT", "OPTIONS")
) -> tuple[str, bytes, list[tuple[bytes, bytes]]]:
    """(method, target, headers), some of them spoilt."""
    method = draw.choice(methods) if draw.random() < 0.4 else methods[0]
    target = draw.choice(targets).encode()
    if draw.random() < 0.6:
        target = spoil(draw, target, [t.encode() for t in targets])
        if draw.random() < 0.5:
            target = urllib.parse.quote_from_bytes(target, safe="/?&=.").encode()
    headers = [(b"host", host.encode()), (b"content-type", b"application/json"), (b"last-event-id", b"abc-5")]
    if draw.random() < 0.3:
        at = draw.randrange(len(headers))
        headers[at] = headers[at][0], spoil(draw, headers[at][1]).replace(b"\r", b"").replace(b"\n", b"")
    return method, target, headers


def scope_of(method: str, target: bytes, headers) -> dict:
    """As uvicorn makes it."""
    path, _, query = target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "root_path": "",
        "path": urllib.parse.unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "headers": headers,
        "server": ("127.0.0.1", 8270),
        "client": ("127.0.0.1", 1),
    }


def readers(folder):
    import numpy as np

    from actors.serve import image_service
    from actors.serve.image_request import Limits, Refused, parse
    from fixtures.dashboard_run import make_run
    from rlproxi.config.sections import Sampler, Schedule
    from rlproxi.dashboard import server as dashboard
    from rlproxi.dashboard.process import bind
    from rlproxi.rewards import wire
    from rlproxi.rewards.base import RewardError
    from rlproxi.rewards.http import HTTPReward
    from rlproxi.rewards.serve_http import ScoringServer, _Handler
    from rlproxi.telemetry.live.hub import Hub

    loop = asyncio.new_event_loop()
    images, prompts = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 3), np.uint8), ["a hat", "caf\u00e9"]
    kinds = {kind: wire.encode_request(kind, images, prompts) for kind in (wire.NPZ, wire.JSON)}
    answers = {kind: wire.encode_scores(kind, np.arange(2, dtype=np.float32)) for kind in kinds}

    def body(draw: random.Random, seeds) -> tuple[str, bytes]:
        kind = draw.choice((wire.NPZ, wire.JSON))
        if kind == wire.JSON and draw.random() < 0.6:
            return kind, spoilt_json(draw, [json.loads(seeds[kind])])
        return (kind if draw.random() < 0.95 else "text/html"), spoil(draw, seeds[kind], list(seeds.values()))

    class Mean:
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    faults: list[BaseException] = []

    class Server(ScoringServer):
        def handle_error(self, request, client_address):
            import sys

            if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
                faults.append(sys.exc_info()[1])

    # Nobody here keeps a line open without a word, so it is never waited for; 5 seconds may pass on a busy machine.
    _Handler.timeout = 120
    _Handler.log_message = lambda *_: None
    server = Server(Mean(), "mean", max_bytes=1 << 20)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def post(draw: random.Random) -> bytes:
        kind, data = body(draw, kinds) if draw.random() < 0.5 else (wire.NPZ, kinds[wire.NPZ])
        length = draw.choice((len(data), len(data), len(data), 0, -1, "9" * 5000, len(data) + 9, "1_0", "\u0661", "+5"))
        text = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode() + data
        return spoil(draw, text) if draw.random() < 0.6 else text

    def answered(data: bytes) -> None:
        line = Wire(data)
        _Handler(line, ("127.0.0.1", 1), server)
        assert b"HTTP/1.1 500" not in line.answer and b"Traceback" not in line.answer

    told: list[bytes] = [b""]
    answering = socket.create_server(("127.0.0.1", 0))

    def answer_all() -> None:
        while True:
            with answering.accept()[0] as line:
                line.settimeout(5)
                try:
                    line.recv(1 << 16)
                    line.sendall(told[0])
                    line.shutdown(socket.SHUT_WR)
                    while line.recv(1 << 16):
                        pass
                except OSError:
                    continue

    threading.Thread(target=answer_all, daemon=True).start()
    client = HTTPReward(f"http://127.0.0.1:{answering.getsockname()[1]}/", timeout_s=5)

    def ask(data: bytes) -> None:
        told[0] = data
        client.score(images, prompts)

    def answer(draw: random.Random) -> bytes:
        kind, data = body(draw, answers)
        if draw.random() < 0.3:
            data = b"5\r\n" + data[:5] + b"\r\n" + b"%x\r\n" % (len(data) - 5) + data[5:] + b"\r\n0\r\n\r\n"
            top = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
        else:
            status = draw.choice((200, 200, 200, 500, 301, 100, 99999))
            top = f"HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        return spoil(draw, top.encode() + data) if draw.random() < 0.6 else top.encode() + data

    limits, sampler, schedule = Limits(queue=4), Sampler(num_inference_steps=3), Schedule()
    wanted = {"prompt": "a hat", "seed": 5, "steps": 3, "guidance_scale": 2.5}

    def parsed(data: bytes) -> None:
        prompt, seed, steps, guidance = parse(data, limits, sampler, schedule)
        assert (
            len(prompt.encode()) <= 4 * limits.prompt_chars
            and 0 <= seed < 2**53
            and 1 <= steps <= limits.steps
            and 0 <= guidance <= 100
        )

    class Painted:
        """Draws nothing: what a client may ask for is all that is looked at here."""

        class paint:
            @staticmethod
            async def remote(*asked):
                return b"\x89PNG", 1

        class facts:
            @staticmethod
            async def remote():
                return {"size": 16}

    frontend = image_service.Frontend(Painted(), schedule, sampler, limits, "me")

    def asgi(app, scope: dict, chunks: list[bytes]) -> tuple[int, bytes]:
        """(status, body); the client leaves after its last piece."""
        waiting = [
            {"type": "http.request", "body": chunk, "more_body": more < len(chunks) - 1}
            for more, chunk in enumerate(chunks)
        ]
        sent: list[dict] = []

        async def receive() -> dict:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        loop.run_until_complete(asyncio.wait_for(app(scope, receive, send), 120))
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

    async def service(scope, receive, send) -> None:
        from starlette.requests import Request

        await (await frontend(Request(scope, receive)))(scope, receive, send)

    def generate(draw: random.Random):
        method, target, headers = head(
            draw, ["/generate", "/generate", "/generate", "/healthz", "/info"], "x", ("POST", "POST", "GET", "HEAD")
        )
        data = spoilt_json(draw, [wanted])
        headers.append(
            (b"content-length", draw.choice((str(len(data)).encode(), b"9" * 40, b"-1", b"x", b"\xb2", b"")))
        )
        cut = draw.randrange(len(data) + 1)
        return scope_of(method, target, headers), [data[:cut], data[cut:]]

    def served(made) -> None:
        status, told = asgi(service, *made)
        assert status in (200, 400, 404, 405, 413, 422) and (status == 200 or json.loads(told)["error"]), (
            status,
            told[:200],
        )

    runs = folder / "runs"
    make_run(runs / "one")
    hub = Hub([runs])
    app = dashboard.application(hub)
    one = "/api/runs/one"
    targets = [
        "/",
        "/app.js",
        "/api/runs",
        one,
        f"{one}/config",
        f"{one}/timeline",
        f"{one}/galleries/5",
        f"{one}/galleries/5/0.png",
        f"{one}/evaluations",
        f"{one}/evaluations/before/3/1.png",
        f"{one}/evaluations/before/3/1",
        "/api/events?run=one&after=abc-5",
        "/api/catalogue",
    ]
    escapes = [
        f"{one}/galleries/{'9' * 5000}",
        f"{one}/galleries/{'9' * 1500}/{'9' * 300}.png",
        f"{one}/evaluations/before/{'9' * 1900}/0.png",
        "/api/runs/one%00",
        f"{one}/evaluations/before/3/{'9' * 1500}",
        "/api/events?run=one&after=-\u00b2",
        "/api/events?run=one&run=%ed%a0%80",
        f"{one}/evaluations/%ed%a0%80/3/0",
        f"{one}/evaluations/\udcff/3/0",
        "/api/runs/\udcff",
        f"{one}/evaluations/before%0a/3/0.png",
        f"{one}/galleries/5/?\udce0",
    ]

    def browse(made) -> None:
        method, target, headers = made
        scope = scope_of(method, target.split(b"#")[0], headers)
        status, told = asgi(app, scope, [b""])
        assert status in (200, 307, 400, 403, 404, 405, 414, 503), (status, told[:300])
        assert b"Traceback" not in told and b'"secret' not in told

    listener = bind("127.0.0.1", 0)
    threading.Thread(target=dashboard.serve, args=(hub, listener, "127.0.0.1"), daemon=True).start()
    ports = listener.getsockname()[1], server.server_address[1]

    def garbage(draw: random.Random):
        lines = b"\r\n".join(
            [
                b"GET " + draw.choice(targets[:-2]).encode() + b" HTTP/1.1",
                b"Host: 127.0.0.1",
                b"Connection: close",
                b"",
                b"",
            ]
        )
        return draw.choice(ports), draw.choice(
            (spoil(draw, lines), spoil(draw, lines), post(draw), draw.randbytes(draw.choice((1, 30, 20_000))))
        )

    def thrown(made) -> None:
        port, data = made
        with socket.create_connection(("127.0.0.1", port), 120) as line:
            try:
                line.sendall(data)
                line.shutdown(socket.SHUT_WR)
                got = b""
                while chunk := line.recv(1 << 16):
                    got += chunk
            except OSError as error:  # it may hang up at once, and that shows in several ways
                if isinstance(error, TimeoutError):
                    raise
                got = b""
        assert b" 500 " not in got.partition(b"\r\n")[0] and not faults, faults
        alive = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        alive.request("GET", "/")
        assert alive.getresponse().status == 200
        alive.close()

    def quoted(target: str) -> bytes:
        return target.encode("utf-8", "surrogateescape")

    wire_error = (wire.WireError,)
    return {
        "scoring request": Reader(
            examples(requests_of_old(wire, kinds[wire.NPZ]), lambda draw: body(draw, kinds)),
            lambda made: wire.decode_request(*made, 64 << 20),
            wire_error,
        ),
        "scoring answer": Reader(
            lambda draw, i: body(draw, answers), lambda made: wire.decode_scores(*made, 2), wire_error
        ),
        "scoring server": Reader(lambda draw, i: post(draw), answered),
        "scoring client": Reader(lambda draw, i: answer(draw), ask, (RewardError,), "http://127.0.0.1"),
        "image request": Reader(lambda draw, i: spoilt_json(draw, [wanted]), parsed, (Refused,)),
        "image service": Reader(
            examples([(scope_of("POST", b"/generate?\xc3(", [(b"content-length", b"9" * 5000)]), [b"{}"])], generate),
            served,
        ),
        "live page": Reader(
            examples(
                [("GET", quoted(target), [(b"host", b"localhost")]) for target in escapes],
                lambda draw: head(draw, targets, "127.0.0.1:8270"),
            ),
            browse,
        ),
        "raw sockets": Reader(lambda draw, i: garbage(draw), thrown),
    }


def test_servers_and_their_clients():
    hunted("test_http_servers", INPUTS)


@pytest.mark.exhaustive
def test_more_servers_and_their_clients():
    hunted("test_http_servers", {name: 20 * count for name, count in INPUTS.items()})
