"""Ray's own autoscaler on fake nodes: a head that offers nothing grows what each role needs, and shrinks to nothing."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.own_ray import ROOT, SMALL, OwnRay
from rlproxi.telemetry.runlog import read

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.exhaustive]  # minutes on a Ray of its own

IDLE_S = 45  # longer than a busy machine takes from a node to the actor on it
HEAD = "ray.head.default"  # the name by which the provider of fake nodes knows the head it did not start
ROLES = ("rollout", "reward", "learner")


def autoscaling() -> dict:
    """A head without CPUs and a group for each role, as in the files of cluster/, but on this machine."""
    group = {"node_config": {}, "min_workers": 0, "max_workers": 2}
    types = {role: {**group, "resources": {"CPU": 2, role: 1, "object_store_memory": 200_000_000}} for role in ROLES}
    return {
        "cluster_name": "fake",
        "max_workers": 6,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **types},
        "head_node_type": HEAD,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


WATCH = """
import json, sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
while True:
    kinds = ("CPU", "rollout", "reward", "learner")
    rows = [{"id": n["NodeID"], **{k: v for k, v in n["Resources"].items() if k in kinds}}
            for n in ray.nodes() if n["Alive"]]
    print(json.dumps([time.time(), rows]), flush=True)
    time.sleep(1)
"""

ACTORS = """
import json, ray
from ray.util.state import list_actors
ray.init(logging_level="ERROR", log_to_driver=False)
print(json.dumps([[a.class_name, a.node_id] for a in list_actors(limit=1000) if a.state == "ALIVE"]))
"""


def test_a_run_grows_its_cluster_from_nothing_and_gives_it_back(tmp_path):
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    seen: list[tuple[float, list[dict]]] = []
    with OwnRay("--num-cpus=0", environment=fake, autoscaling=autoscaling()) as own:
        watching = tmp_path / "nodes.jsonl"

        def look() -> list[dict]:
            lines = watching.read_text().splitlines() if watching.is_file() else []
            seen[:] = [(at, rows) for at, rows in map(json.loads, lines)]
            return seen[-1][1] if seen else []

        with open(watching, "w") as out:
            watcher = subprocess.Popen([sys.executable, "-c", WATCH], env=own.clients, cwd=ROOT, stdout=out)
        try:
            own.wait_for(lambda: len(look()) == 1, 180)
            assert not any(role in look()[0] for role in ROLES) and not look()[0].get("CPU")
            run = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "rlproxi.run",
                    str(ROOT / "configs" / "smoke.yaml"),
                    f"run.dir={tmp_path}/runs",
                    "resources.autoscaling=true",
                    "resources.placement=roles",
                    "resources.autoscaling_timeout_s=300",
                    *SMALL,
                ],
                env=own.clients,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            placed: dict[str, str] = {}

            def rollouts_run() -> bool:
                told = any(
                    r["event"] == "stage" and r["name"] == "rl"
                    for d in Path(tmp_path, "runs").glob("*")
                    for r in read(d)
                )
                return told or run.poll() is not None

            own.wait_for(rollouts_run, 400)
            if run.poll() is None:
                answer = own.python(ACTORS)
                assert answer.returncode == 0, answer.stderr[-2000:]
                placed = dict(json.loads(answer.stdout.splitlines()[-1]))
            output = run.communicate(timeout=400)[0]
            assert run.returncode == 0, output[-3000:]
            ended = time.time()
            own.wait_for(lambda: len(look()) == 1, 240)
            kinds = {row["id"]: role for _, rows in seen for row in rows for role in ROLES if role in row}
            print(f"back to the head alone {time.time() - ended:.0f} s after the run")
        finally:
            watcher.kill()
            watcher.wait()

    assert re.search(r"waiting for 1 (learner ranks|classifiers) \(", output) and "ready for" in output
    assert set(kinds.values()) == set(ROLES), "a group of each role was started"
    assert kinds[placed["RolloutActor"]] == "rollout"
    assert kinds[placed["ServeReplica:" + next(n for n in placed if n.startswith("ServeReplica:"))[13:]]] == "reward"
    away = {
        name: kinds[node]
        for name, node in placed.items()
        if name in ("Conductor", "RunLogWriter", "WeightStore") and node in kinds
    }
    assert not away, "what a run cannot do without stays on the driver's node"
    assert max(len(rows) for _, rows in seen) <= 7
    (folder,) = Path(tmp_path, "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["heldout"]["after"] is not None
