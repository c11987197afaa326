"""A real Prometheus scrapes a real Ray while a run goes on: every panel and every alert asks for what is there.

An alert is asked for in two ways: its expression without the comparison must return data (else the rule could never
fire), and Prometheus must have loaded and evaluated the rule itself without an error.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlproxi.telemetry import timeline
from rlproxi.telemetry.alerts import ALERTS
from rlproxi.telemetry.catalogue import CATALOGUE, lookup, series
from rlproxi.telemetry.monitoring import files
from rlproxi.telemetry.runlog import read

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.exhaustive]  # minutes on a Ray of its own

ROOT = Path(__file__).parents[2]
STEPS = 12
#: What a GRPO run on CPUs and portraits does not log. A second log writer on the same Ray is given records of them.
ELSEWHERE = {
    "last_step/reward",
    "<network>/loss",
    "<network>/grad_norm",
    "<network>/lr",
    "images_per_second/gpu",
    "shards",
    "samples",
    "skipped",
    "passed",
    "other/<name>",
}

PORTS = (
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
)

ANOTHER_LOG = """
import sys, time
import ray
from actors.run.log_writer import RunLogWriter

ray.init(log_to_driver=False)
log = RunLogWriter.remote(sys.argv[1])
for step in range(1, 1000):
    rl = {"last_step/reward": 0.5, "fake/loss": 1.0, "fake/grad_norm": 0.1, "fake/lr": 1e-4,
          "images_per_second/gpu": 9.0, "entropy": 0.3}
    ray.get(log.append.remote("metrics", {"stage": "rl", "step": step, **rl}))
    data = {"shards": step, "samples": 100 * step, "skipped": step, "passed": 50 * step}
    ray.get(log.append.remote("metrics", {"stage": "encode", "step": step, **data}))
    time.sleep(0.5)
"""


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def end(process: subprocess.Popen) -> None:
    """Everything in the process's session; politely first."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
    process.wait()


class Prometheus:
    def __init__(self, port: str):
        self.address = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, path: str, **parameters) -> object:
        with urllib.request.urlopen(f"{self.address}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def numbers(self, expression: str, begun: float, ended: float) -> list[float]:
        """All finite values of an expression, second by second, over the run."""
        found = self.ask("query_range", query=expression, start=begun, end=ended, step=1)["result"]
        return [number for row in found for _, value in row["values"] if math.isfinite(number := float(value))]


@pytest.fixture(scope="module")
def watched(from_smoke, tmp_path_factory):
    """(Prometheus, run directory, begun, ended): a run on a Ray of its own, which Prometheus has scraped."""
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt install prometheus)")
    folder = tmp_path_factory.mktemp("monitoring")
    with contextlib.ExitStack() as stack:
        # Ray's sockets want a short path.
        ray_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_metrics_report_interval_ms": "500",
            "RAY_worker_niceness": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

        def start(name: str, *command: str) -> subprocess.Popen:
            log = stack.enter_context(open(folder / f"{name}.log", "w"))
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            stack.callback(end, process)
            return process

        def until(reached, what: str, seconds: float = 120) -> None:
            last = time.time() + seconds
            while not reached():
                logs = {file.name: file.read_text()[-2000:] for file in folder.glob("*.log")}
                assert time.time() < last, f"{what} never came: {logs}"
                time.sleep(0.2)

        def start_ray() -> str:
            """Its address. Ray gives up on a node that takes 30 s to start, which a busy machine may: then again."""
            for _ in range(5):
                gcs, *ports = free_ports(7)
                process = start(
                    "ray",
                    str(Path(sys.executable).with_name("ray")),
                    "start",
                    "--head",
                    "--block",
                    "--disable-usage-stats",
                    "--num-cpus=6",
                    f"--port={gcs}",
                    "--node-ip-address=127.0.0.1",
                    f"--temp-dir={ray_folder}",
                    *(f"--{name}={port}" for name, port in zip(PORTS, ports)),
                )
                up = lambda: "block forever" in (folder / "ray.log").read_text()  # noqa: E731
                until(lambda: up() or process.poll() is not None, "Ray")
                if up():
                    return f"127.0.0.1:{gcs}"
            raise AssertionError((folder / "ray.log").read_text())

        environment["RAY_ADDRESS"] = start_ray()
        nodes = Path(ray_folder) / "prom_metrics_service_discovery.json"
        until(nodes.is_file, "Ray's list of nodes")
        (prometheus,) = free_ports(1)
        _start_prometheus(start, folder, nodes, prometheus)
        other = folder / "other"
        other.mkdir()
        shutil.copy(Path(from_smoke[0].split("=")[1]).parents[1] / "config.yaml", other)  # the smoke run's config
        begun = time.time()
        start("second-log", sys.executable, "-c", ANOTHER_LOG, str(other))
        run = start(
            "run",
            sys.executable,
            "-m",
            "rlproxi.run",
            str(ROOT / "configs" / "smoke.yaml"),
            f"run.dir={folder}/runs",
            *from_smoke,
            "run.stages=[before, rl, after]",
            f"rl.steps={STEPS}",
            "evaluate.every=4",
            "telemetry.samples_every=5",
            "telemetry.samples_groups=3",
            "telemetry.tensorboard=true",
            "telemetry.dashboard=false",
        )
        until(lambda: run.poll() is not None, "the end of the run", 500)
        assert run.returncode == 0, (folder / "run.log").read_text()[-3000:]
        (run_dir,) = (folder / "runs").iterdir()
        yield Prometheus(prometheus), run_dir, begun, time.time()


def _start_prometheus(start, folder: Path, nodes: Path, port: str) -> None:
    """With the project's own files, but the place of Ray's list and shorter intervals."""
    shutil.copy(ROOT / "cluster" / "monitoring" / "alerts.yml", folder)
    text = (ROOT / "cluster" / "monitoring" / "prometheus.yml").read_text()
    text = text.replace("/tmp/ray/prom_metrics_service_discovery.json", str(nodes))
    (folder / "prometheus.yml").write_text(text.replace("interval: 10s", "interval: 1s"))
    start(
        "prometheus",
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    )


def test_every_panel_returns_data(watched):
    prometheus, _, begun, ended = watched
    board = json.loads(files()["grafana/dashboards/rlproxi.json"])
    panels = [panel for top in board["panels"] for panel in (top["panels"] if top["type"] == "row" else [top])]
    assert len(panels) == len(CATALOGUE)
    empty = [
        target["expr"]
        for panel in panels
        for target in panel["targets"]
        if not prometheus.numbers(target["expr"].replace("$run", ".*"), begun, ended)
    ]
    assert not empty, "\n".join(empty)


def test_every_alert_could_fire_and_none_has_an_error(watched):
    prometheus, _, begun, ended = watched
    empty = [alert.name for alert in ALERTS if not prometheus.numbers(alert.expr, begun, ended)]
    assert not empty
    rules = {rule["name"]: rule for rule in prometheus.ask("rules")["groups"][0]["rules"]}
    assert set(rules) == {alert.name for alert in ALERTS}
    assert {(name, rule["health"], rule.get("lastError", "")) for name, rule in rules.items()} == {
        (name, "ok", "") for name in rules
    }


def test_what_is_scraped_is_what_was_logged(watched):
    """Gauges, counters and the histogram of the stage rl against metrics.jsonl."""
    prometheus, run_dir, begun, ended = watched
    records = [r for r in read(run_dir) if r["event"] == "metrics" and r["stage"] == "rl"]
    last = {key: value for record in records for key, value in record.items() if value is not None}
    labels = f'run="{run_dir.name}",stage="rl"'

    def newest(name: str, more: str = "") -> float:
        found = prometheus.ask("query", query=f"last_over_time({name}{{{labels}{more}}}[15m])", time=ended)
        return float(found["result"][0]["value"][1])

    for name in ("kl", "loss", "reward/mean", "bytes/weights", "seconds/train", "groups", "step", "lr"):
        assert newest(series(name)) == pytest.approx(last[name], rel=1e-6), name
    for role in ("rollout", "reward", "learner"):
        assert newest(series("idle/<role>"), f',role="{role}"') == pytest.approx(last[f"idle/{role}"], rel=1e-6)
    assert newest(series("reward/<name>"), ',name="attributes"') == pytest.approx(last["reward/attributes"], rel=1e-6)
    judged = [r for r in read(run_dir) if r["event"] == "evaluation" and r["steps"] == 4][-1]["heldout"]["judge"]
    assert newest(series("heldout/<name>"), ',name="judge"') == pytest.approx(judged["mean"], rel=1e-6)
    assert newest(series("groups/masked")) == 0 and newest(series("restarts")) == 0
    seconds = [r["seconds/step"] for r in records if "seconds/step" in r]
    assert newest(series("seconds/step") + "_count") == len(seconds) == STEPS
    # Ray puts the middle of its bucket in the place of each value.
    assert newest(series("seconds/step") + "_sum") == pytest.approx(sum(seconds), rel=0.12)
    match = {"match[]": series("step"), "start": begun, "end": ended}
    assert run_dir.name in prometheus.ask("label/run/values", **match), "the dashboard's variable"


def test_the_catalogue_knows_whatever_the_run_logged(watched):
    _, run_dir, *_ = watched
    records = read(run_dir)
    logged = {key for r in records if r["event"] == "metrics" for key in r if key not in ("time", "event", "stage")}
    assert not [name for name in logged if lookup(name) is None]
    known = {lookup(name).name for name in logged} | {
        "heldout/<name>",
        "heldout_sem/<name>",
        "evaluation/<name>",
        "diversity",
        "distance/total",
        "distance/layout",
        "distance/texture",
        "warnings",
        "alarms",
    }
    assert known | ELSEWHERE == {metric.name for metric in CATALOGUE} and not known & ELSEWHERE
    assert not [r["message"] for r in records if r["event"] == "warning"]


def test_the_timeline_agrees_with_the_log(watched):
    _, run_dir, *_ = watched
    lines = timeline.read(run_dir)
    assert [(line["stage"], line["step"]) for line in lines] == [("rl", step) for step in range(1, STEPS + 1)]
    records = {r["step"]: r for r in read(run_dir) if r["event"] == "metrics" and "seconds/step" in r}
    for before, line in itertools.pairwise(lines):
        record, spans = records[line["step"]], line["spans"]
        assert {(s.role, s.phase) for s in spans} >= {
            ("rollout", "sample"),
            ("reward", "score"),
            ("learner", "train"),
            ("learner", "wait"),
            ("learner", "sync"),
            ("weights", "sync"),
        }
        ended = records[line["step"]]["time"]
        begun = records[before["step"]]["time"]
        # One rollout actor, synchronous: nothing reaches from one iteration into the next, so the lines tell it again.
        again = timeline.idle_shares(spans, begun, ended, {"rollout": [0], "reward": ["attributes"], "learner": [0]})
        for role, share in again.items():
            assert share == pytest.approx(record[f"idle/{role}"], abs=0.05), (line["step"], role)
        train = sum(s.seconds for s in spans if (s.role, s.phase) == ("learner", "train"))
        assert train == pytest.approx(record["seconds/train"], abs=0.05)
    evaluated = [line["step"] for line in lines if any(s.role == "evaluation" for s in line["spans"])]
    assert evaluated == [5, 9], "before the iterations 4 and 8"
    saved = [line["step"] for line in lines if any(s[0] == "learner" and s[2] == "checkpoint" for s in line["spans"])]
    assert saved == [step for step in range(1, STEPS + 1) if step % 2 == 0]


def test_galleries_show_what_was_scored(watched):
    _, run_dir, *_ = watched
    told = [r for r in read(run_dir) if r["event"] == "samples"]
    assert [(r["step"], r["file"]) for r in told] == [(step, f"samples/{step:06d}.json") for step in (1, 5, 10)]
    for record in told:
        shown = json.loads((run_dir / record["file"]).read_text())
        assert shown["step"] == record["step"] and shown["version"] == record["step"] - 1 and len(shown["groups"]) == 3
        for group in shown["groups"]:
            rewards = group["rewards"]
            assert len(rewards) == 4 and rewards == group["parts"]["attributes"]
            assert rewards[group["best"]] == max(rewards) and rewards[group["worst"]] == min(rewards)
            picture = np.array(Image.open(run_dir / group["image"]))
            assert picture.shape == (16, 4 * 16, 3) and picture.std() > 1
    assert list((run_dir / "tensorboard" / "rl").glob("events.*"))
