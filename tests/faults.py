"""Faults for runs on real Ray: who is hit, when, by what, and what has to be as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import psutil
from safetensors.torch import load_file

from rlproxi.telemetry.runlog import last_step, read, series

#: Overrides of configs/smoke.yaml: short deadlines, room for requests to be made again.
PATIENT = ["telemetry.dashboard=false", "faults.hang_timeout_s=15", "rewards.timeout_s=5", "rewards.retries=8"]
#: And RL alone, for twice as long.
SETTINGS = [*PATIENT, "run.stages=[rl]", "grpo.steps=8", "evaluate.every=0"]
#: What has to be equal to the bit in a synchronous run, whatever was lost on the way.
EXACT = ("reward/mean", "reward/attributes", "loss", "grad_norm", "kl", "groups", "groups/masked", "staleness/mean")


@dataclass(frozen=True)
class Fault:
    """A ``signal`` for the process whose title matches ``role``, once ``step`` is logged.

    Ray names its processes: ray::Class while idle, ray::Class.method while at work. ``busy`` waits for the latter. ``first`` is
    done to the run's folder before.
    """

    name: str
    role: str
    signal: signal.Signals = signal.SIGKILL
    step: int = 3
    busy: bool = False
    first: Callable[[Path], None] = lambda folder: None


def cut_short(folder: Path) -> None:
    """Leaves half of the largest file of the newest checkpoint."""
    newest = max(folder.glob("checkpoints/rl/step-*"))
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


ROLLOUT, REPLICA, LEARNER = r"^ray::RolloutActor", r"^ray::ServeReplica:.*attributes", r"^ray::RayTrainWorker"
MATRIX = [
    Fault("rollout actor killed in mid-group", ROLLOUT + r"\.sample", busy=True),
    Fault("reward replica killed", REPLICA),
    Fault("learner rank killed", LEARNER),
    Fault("newest checkpoint cut short, then the learner rank killed", LEARNER, step=5, first=cut_short),
    Fault("weight owner killed", r"^ray::WeightStore"),
    Fault("conductor killed", r"^ray::Conductor"),
    Fault("scribe killed", r"^ray::Scribe"),
    Fault("Train's controller killed", r"^ray::TrainController"),
    Fault("Serve's controller killed", r"^ray::ServeController"),
    Fault("rollout actor frozen", ROLLOUT, signal.SIGSTOP),
    Fault("reward replica frozen", REPLICA, signal.SIGSTOP),
    Fault("learner rank frozen", LEARNER, signal.SIGSTOP),
    Fault("weight owner frozen", r"^ray::WeightStore", signal.SIGSTOP),
    Fault("conductor frozen", r"^ray::Conductor", signal.SIGSTOP),
]


def processes(session: int) -> list[tuple[psutil.Process, str]]:
    """(process, title) of every live process of a session: a launched run's pid, or ``os.getsid(0)``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, " ".join(process.cmdline())))
    return found


def hit(fault: Fault, session: int, timeout: float = 30.0) -> psutil.Process:
    """Sends the fault's signal to the first process that it is meant for, as soon as there is one."""
    end = time.time() + timeout
    while time.time() < end:
        for process, title in processes(session):
            if re.search(fault.role, title):
                process.send_signal(fault.signal)
                return process
        time.sleep(0.01 if fault.busy else 0.1)
    raise AssertionError(f"no process {fault.role!r} within {timeout:g} s; there are {[t for _, t in processes(session)]}")


@dataclass(frozen=True)
class Outcome:
    """What a fault cost. ``recovery``: seconds from the fault to the next step that had not been reached before it."""

    fault: str
    reached: int
    recovery: float
    resumed_from: int | None  # None: no step was done again
    restarts: int
    exact: bool
    wrong: tuple[str, ...]


def wait_for(reached: Callable[[], bool], alive: Callable[[], bool], timeout: float = 300.0) -> None:
    end = time.time() + timeout
    while not reached():
        assert alive(), "the run ended before the fault"
        assert time.time() < end, "the step to hit at was never reached"
        time.sleep(0.02)


def judge(fault: str, hit_at: float, folder: Path, unbroken: Path) -> Outcome:
    """Compares a run that a fault has hit with the one that none has: every metric of ``EXACT`` and the final weights."""
    ours, theirs = read(folder), read(unbroken)
    before = last_step([r for r in ours if r["time"] <= hit_at], "rl") or 0
    after = [r["time"] for r in ours if r["event"] == "metrics" and r["stage"] == "rl" and r["step"] > before]
    resumes = [r["step"] for r in ours if r["event"] == "resume" and r["stage"] == "rl"][1:]
    wrong = [key for key in EXACT if series(ours, "rl", key) != series(theirs, "rl", key)]
    wrong += [f"step {step} was trained twice in one life" for step in trained_twice(ours)]
    a, b = (load_file(f / "models" / "final" / "unet" / "diffusion_pytorch_model.safetensors") for f in (folder, unbroken))
    wrong += [f"weights {name}" for name in a if not a[name].equal(b[name])]
    restarts = max(r.get("restarts", 0) for r in ours if r["event"] == "metrics" and r["stage"] == "rl")
    return Outcome(fault, before, min(after) - hit_at if after else float("nan"), resumes[-1] if resumes else None,
                   int(restarts), not wrong, tuple(wrong))


def trained_twice(records: list[dict]) -> list[int]:
    """Steps that one learner has logged more than once: between two "resume" records each must be there once."""
    seen: set[int] = set()
    twice = []
    for r in records:
        if r.get("stage") != "rl":
            continue
        if r["event"] == "resume":
            seen.clear()
        elif r["event"] == "metrics":
            twice += [r["step"]] if r["step"] in seen else []
            seen.add(r["step"])
    return twice
