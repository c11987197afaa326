"""Every role is killed and frozen in the middle of a run: the run continues, and its result is the unbroken one's."""

import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from actors.rl.stops import Cause
from actors.run.driver import Stages
from actors.run.lifecycle import AttemptBegan, Lifecycle
from actors.run.log_writer import RunLogWriter
from actors.run.supervisor import Signals, Supervisor
from actors.train.jobs import RanksFailed, placement_groups, train_on_ray, wait_for_roles
from actors.train.setups import LearnerSetup
from fixtures import faults
from fixtures.faults import MATRIX, SETTINGS, Fault
from fixtures.run_processes import has_step, launch
from rlproxi.config.loading import load_config
from rlproxi.config.sections import Faults
from rlproxi.errors import RunStopped
from rlproxi.telemetry.runlog import last_step, read

pytestmark = [pytest.mark.system, pytest.mark.slow]

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@pytest.fixture(scope="module")
def unbroken(start, from_smoke) -> Path:
    """The run that nothing happens to."""
    return start(*SETTINGS, *from_smoke).folder


def only_folder(base: Path) -> Path | None:
    return next(iter(base.iterdir()), None) if base.is_dir() else None


def reached(base: Path, step: int) -> bool:
    folder = only_folder(base)
    return folder is not None and (folder / "metrics.jsonl").is_file() and has_step(folder, "rl", step)


def end_all(process: subprocess.Popen) -> None:
    """Kills whatever is left of a launched run's session."""
    for other, _ in faults.processes(process.pid):
        other.kill()


@pytest.fixture
def hit_run(from_smoke, unbroken, tmp_path):
    """hit_run(fault) -> Outcome of a run in a process and on a Ray of its own."""

    def run(fault: Fault) -> faults.Outcome:
        process = launch([SMOKE, f"run.dir={tmp_path}", *SETTINGS, *from_smoke])
        try:
            faults.wait_for(lambda: reached(tmp_path, fault.step), lambda: process.poll() is None)
            hit_at = time.time()
            fault.first(only_folder(tmp_path))
            faults.hit(fault, process.pid)
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, output[-4000:]
        finally:
            end_all(process)
        outcome = faults.judge(fault.name, hit_at, only_folder(tmp_path), unbroken)
        print(outcome)
        return outcome

    return run


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", MATRIX, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_costs_time_and_nothing_else(fault, hit_run):
    outcome = hit_run(fault)
    assert outcome.exact, outcome


@pytest.mark.exhaustive
def test_a_conductor_that_dies_while_no_rank_lives_is_missed_by_the_next(from_smoke, unbroken, tmp_path):
    """Train's controller dies, and with it the ranks; and the conductor before the new ones ask for it."""
    fault = {f.name: f for f in MATRIX}
    process = launch([SMOKE, f"run.dir={tmp_path}", *SETTINGS, *from_smoke])
    try:
        faults.wait_for(lambda: reached(tmp_path, 3), lambda: process.poll() is None)
        hit_at = time.time()
        faults.hit(fault["Train's controller killed"], process.pid)
        titles = lambda: [title for _, title in faults.processes(process.pid)]  # noqa: E731
        faults.wait_for(
            lambda: not any(re.search(faults.LEARNER, title) for title in titles()), lambda: process.poll() is None
        )
        faults.wait_for(
            lambda: any(re.search("^ray::TrainController", title) for title in titles()), lambda: process.poll() is None
        )
        faults.hit(fault["conductor killed"], process.pid)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-4000:]
    finally:
        end_all(process)
    outcome = faults.judge("conductor killed while no rank lived", hit_at, only_folder(tmp_path), unbroken)
    print(outcome)
    assert outcome.exact, outcome


@pytest.mark.exhaustive
def test_a_lost_node_is_replaced_by_the_next(from_smoke, unbroken, tmp_path):
    """Rollout, reward and learner on one node, whose power goes; another joins, as an autoscaler would have it."""
    node = {"num_cpus": 2, "resources": {"rollout": 1, "reward": 2, "learner": 1}}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        first = cluster.add_node(**node)
        cluster.wait_for_nodes()
        process = launch(
            [SMOKE, f"run.dir={tmp_path}", *SETTINGS, *from_smoke, "resources.placement=roles"],
            {**os.environ, "RAY_ADDRESS": cluster.address},
        )
        try:
            faults.wait_for(lambda: reached(tmp_path, 3), lambda: process.poll() is None)
            hit_at = time.time()
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(**node)
            output = process.communicate(timeout=400)[0]
            assert process.returncode == 0, output[-4000:]
        finally:
            end_all(process)
    finally:
        cluster.shutdown()
    outcome = faults.judge("node with rollout, reward and learner lost", hit_at, only_folder(tmp_path), unbroken)
    print(outcome)
    assert outcome.exact, outcome


@pytest.mark.exhaustive
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_fills_up_for_a_while_costs_checkpoints_alone(from_smoke, unbroken, tmp_path):
    small = tmp_path / "disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", small], check=True)
    process = launch([SMOKE, f"run.dir={small}/runs", *SETTINGS, *from_smoke, "learner.max_checkpoint_failures=1000"])
    try:
        faults.wait_for(lambda: reached(small / "runs", 3), lambda: process.poll() is None)
        hit_at, filler = time.time(), small / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 65536):  # the last one in part, and then an error
                pass
        time.sleep(2)
        filler.unlink()
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-4000:]
        outcome = faults.judge("disk full for 2 s", hit_at, only_folder(small / "runs"), unbroken)
        warned = [r["message"] for r in read(only_folder(small / "runs")) if r["event"] == "warning"]
        print(outcome, warned)
        assert outcome.exact and outcome.resumed_from is None, outcome
        assert any("step-" in message and "free" in message for message in warned), warned
    finally:
        end_all(process)
        subprocess.run(["umount", "--lazy", small], check=True)


def test_what_dies_is_replaced_and_two_rollout_actors_do_what_one_does(start, from_smoke, smoke, tmp_path):
    """On the session's Ray: a rollout actor dies after one step, a reward replica and the conductor later."""
    when, base = [], tmp_path / "runs"

    def strike() -> None:
        for step, role in ((1, faults.ROLLOUT), (2, "^ray::ServeReplica:{run}-attributes"), (3, "^ray::Conductor")):
            faults.wait_for(lambda: reached(base, step), lambda: True)
            when.append(time.time())
            # An earlier run's replicas may still be about to go.
            faults.hit(Fault("", role.format(run=only_folder(base).name)), os.getsid(0))

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    run = start(
        *faults.PATIENT,
        *from_smoke,
        "run.stages=[before, rl, after]",
        "resources.rollout_actors=2",
        "evaluate.every=0",
        base=base,
    )
    thread.join(1)
    outcome = faults.judge("all three", when[0], run.folder, smoke.folder)
    assert outcome.exact and outcome.reached >= 1 and len(when) == 3, outcome
    assert outcome.resumed_from is not None, "a new conductor begins at the last checkpoint"
    for tag in ("before", "after"):
        files = sorted(p.name for p in (smoke.folder / "samples").glob(f"{tag}-*.npz"))
        assert files
        for name in files:
            one, two = (np.load(folder / "samples" / name) for folder in (smoke.folder, run.folder))
            assert np.array_equal(one["images"], two["images"]) and np.array_equal(one["heldout"], two["heldout"])


def test_a_run_that_is_asked_to_end_saves_what_it_has(rl_alone, smoke, ray_session, tmp_path):
    """SIGTERM, as a scheduler or a cloud sends it: the run ends after the current iteration, and resumes from there."""
    environment = {**os.environ, "RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    process = launch([SMOKE, f"run.dir={tmp_path}", *faults.PATIENT, *rl_alone, "rl.checkpoint_every=100"], environment)
    faults.wait_for(lambda: reached(tmp_path, 1), lambda: process.poll() is None)
    asked = time.time()
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    seconds = time.time() - asked
    assert process.returncode == 1 and "asked to end by SIGTERM; go on with --resume" in output, output[-3000:]
    folder = only_folder(tmp_path)
    done = last_step(read(folder), "rl")
    saved = sorted((folder / "checkpoints" / "rl").iterdir())
    assert [path.name for path in saved] == [f"step-{done:06d}"], "every finished step is saved"
    print(f"ended {seconds:.1f} s after SIGTERM with step {done}")

    assert done < 4, "there is something left to do"
    again = launch(["--resume", str(folder), "rl.checkpoint_every=2"], environment)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output[-3000:]
    outcome = faults.judge("SIGTERM", asked, folder, smoke.folder)
    assert outcome.exact and outcome.resumed_from == done, outcome


def test_what_fails_again_and_again_ends_the_run_unless_it_comes_further(ray_session, tmp_path, capsys):
    ray = ray_session
    config = load_config(SMOKE, ["faults.max_restarts=2", "learner.max_failures=3"])
    log = RunLogWriter.remote(str(tmp_path))

    def until_done(*attempts):
        return Stages(config, tmp_path, log).until_done("rl", failing(*attempts))

    def failing(*attempts):
        """Work whose attempts log up to a step each and then end in an error; the next returns."""
        left = iter(attempts)

        def work():
            step, error = next(left, (0, None))
            if error is None:
                return "done"
            ray.get(log.append.remote("metrics", {"stage": "rl", "step": step}))
            if isinstance(error, RunStopped):
                ray.get(log.stop.remote(str(error), Cause.LOST))
            raise error

        return work

    ranks, lost = RanksFailed("[Rank 0]\n  File x.py\nValueError: boom\n"), RunStopped("the weight store is lost")
    assert until_done((3, ranks), (4, ranks), (6, ranks)) == "done"
    assert until_done((4, lost), (5, lost), (7, lost), (6, lost)) == "done"
    with pytest.raises(RunStopped, match=r"^the weight store is lost$"):
        until_done((6, lost), (7, lost), (7, lost))
    assert ray.get(log.stop_state.remote()).cause is Cause.LOST
    ray.get(log.clear_stop.remote())
    with pytest.raises(
        RunStopped, match=r"rl: the learner failed \(ValueError: boom\) in 4 attempts without a new step after 8"
    ):
        until_done((8, ranks), (8, ranks))
    assert "File x.py" in capsys.readouterr().err, "the traceback is shown"
    ray.kill(log)


def lifecycle(hang_timeout_s: float) -> Lifecycle:
    """That of a run in its stage rl."""
    run = Lifecycle(Faults(hang_timeout_s=hang_timeout_s), max_failures=3)
    run.handle(AttemptBegan("rl"))
    return run


def test_a_role_that_does_not_answer_is_killed_and_the_stage_stopped(ray_session, tmp_path):
    ray = ray_session

    @ray.remote(num_cpus=0)
    class Deaf:
        def alive(self):
            time.sleep(600)

    @ray.remote(num_cpus=0)
    class Well:
        def alive(self):
            return True

    log, deaf, well = RunLogWriter.remote(str(tmp_path)), Deaf.remote(), Well.remote()
    ray.get(well.alive.remote())

    def work() -> None:  # as a learner: what it waits for fails once the role is dead
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(deaf.alive.remote())

    with pytest.raises(RunStopped, match="the weight store has not answered for 1.5 s"):
        supervisor = Supervisor(log, {"weight store": deaf, "other": well}, lifecycle(1.5), Signals(1))
        supervisor.watch(work)
    assert ray.get(log.stop_state.remote()).cause is Cause.LOST and ray.get(well.alive.remote())
    for actor in (log, well):
        ray.kill(actor)


def test_a_role_that_has_stopped_and_nobody_knows_why_is_replaced(ray_session, tmp_path):
    ray = ray_session

    @ray.remote(num_cpus=0)
    class Stopped:
        def alive(self):
            return False

    @ray.remote(num_cpus=0)
    class New:
        def alive(self):
            return True

    log, old, new = RunLogWriter.remote(str(tmp_path)), Stopped.remote(), New.remote()
    replaced = threading.Event()

    def replace(reason: str) -> dict:
        assert reason == "the conductor has stopped, and its reason was lost with the log's writer"
        ray.get(log.clear_stop.remote())
        replaced.set()
        return {"conductor": new}

    supervisor = Supervisor(log, {"conductor": old}, lifecycle(60), Signals(1), replace)
    assert supervisor.watch(lambda: replaced.wait(60)) is True
    for actor in (log, old, new):
        ray.kill(actor)


def test_ranks_that_find_no_conductor_and_no_word_of_its_loss_tell_the_driver(ray_session, tmp_path):
    ray = ray_session

    @ray.remote(num_cpus=0)
    class Role:
        def alive(self):
            return True

        open = alive

    log, names = RunLogWriter.remote(str(tmp_path)), ("a conductor", "some weights")
    setup = LearnerSetup(None, str(tmp_path), "", names, log)
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(wait_for_roles, setup, reports=rank == 0) for rank in range(2)]
        deadline = time.time() + 30
        while ray.get(log.stop_state.remote()) is None and time.time() < deadline:
            time.sleep(0.1)
        stop = ray.get(log.stop_state.remote())
        assert "is lost (Failed to look up actor" in stop.reason
        assert stop.cause is Cause.LOST and not any(rank.done() for rank in ranks)
        roles = [Role.options(name=name).remote() for name in names]  # as the driver does, and last:
        ray.get(log.clear_stop.remote())
        assert [rank.result(30) for rank in ranks] == [tuple(roles)] * 2
        ray.get(log.stop.remote("enough"))
        ray.kill(roles[0])
        assert wait_for_roles(setup, reports=True) is None
    for actor in (log, roles[1]):
        ray.kill(actor)


def test_the_place_of_ranks_whose_controller_was_killed_is_free_again(ray_session, tmp_path, monkeypatch):
    """Else each lost controller holds its ranks' CPUs for as long as the run lasts."""
    import ray
    import ray.train.torch

    @ray.remote(num_cpus=0)
    class Controller:
        def start(self) -> None:
            self.group = ray.util.placement_group([{"CPU": 0.25}])
            ray.get(self.group.ready())

    mine = ray.util.placement_group([{"CPU": 0.25}])  # somebody else's, there before
    ray.get(mine.ready())
    before = placement_groups()
    left: set[str] = set()

    class Trainer:
        def __init__(self, *_, **__):
            pass

        def fit(self) -> None:
            controller = Controller.remote()
            ray.get(controller.start.remote())
            ray.kill(controller)
            time.sleep(1)
            left.update(placement_groups() - before)
            ray.get(controller.start.remote())  # as the driver's wait for it: the actor has died

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    with pytest.raises(ray.exceptions.RayActorError):
        train_on_ray(lambda: None, load_config(SMOKE), str(tmp_path), "learner")
    assert len(left) == 1, "this version of Ray frees it by itself"
    deadline = time.time() + 30
    while placement_groups() != before and time.time() < deadline:
        time.sleep(0.1)
    assert placement_groups() == before and mine.id.hex() in before
    ray.util.remove_placement_group(mine)
