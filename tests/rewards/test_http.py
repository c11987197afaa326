import http.client
import io
import json
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from rlproxi.evaluation.images import png_bytes
from rlproxi.rewards import RewardError, build, checked_scores, wire
from rlproxi.rewards import http as http_reward  # noqa: F401  (registration)
from rlproxi.rewards.serve_http import ScoringServer, main

PROMPTS = ["a red hat", "", 'ein Gruß, 帽子 \u2028 "quoted"']


def pictures(count: int = 3, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


class Recorder:
    """Scores by a known rule and keeps what it was asked."""

    def __init__(self, seconds: float = 0.0):
        self.seen, self.seconds, self.inside, self.most = [], seconds, 0, 0

    def score(self, images, prompts):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(self.seconds)
        self.seen.append((images.copy(), list(prompts)))
        self.inside -= 1
        if prompts[0] == "fail":
            raise KeyError("no such\nthing")
        if prompts[0] == "nan":
            return np.full(len(images), np.nan)
        return images.astype(np.float64).mean((1, 2, 3)) + [len(p) for p in prompts]

    @staticmethod
    def expected(images, prompts):
        return (images.astype(np.float64).mean((1, 2, 3)) + [len(p) for p in prompts]).astype(np.float32)


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server():
    with running(ScoringServer(Recorder(), "recorder", max_bytes=20_000)) as one:
        yield one


class Canned(BaseHTTPRequestHandler):
    """A foreign server that answers every POST with the same thing."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers)))
        status, headers, body = self.server.canned
        time.sleep(self.server.delay)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def canned(status=200, content_type="application/json", body=b"", delay=0.0, **headers):
    server = HTTPServer(("127.0.0.1", 0), Canned)
    server.requests, server.delay = [], delay
    server.canned = status, {"Content-Type": content_type, **headers}, body
    with running(server):
        yield server, f"http://127.0.0.1:{server.server_address[1]}"


def post(server, body: bytes, content_type: str, headers=None) -> tuple[int, str, dict]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("POST", "/", body, {"Content-Type": content_type, **(headers or {})})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer.decode("utf-8", "replace"), dict(response.getheaders())


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


# -- client and server together -----------------------------------------------------------


@pytest.mark.parametrize("format", ["npz", "json"])
def test_scores_come_back_as_the_servers_scorer_made_them(server, format):
    images = pictures()
    scores = build("http", {"url": server.url, "format": format}).score(images, PROMPTS)
    assert scores.dtype == np.float32 and np.array_equal(scores, Recorder.expected(images, PROMPTS))
    ((seen, prompts),) = server.scorer.seen
    assert np.array_equal(seen, images) and prompts == PROMPTS  # PNG and npz lose nothing


def test_nothing_to_score_needs_no_server():
    scorer = build("http", {"url": "http://127.0.0.1:9/"})
    assert scorer.score(np.zeros((0, 4, 4, 3), np.uint8), []).shape == (0,)
    with pytest.raises(ValueError, match=r"images float32 \[1, 4, 4, 3\] and 1 prompts: expected uint8"):
        scorer.score(np.zeros((1, 4, 4, 3), np.float32), ["x"])


def test_a_repetition_has_the_same_id_and_is_not_scored_twice(server):
    images = pictures()
    first = build("http", {"url": server.url}).score(images, PROMPTS)
    again = build("http", {"url": server.url, "format": "json"}).score(images, PROMPTS)
    assert np.array_equal(first, again) and len(server.scorer.seen) == 1
    build("http", {"url": server.url}).score(images[::-1], PROMPTS)
    assert len(server.scorer.seen) == 2
    with canned(body=b'{"scores": [1, 2, 3]}') as (other, url):
        for pixels, prompts in ((images, PROMPTS), (images, PROMPTS), (images, PROMPTS[::-1]), (images[::-1], PROMPTS)):
            build("http", {"url": url}).score(pixels, prompts)
        ids = [headers["X-Request-Id"] for _, headers in other.requests]
    assert ids[0] == ids[1] == wire.request_id(images, PROMPTS) and len(set(ids)) == 3
    # The shape belongs to the content: the same bytes as another picture are another request.
    assert wire.request_id(images, PROMPTS) != wire.request_id(images.reshape(3, 5, 6, 3), PROMPTS)


def test_requests_are_scored_one_after_another():
    with running(ScoringServer(Recorder(seconds=0.02), "recorder")) as server:
        scorer, images = build("http", {"url": server.url}), pictures(6)
        answers = [None] * 6

        def ask(i):
            answers[i] = scorer.score(images[i : i + 1], ["x" * i])[0]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert server.scorer.most == 1 and len(server.scorer.seen) == 6
    assert answers == Recorder.expected(images, ["x" * i for i in range(6)]).tolist()


def test_the_scorers_own_error_arrives_in_one_line(server, capfd):
    scorer = build("http", {"url": server.url})
    with pytest.raises(RewardError, match=r"answered 500: reward 'recorder' raised KeyError: 'no such\\nthing'"):
        scorer.score(pictures(), ["fail", "", ""])
    with pytest.raises(RewardError, match="answered 500: reward 'recorder' returned 3 scores that are NaN") as error:
        scorer.score(pictures(), ["nan", "", ""])
    assert "\n" not in str(error.value)
    assert "KeyError" in capfd.readouterr().err
    # A failure is not kept: what is asked again is scored again.
    with pytest.raises(RewardError):
        scorer.score(pictures(), ["fail", "", ""])
    assert len(server.scorer.seen) == 3


def test_a_body_over_the_limit_is_refused_with_words(server):
    with pytest.raises(RewardError, match="answered 413: the body has .* bytes, 20000 are allowed"):
        build("http", {"url": server.url}).score(pictures(3, 600, 600), PROMPTS)
    with pytest.raises(RewardError, match="answered 400: the images have 30000 bytes, 20000 are allowed"):
        build("http", {"url": server.url, "format": "json"}).score(np.zeros((1, 100, 100, 3), np.uint8), [""])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.zeros((1, 100, 100, 3), np.uint8), prompts=np.array(["x"]))
    status, words, _ = post(server, buffer.getvalue(), wire.NPZ)
    assert status == 400 and "bytes, 20000 are allowed" in words
    assert not server.scorer.seen


def test_the_server_says_that_it_is_up_and_echoes_the_id(server):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("GET", "/")
    assert json.loads(connection.getresponse().read()) == {"reward": "recorder"}
    connection.close()
    images = pictures(1)
    status, _, headers = post(server, npz(images=images, prompts=np.array(["two"])), f"{wire.NPZ}; x=y")
    assert status == 200 and headers["X-Request-Id"] == wire.request_id(images, ["two"])
    assert headers["Content-Type"] == wire.NPZ and server.scorer.seen[0][1] == ["two"]  # unicode arrays are read too


# -- what the server refuses --------------------------------------------------------------


def test_no_pickle_is_accepted(server):
    class Bomb:
        def __reduce__(self):
            return exec, ("import sys; sys.rlproxi_bomb = True",)

    objects = np.empty(1, object)
    objects[0] = Bomb()
    status, words, _ = post(server, npz(images=pictures(1), prompts=objects), wire.NPZ)
    assert status == 400 and words == "array 'prompts' holds objects, which only a pickle can carry: refused"
    with pytest.raises(wire.WireError, match="array 'scores' holds objects"):
        wire.decode_scores(wire.NPZ, npz(scores=objects), 1)
    assert not hasattr(sys, "rlproxi_bomb") and not server.scorer.seen


def claiming(shape: str) -> bytes:
    """An npz whose array's header claims a shape that its bytes do not have."""
    array = io.BytesIO()
    np.lib.format.write_array(array, np.zeros((1, 4, 4, 3), np.uint8))
    raw = array.getvalue().replace(b"(1, 4, 4, 3)", shape.encode().ljust(12))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", raw)
        archive.writestr("prompts.npy", npz_member(np.array(["x"])))
    return buffer.getvalue()


def npz_member(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body, content_type, status, words",
    [
        (b"garbage", wire.NPZ, 400, "the body is not an npz"),
        (npz(images=pictures(1)), wire.NPZ, 400, "lacks an array: .*prompts.npy"),
        (npz(images=pictures(1).astype(np.float32), prompts=np.array(["x"])), wire.NPZ, 400, "images are float32"),
        (npz(images=pictures(1)[..., :2], prompts=np.array(["x"])), wire.NPZ, 400, r"uint8 \[1, 6, 5, 2\], expected"),
        (npz(images=pictures(2), prompts=np.array(["x"])), wire.NPZ, 400, "1 prompts for 2 images"),
        (npz(images=pictures(1), prompts=np.zeros(1)), wire.NPZ, 400, "prompts are float64"),
        (npz(images=pictures(1), prompts=np.frombuffer(b'{"a": 1}', np.uint8)), wire.NPZ, 400, "not a list of texts"),
        (npz(images=pictures(1), prompts=np.frombuffer(b"[1", np.uint8)), wire.NPZ, 400, "not JSON"),
        (claiming("(9, 9, 9, 9)"), wire.NPZ, 400, r"claims uint8 \[9, 9, 9, 9\] and holds 48 bytes"),
        (claiming("(-1, -48)"), wire.NPZ, 400, "array 'images' cannot be read"),
        (b"{", wire.JSON, 400, "the body is not JSON"),
        (b"[" * 100_000, wire.JSON, 413, "bytes"),
        (b"[" * 15_000, wire.JSON, 400, "the body is not JSON"),
        (b'{"images": []}', wire.JSON, 400, "not of the form"),
        (b'{"images": [], "prompts": []}', wire.JSON, 400, "images are not a list"),
        (b'{"images": ["????"], "prompts": ["x"]}', wire.JSON, 400, "image 0 is not a base64 PNG"),
        (b'{"images": [3], "prompts": ["x"]}', wire.JSON, 400, "image 0 is not a base64 PNG"),
        (b"x", "application/octet-stream", 415, "expected application/x-npz or application/json"),
        (b"x", "", 415, "expected"),
    ],
)
def test_what_is_not_of_the_format_is_refused(server, body, content_type, status, words):
    import re

    got, told, _ = post(server, body, content_type)
    assert got == status and re.search(words, told), told
    assert not server.scorer.seen
    # The server is still there.
    assert post(server, npz(images=pictures(1), prompts=np.array(["x"])), wire.NPZ)[0] == 200


def test_pictures_of_two_sizes_or_cut_short_are_refused(server):
    import base64

    def body(*images):
        return json.dumps({"images": [base64.b64encode(i).decode() for i in images], "prompts": ["x"] * len(images)})

    one, two = png_bytes(pictures(1, 8, 8)[0]), png_bytes(pictures(1, 8, 9)[0])
    status, words, _ = post(server, body(one, two).encode(), wire.JSON)
    assert status == 400 and words == "images of one request have one size, got [(8, 8), (9, 8)]"
    status, words, _ = post(server, body(one[:-60]).encode(), wire.JSON)
    assert status == 400 and "not a whole PNG" in words
    jpeg = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(jpeg, "JPEG")
    assert post(server, body(jpeg.getvalue()).encode(), wire.JSON)[1].startswith("image 0 is not a base64 PNG")


# -- what the client refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, words",
    [
        (
            {"status": 404, "body": b"<h1>Not\n found</h1>", "content_type": "text/html"},
            r"answered 404: <h1>Not found</h1>$",
        ),
        ({"status": 503}, r"answered 503: \(nothing\)$"),
        ({"status": 302, "Location": "http://127.0.0.1:9/"}, "answered 302"),
        ({"body": b'{"scores": [1, 2, 3]}', "content_type": "text/plain"}, "content type 'text/plain' is neither"),
        ({"body": b'{"scores": [1, 2]}'}, r'scores of shape \[2\] for 3 images; it said: {"scores": \[1, 2\]}'),
        ({"body": b'{"scores": [[1], [2], [3]]}'}, "not of the form"),
        ({"body": b'{"scores": ["1", "2", "3"]}'}, "not of the form"),
        ({"body": b'{"scores": [1, 2, true]}'}, "not of the form"),
        ({"body": b'{"error": "no GPU"}'}, 'not of the form .*; it said: {"error": "no GPU"}'),
        ({"body": b"[1, 2, 3]"}, "not of the form"),
        ({"body": b"oops"}, "the body is not JSON"),
        ({"body": b'{"scores": [1, NaN, 1e300]}'}, "2 of 3 scores are NaN or infinite"),
        (
            {"body": npz(scores=np.float32([1, np.inf, 2])), "content_type": wire.NPZ},
            "1 of 3 scores are NaN or infinite$",
        ),
        ({"body": npz(scores=np.float32([[1, 2, 3]])), "content_type": wire.NPZ}, r"scores of shape \[1, 3\] for 3"),
        ({"body": npz(scores=np.array([1, 2, 3])), "content_type": wire.NPZ}, "scores are int64, expected float32"),
        ({"body": npz(other=np.float32([1, 2, 3])), "content_type": wire.NPZ}, "lacks an array"),
        ({"body": b"x" * 200_000}, "more than the 65728 bytes that 3 scores may have: x{300}$"),
    ],
)
def test_an_answer_that_is_no_scores_is_an_error_with_the_servers_words(answer, words):
    with canned(**answer) as (_, url), pytest.raises(RewardError, match=words) as error:
        build("http", {"url": f"{url}/score?key=secret"}).score(pictures(), PROMPTS)
    assert str(error.value).startswith(f"{url}/score answered") and "secret" not in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "body, content_type",
    [
        (b'{"scores": [0.5, -1, 2e-3]}', "application/json; charset=utf-8"),
        (npz(scores=np.array([0.5, -1, 2e-3])), wire.NPZ),
    ],
)  # float64 is converted
def test_either_format_may_answer(body, content_type):
    for format in ("npz", "json"):
        with canned(body=body, content_type=content_type) as (_, url):
            scores = checked_scores(build("http", {"url": url, "format": format}), "http", pictures(), PROMPTS)
        assert scores.tolist() == np.float32([0.5, -1, 2e-3]).tolist()


def test_silence_and_absence_are_told_apart():
    late = canned(body=b'{"scores": [1]}', delay=0.5)
    with late as (_, url), pytest.raises(RewardError, match=f"{url} did not answer within timeout_s = 0.1$"):
        build("http", {"url": url, "timeout_s": 0.1}).score(pictures(1), ["x"])
    with pytest.raises(RewardError, match=f"{url} cannot be asked: ConnectionRefusedError"):
        build("http", {"url": url}).score(pictures(1), ["x"])


# -- parameters ---------------------------------------------------------------------------


def test_headers_take_secrets_from_the_environment(monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "s3cret\n")  # a line break at the end is common in files of tokens
    headers = {"Authorization": "Bearer $SCORER_TOKEN", "X-Price": "5$$", "X-Both": "${SCORER_TOKEN}s"}
    with canned(body=b'{"scores": [1]}') as (server, url):
        build("http", {"url": f"{url}/a/b?c=d", "headers": {**headers, "X-Both": "plain"}}).score(pictures(1), ["x"])
    path, sent = server.requests[0]
    assert path == "/a/b?c=d" and sent["Authorization"] == "Bearer s3cret" and sent["X-Price"] == "5$"
    assert sent["X-Both"] == "plain" and sent["Content-Type"] == wire.NPZ
    # In the middle it would begin another header; the error does not show the value.
    with pytest.raises(ValueError, match="X-Both has a line break") as error:
        build("http", {"url": url, "headers": headers})
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "params, words",
    [
        (
            {"headers": {"Authorization": "Bearer $NO_SUCH_TOKEN"}},
            "Authorization needs the environment variable NO_SUCH_TOKEN",
        ),
        ({"headers": {"A": "5$"}}, r"A has a \$ that names no variable"),
        ({"headers": {"A b": "x"}}, "'A b' is not a header's name"),
        (
            {"headers": {"content-TYPE": "x"}},
            "'content-TYPE' is not a header's name, or one that the scorer sets itself",
        ),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"format": "pickle"}, "format = 'pickle': Input should be 'npz' or 'json'"),
        ({"url": "ftp://host/"}, "not of the form http://"),
        ({"url": "localhost:8100"}, "not of the form http://"),
        ({"url": "http://host/a b"}, "must be percent-encoded"),
        ({"url": "http://host:port/"}, "[Pp]ort"),
        ({"url": "http://user:hunter2@host/"}, "url holds a user name"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused_when_it_is_built(params, words, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(ValueError, match=words) as error:
        build("http", {"url": "http://127.0.0.1:9/", **params})
    assert "hunter2" not in str(error.value)


# -- the server's command -----------------------------------------------------------------


def test_the_command_serves_a_registered_reward():
    program = [
        sys.executable,
        "-m",
        "rlproxi.rewards.serve_http",
        "--reward",
        "jpeg",
        "--params",
        '{"quality": 50}',
        "--port",
        "0",
    ]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        told = process.stdout.readline()
        assert told.startswith("serving reward 'jpeg' at http://127.0.0.1:")
        images = pictures(2, 32, 32)
        remote = build("http", {"url": told.split()[-1]}).score(images, ["", ""])
        assert np.array_equal(remote, build("jpeg", {"quality": 50}).score(images, ["", ""]))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reward", "jpge"], "did you mean jpeg?"),
        (["--reward", "jpeg", "--params", "{"], "--params is not JSON"),
        (["--reward", "jpeg", "--params", "[]"], "--params [] is not a JSON object"),
        (["--reward", "jpeg", "--params", '{"qualty": 1}'], "did you mean 'quality'?"),
        (["--reward", "judge", "--params", '{"path": "no.safetensors"}'], "no.safetensors' is missing"),
        (["--reward", "jpeg", "--port", "99999"], "port must be 0-65535"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_2(arguments, words, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and words in told and told.count("\n") == 1
