"""`ray job submit` to a head with token authentication: a job runs, streams, can be stopped, cleans up, and resumes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.own_ray import RAY, ROOT, SMALL, OwnRay, clean_environment
from fixtures.run_processes import has_step
from rlproxi.telemetry.runlog import last_step, read

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.exhaustive]  # minutes on a Ray of its own

ACTORS = """
import json, ray
from ray.util.state import list_actors
ray.init(logging_level="ERROR", log_to_driver=False)
print(json.dumps([a.class_name for a in list_actors(limit=1000) if a.state not in ("DEAD",)]))
"""
#: What Ray itself keeps on a cluster: Serve's controller, Train's and Data's bookkeeping, a job's supervisor.
RAYS_OWN = re.compile(
    r"ServeController|JobSupervisor|AutoscalingCoordinator|StatsActor|StateActor|_StatsActor|ProxyActor"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home folder with a token, as `ray get-auth-token --generate` makes it."""
    folder = tmp_path_factory.mktemp("home")
    made = subprocess.run(
        [RAY, "get-auth-token", "--generate"],
        env=clean_environment(HOME=str(folder)),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    assert (folder / ".ray" / "auth_token").read_text().strip() == made.stdout.strip().splitlines()[-1]
    return folder


@pytest.fixture(scope="module")
def own(home):
    with OwnRay("--num-cpus=6", environment={"HOME": str(home), "RAY_AUTH_MODE": "token"}) as ray:
        yield ray


def job(own: OwnRay, *arguments: str, wait: bool = True, **environment: str):
    """`ray job ...` in the checkout, as a user types it. With ``wait``: what it printed, and its exit status."""
    command = [RAY, "job", *arguments]
    variables = {**own.environment, "RAY_API_SERVER_ADDRESS": own.dashboard, **environment}
    if not wait:
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    done = subprocess.run(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500
    )
    return done.returncode, done.stdout


def left_behind(own: OwnRay) -> list[str]:
    answer = own.python(ACTORS)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return [name for name in json.loads(answer.stdout.splitlines()[-1]) if not RAYS_OWN.search(name)]


def submit(*arguments: str) -> list[str]:
    return ["submit", "--working-dir", ".", "--", "python", "-m", "rlproxi.run", *arguments]


def test_a_missing_and_a_wrong_token_are_refused_in_words_that_the_docs_answer(own, tmp_path):
    wrong = [
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "0" * 32}, "Invalid authentication token"),
        ({"HOME": str(tmp_path)}, "Ray couldn't find an authentication token"),
    ]
    docs = (ROOT / "docs" / "cluster.md").read_text()
    for variables, words in wrong:
        code, said = job(own, "list", **variables)
        assert code != 0 and words in said and words in docs, said[-2000:]
    code, said = job(own, "list")
    assert code == 0, said[-2000:]
    # A run that is started by hand is told as well, before anything else.
    direct = subprocess.run(
        [sys.executable, "-m", "rlproxi.run", "configs/smoke.yaml", f"run.dir={tmp_path}"],
        cwd=ROOT,
        text=True,
        env={
            **own.clients,
            "RAY_AUTH_MODE": "disabled",
            "RAY_gcs_rpc_server_connect_timeout_s": "2",
            "RAY_gcs_server_request_timeout_seconds": "5",
        },
        capture_output=True,
        timeout=200,
    )
    assert direct.returncode == 2 and "RAY_AUTH_MODE" in direct.stderr, direct.stderr[-2000:]


def test_a_job_runs_to_its_end_and_its_logs_stream(own, tmp_path):
    process = job(own, *submit("configs/smoke.yaml", f"run.dir={tmp_path}", *SMALL), wait=False)
    arrived: list[tuple[float, str]] = []
    uploaded: list[Path] = []
    for line in process.stdout:
        arrived.append((time.time(), line))
        if "run directory" in line:  # while the job runs its files are on the node
            uploaded = [
                file
                for file in own.folder.glob("session_2*/runtime_resources/working_dir_files/*/**/*")
                if file.is_file()
            ]
    assert process.wait() == 0, "".join(line for _, line in arrived)[-3000:]
    text = "".join(line for _, line in arrived)
    assert "succeeded" in text and "run directory" in text
    assert "Dataset" not in text and "Progress bars" not in text, "Ray Data's own words break into ours"
    assert any(file.name == "smoke.yaml" for file in uploaded)
    assert sum(file.stat().st_size for file in uploaded) < 5 << 20, (
        "the code, not runs, history or pictures (.rayignore)"
    )
    first = next(at for at, line in arrived if "run directory" in line)
    assert arrived[-1][0] - first > 5, "lines came while the job ran, not at its end"
    (folder,) = tmp_path.iterdir()
    assert (folder / "summary.json").is_file() and last_step(read(folder), "rl") == 4
    assert left_behind(own) == []


def test_a_stopped_job_leaves_a_run_to_resume_and_no_actors(own, tmp_path):
    settings = ["configs/smoke.yaml", f"run.dir={tmp_path}", *SMALL, "rl.steps=40", "rl.checkpoint_every=2"]
    process = job(own, *submit(*settings), wait=False)
    ident, output = None, []
    for line in process.stdout:
        output.append(line)
        found = re.search(r"(raysubmit_\w+)", line)
        ident = ident or (found and found[1])
        if "run directory" in line:
            break
    assert ident, "".join(output)
    folder = next(tmp_path.iterdir())
    own.wait_for(lambda: has_step(folder, "rl", 3) or process.poll() is not None, 300)
    assert process.poll() is None, process.stdout.read()[-3000:]
    code, said = job(own, "stop", ident)
    assert code == 0, said
    process.kill()
    process.wait()
    own.wait_for(lambda: left_behind(own) == [], 30)
    reached = last_step(read(folder), "rl")
    assert 3 <= reached < 40

    code, said = job(own, *submit("--resume", str(folder), f"rl.steps={reached + 2}"))
    assert code == 0, said[-3000:]
    assert last_step(read(folder), "rl") == reached + 2 and (folder / "summary.json").is_file()
    resumed = [r["step"] for r in read(folder) if r["event"] == "resume" and r.get("stage") == "rl"]
    assert resumed[0] == 0 and 2 <= resumed[-1] <= reached, "from its last checkpoint, not from the start"
    assert left_behind(own) == []


def test_a_killed_driver_leaves_no_replicas(own, tmp_path):
    """SIGKILL, as for a driver that is out of memory: only the cleanup actor is left to clear up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlproxi.run", "configs/smoke.yaml", f"run.dir={tmp_path}", *SMALL, "rl.steps=40"],
        cwd=ROOT,
        env=own.clients,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    own.wait_for(lambda: any(has_step(d, "rl", 1) for d in tmp_path.iterdir()) or process.poll() is not None, 300)
    assert process.poll() is None and any("RewardReplica" in name for name in left_behind(own))
    process.kill()
    process.wait()
    own.wait_for(lambda: left_behind(own) == [], 40)


def test_a_run_that_is_placed_where_no_node_is_meant_for_it_is_refused(own, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "rlproxi.run", "configs/smoke.yaml", f"run.dir={tmp_path}", "resources.placement=roles"],
        cwd=ROOT,
        env=own.clients,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert process.returncode == 2
    assert "no node of the cluster offers it" in process.stderr and "resources.placement=any" in process.stderr


def test_the_doctor_asks_the_nodes_of_a_running_cluster(own, tmp_path):
    doctor = (
        "from rlproxi.cli.main import main; "
        f"main(['doctor', 'configs/smoke.yaml', 'run.dir={tmp_path}/shared', '--address', '{own.address}'])"
    )
    answer = own.python(doctor, timeout=200)
    assert answer.returncode == 0, answer.stderr[-2000:]
    lines = answer.stdout.splitlines()
    assert any(line.startswith("ok    node") and "(head)" in line and "6 CPU" in line for line in lines), answer.stdout
    assert any("no autoscaler reports itself" in line for line in lines)
    assert any(line.startswith("ok    cluster     rollout: 1 rollout actors (0.25 CPU each): fits") for line in lines)
    assert list(tmp_path.iterdir()) == [], "the folder it looked through is as it was"
