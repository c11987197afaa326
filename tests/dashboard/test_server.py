"""The live page's server behind real HTTP: what it shows, what it refuses, and what it costs a run."""

import http.client
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from fixtures.dashboard_run import make_run
from rlproxi.cli import main as cli
from rlproxi.dashboard import ASSETS, DOCUMENTS, asset
from rlproxi.dashboard.process import PageProcess, bind
from rlproxi.telemetry.runlog import RunLog

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*arguments: str):
    """``rlproxi dashboard`` on a free port: (its process, its port)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlproxi", "dashboard", *arguments, "--port", "0"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)/", line)
        assert found, line + process.stderr.read()
        yield process, int(found[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    make_run(base / "one")
    make_run(base / "two")
    return base


@pytest.fixture(scope="module")
def port(runs):
    with served(str(runs)) as (_, port):
        yield port


def ask(port: int, target: str, method: str = "GET", **headers) -> tuple[int, dict, bytes]:
    """The target goes as it is, unlike with a client that tidies paths."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, target, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict((k.lower(), v) for k, v in answer.getheaders()), body


def fetched(port: int, target: str) -> dict:
    status, headers, body = ask(port, target)
    assert status == 200 and headers["content-type"] == "application/json", body
    return json.loads(body)


def test_the_page_and_all_it_loads_come_from_here(port):
    for name, kind in {"": ASSETS["index.html"], **ASSETS}.items():
        status, headers, body = ask(port, f"/{name}")
        assert (status, headers["content-type"]) == (200, kind) and body == asset(name or "index.html")
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert not re.findall(rb"https?://(?!www\.w3\.org/2000/svg)|@import|eval\(|innerHTML", body), name
        for other in re.findall(rb"(?:from |src=|href=)['\"](?:\./)?([\w.]+\.\w+)['\"]", body):
            assert other.decode() in ASSETS, f"{name} wants {other}"
    shipped = {file.name for file in (ROOT / "rlproxi" / "dashboard").iterdir() if file.suffix not in (".py", "")}
    assert shipped == set(ASSETS)


def test_documents_are_served_as_text(port):
    names = fetched(port, "/api/documents")
    assert "dashboard.md" in names and set(names) == set(DOCUMENTS)
    for name in names:
        status, headers, body = ask(port, f"/docs/{name}")
        assert status == 200 and headers["content-type"] == "text/plain; charset=utf-8"
        assert body == (ROOT / "docs" / name).read_bytes()


def test_what_a_run_directory_holds(port):
    assert {run["id"] for run in fetched(port, "/api/runs")} == {"one", "two"}
    found = fetched(port, "/api/runs/one")
    assert found["curves"]["rl"]["loss"] == {"stride": 1, "x": [1, 2, 3, 4, 5], "y": [0.1, 0.2, 0.3, 0.4, 0.5]}
    assert found["exact"] and found["galleries"] == [5] and found["progress"]["total"] == 9
    assert found["headline_steps"] == 3
    assert "num_inference_steps: 3" in fetched(port, "/api/runs/one/config")["text"]
    assert fetched(port, "/api/runs/one/timeline")[0]["spans"] == [["rollout", 0, "sample", 1.0, 2.0]]
    assert fetched(port, "/api/runs/one/galleries/5")[0]["best"] == 3
    assert fetched(port, "/api/runs/one/evaluations")[0]["steps"] == [3]
    assert fetched(port, "/api/runs/one/evaluations/before/3/1") == [2.0, 3.0]
    for picture, size in (("galleries/5/0.png", (32, 8)), ("evaluations/before/3/1.png", (16, 8))):
        status, headers, body = ask(port, f"/api/runs/one/{picture}")
        assert (status, headers["content-type"]) == (200, "image/png") and Image.open(io.BytesIO(body)).size == size
    names = [metric["name"] for metric in fetched(port, "/api/catalogue")]
    assert "kl" in names and "heldout/<name>" in names
    status, headers, body = ask(port, "/api/runs/one", "HEAD")
    assert status == 200 and body == b""


ESCAPES = [
    "/../secret.txt",
    "/..%2fsecret.txt",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/secret.txt",
    "/docs/../secret.txt",
    "/docs/..%2fpyproject.toml",
    "/docs/secret.txt",
    "/__init__.py",
    "/process.py",
    "/api/runs/..",
    "/api/runs/../one",
    "/api/runs/%2e%2e%2fone",
    "/api/runs/one/../../../etc/passwd",
    "/api/runs/one%00",
    "/api/runs/one/secret.txt",
    "/api/runs/one/samples/000005-0.png",
    "/api/runs/three",
    "/api/runs/one/galleries/5/7.png",
    "/api/runs/one/galleries/-5/0.png",
    "/api/runs/one/galleries/9999999999999999999/0.png",
    "/api/runs/one/galleries/5/../../secret.txt",
    "/api/runs/one/evaluations/..%2f..%2ftwo/3/0.png",
    "/api/runs/one/evaluations/%2e%2e/3/0",
    "/api/runs/one/evaluations/before/3/99.png",
    "/api/runs/one/evaluations/before/99999999999/0.png",
    "/api/runs/one/evaluations/%00/3/0.png",
    "/api/events",
    "/api/events?run=..%2fone",
    "/api/events?run=one&run=three",
    "/%ff%fe",
    "/favicon.ico",
]


@pytest.mark.parametrize("target", ESCAPES)
def test_what_is_not_offered_is_404_in_json(port, target):
    status, headers, body = ask(port, target)
    assert status == 404 and headers["content-type"] == "application/json", body
    told = json.loads(body)
    assert told["status"] == 404 and told["error"] and b"secret" not in body.replace(b"secret.txt", b"")


def test_it_only_reads_bounded_queries_from_this_machine(port):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        status, headers, body = ask(port, "/api/runs", method)
        assert (status, headers["allow"]) == (405, "GET, HEAD") and json.loads(body)["status"] == 405
    for target in (f"/api/runs?{'x' * 5000}", f"/{'y' * 5000}"):
        status, _, body = ask(port, target)
        assert status == 414 and json.loads(body)["status"] == 414
    with socket.create_connection(("127.0.0.1", port)) as raw:  # not even read to its end
        raw.sendall(b"GET /api/runs?" + b"x" * 17_000)
        assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
    for host in (
        "evil.example",
        "evil.example:8270",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "[",
        "127.evil.example",
        "192.168.0.1",
    ):
        status, _, body = ask(port, "/api/runs", Host=host)
        assert status in (400, 403) and b"one" not in body, host
    for host in ("localhost", "localhost:99", "127.0.0.1:1", "[::1]:8270"):  # as through ssh -L
        assert ask(port, "/api/runs", Host=host)[0] == 200
    assert ask(port, "/api/runs")[0] == 200


def events(port: int, target: str, count: int, **headers):
    """The first ``count`` events of a stream: [(id, event, data)]."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", target, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    found, now = [], {}
    while len(found) < count:
        line = answer.readline().decode().rstrip("\n")
        if not line and "data" in now:
            found.append((now.get("id"), now.get("event"), json.loads(now["data"])))
        if not line:
            now = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            now[name] = value
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    return found


def steps(found) -> list[int]:
    return [change[2] for _, _, data in found for change in data["changes"] if change[0] == "points"]


def test_a_reconnecting_page_goes_on_where_it_was(port, runs):
    cursor = fetched(port, "/api/runs/two")["cursor"]
    with RunLog(runs / "two") as log:
        log.append("metrics", stage="rl", step=6, loss=0.6)
        first = events(port, f"/api/events?run=two&after={cursor}", 1)
        assert steps(first) == [6]
        # While nobody listens:
        log.append("metrics", stage="rl", step=7, loss=0.7)
        log.append("warning", message="careful")
        time.sleep(1.5)
        log.append("metrics", stage="rl", step=8, loss=0.8)
        # As EventSource does it: the old address, and the last id that it has seen, which counts.
        again, seen = [], first[-1][0]
        while steps(again) != [7, 8]:
            again += events(port, f"/api/events?run=two&after={cursor}", 1, Last_Event_ID=seen)
            seen = again[-1][0]
            assert len(again) < 5, again
    assert [data["run"] for _, _, data in again] == ["two"] * len(again)
    ((_, event, data),) = events(port, "/api/events?run=two", 1, Last_Event_ID="another-5")
    assert event == "lost" and data == {}  # a server that knows nothing of it: the page fetches everything


def test_ctrl_c_ends_it_even_while_a_page_listens(runs):
    with served(str(runs / "one")) as (process, port):
        cursor = fetched(port, "/api/runs/one")["cursor"]
        stream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        stream.request("GET", f"/api/events?run=one&after={cursor}")
        assert stream.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr.read() == ""
        stream.close()


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    taken = bind("127.0.0.1", 0)
    for arguments, words in (
        ([str(tmp_path / "no")], "is not a folder"),
        ([str(tmp_path)], "is not a run directory and holds none"),
        ([str(runs), "--port", str(taken.getsockname()[1])], "choose another"),
        ([str(runs), "--host", "203.0.113.1"], "choose another"),
    ):
        assert cli.main(["dashboard", *arguments]) == 2
        assert words in capsys.readouterr().err
    taken.close()


def test_a_host_that_others_reach_is_warned_of(runs):
    with served(str(runs), "--host", "0.0.0.0") as (process, port):
        assert ask(port, "/api/runs", Host="gpu-box.example:8270")[0] == 200
        process.send_signal(signal.SIGINT)
        assert "anyone who reaches 0.0.0.0 can read" in process.stderr.read()


# -- beside a run -----------------------------------------------------------------------------


def test_beside_a_run_it_costs_nothing_until_somebody_looks(runs):
    taken = bind("127.0.0.1", 0)
    page = PageProcess(runs / "one", "127.0.0.1", taken.getsockname()[1], pytest.fail)  # the next free port
    try:
        port = urllib.parse.urlsplit(page.url).port
        assert taken.getsockname()[1] < port <= taken.getsockname()[1] + 50
        assert page.server is None
        assert fetched(port, "/api/runs")[0]["id"] == "one"
        server = page.server
        assert os.getpriority(os.PRIO_PROCESS, server.pid) >= 10
        loaded = Path(f"/proc/{server.pid}/maps").read_text()
        assert "libtorch" not in loaded and "_raylet" not in loaded
    finally:
        page.close()
        taken.close()
    assert server.poll() is not None
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/")


def test_a_server_that_ends_is_started_again_and_then_given_up_in_words(runs, monkeypatch):
    warnings: queue.Queue[str] = queue.Queue()
    page = PageProcess(runs / "one", "127.0.0.1", 0, warnings.put)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    port = urllib.parse.urlsplit(page.url).port
    waiting = socket.create_connection(("127.0.0.1", port))  # nobody ever accepts it
    warning = warnings.get(timeout=60)
    assert "its server ended 3 times" in warning and "the run goes on" in warning
    waiting.close()
    page.close()
    assert warnings.empty()


def test_the_server_does_not_outlive_a_killed_run(runs):
    code = (
        "import sys, time; from pathlib import Path; from rlproxi.dashboard.process import PageProcess\n"
        "page = PageProcess(Path(sys.argv[1]), '127.0.0.1', 0, print); print(page.url, flush=True)\n"
        "while page.server is None: time.sleep(0.05)\n"
        "print(page.server.pid, flush=True); time.sleep(600)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(runs / "one")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    port = urllib.parse.urlsplit(run.stdout.readline().strip()).port
    assert ask(port, "/")[0] == 200
    server = int(run.stdout.readline())
    run.kill()
    run.wait()
    end = time.time() + 30
    while Path(f"/proc/{server}").exists() and "zombie" not in Path(f"/proc/{server}/status").read_text():
        assert time.time() < end, "the server is still there"
        time.sleep(0.1)
