"""Every role killed and frozen in the middle of a run: the run goes on by itself, and its result is the unbroken one's."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import faults
from faults import MATRIX, SETTINGS, Fault
from actors.scribe import Scribe
from actors.stops import LOST
from actors.watch import Leaving, Watch
from rlproxi.schema import RunStopped
from rlproxi.telemetry.runlog import last_step, read
from run_processes import has_step, launch

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


@pytest.fixture
def hit_run(from_smoke, unbroken, tmp_path):
    """hit_run(fault) -> Outcome of a run in a process and on a Ray of its own."""
    def run(fault: Fault) -> faults.Outcome:
        process = launch([SMOKE, f"run.dir={tmp_path}", *SETTINGS, *from_smoke])
        try:
            faults.wait_for(lambda: reached(tmp_path, fault.step), lambda: process.poll() is None)
            hit_at = time.time()
            faults.hit(fault, process.pid)
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, output[-4000:]
        finally:
            for other, _ in faults.processes(process.pid):
                other.kill()
        outcome = faults.judge(fault.name, hit_at, only_folder(tmp_path), unbroken)
        print(outcome)
        return outcome
    return run


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", MATRIX, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_costs_time_and_nothing_else(fault, hit_run):
    outcome = hit_run(fault)
    assert outcome.exact, outcome


def test_what_dies_is_replaced(start, from_smoke, unbroken, tmp_path):
    """On the session's Ray: the conductor in one step, a rollout actor in a later one."""
    when, base = [], tmp_path / "runs"

    def strike() -> None:
        for step, role in ((3, "^ray::Conductor"), (6, "^ray::RolloutActor")):
            faults.wait_for(lambda: reached(base, step), lambda: True)
            when.append(time.time())
            faults.hit(Fault("", role), os.getsid(0))

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    run = start(*SETTINGS, *from_smoke, base=base)
    thread.join(1)
    outcome = faults.judge("both", when[0], run.folder, unbroken)
    assert outcome.exact and outcome.reached >= 3 and len(when) == 2, outcome
    assert outcome.resumed_from is not None, "a new conductor begins at the last checkpoint"


def test_a_run_that_is_asked_to_end_saves_what_it_has(from_smoke, unbroken, tmp_path):
    """SIGTERM, as a scheduler or a cloud sends it: the run ends after the iteration under way, and goes on from there."""
    process = launch([SMOKE, f"run.dir={tmp_path}", *SETTINGS, *from_smoke, "grpo.checkpoint_every=100"])
    faults.wait_for(lambda: reached(tmp_path, 3), lambda: process.poll() is None)
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

    again = launch(["--resume", str(folder), "grpo.checkpoint_every=2"])
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output[-3000:]
    outcome = faults.judge("SIGTERM", asked, folder, unbroken)
    assert outcome.exact and outcome.resumed_from == done, outcome


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

    scribe, deaf, well = Scribe.remote(str(tmp_path)), Deaf.remote(), Well.remote()
    ray.get(well.alive.remote())

    def work() -> None:  # as a learner: what it waits for fails once the role is dead
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(deaf.alive.remote())

    with pytest.raises(RunStopped, match="the weight store has not answered for 1.5 s"):
        Watch(scribe, {"weight store": deaf, "other": well}, 1.5, Leaving(1)).over(work)
    assert ray.get(scribe.stop_kind.remote()) == LOST and ray.get(well.alive.remote())
    for actor in (scribe, well):
        ray.kill(actor)
