"""The smoke loop for half an hour while its processes are killed at random: the figures of docs/reliability.md.

    PYTHONPATH=.:tests python tests/studies/soak.py --out FOLDER [--minutes 30] [--every 20] [--seed 0] \\
        [--compare STEPS] [--plot FILE.png]

Every ``--every`` seconds one process of the run, of a role drawn by the odds of ``VICTIMS``, gets SIGKILL. Meanwhile
each process's own memory (USS) is noted. At the end the run is asked to end by SIGTERM; then the same run is made with
nobody killed, as far as the first one came or for STEPS, and every metric of those steps is compared to the bit.
--every 0 kills nobody.

FOLDER/soak.json holds what the figures are made of. Ends with 1 where a group was lost, doubled or came out otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from fixtures import faults
from fixtures.run_processes import launch
from rlproxi.telemetry.runlog import read, series

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
#: Role -> (the title of its processes, the odds that it is drawn). A cluster has many actors and replicas, and one of
#: each of the others; what the others cost to replace is longer than 20 s on two cores, and with even odds a run hardly
#: moves.
VICTIMS = {
    "rollout actor": (faults.ROLLOUT, 8),
    "reward replica": (faults.REPLICA, 8),
    "learner rank": (faults.LEARNER, 1),
    "weight owner": (r"^ray::WeightStore", 1),
    "conductor": (r"^ray::Conductor", 1),
    "log writer": (r"^ray::RunLogWriter", 1),
    "Train's controller": (r"^ray::TrainController", 1),
    "Serve's controller": (r"^ray::ServeController", 1),
}
#: Whose memory is drawn as well, though nobody kills them.
OTHERS = {"driver": r"rlproxi\.run", "raylet": r"raylet/raylet", "Ray's control store": r"gcs_server"}
SETTINGS = [
    "run.stages=[rl]",
    "rl.steps=1000000",
    "rl.checkpoint_every=2",
    "evaluate.every=0",
    "telemetry.dashboard=false",
    "resources.rollout_actors=2",
    "rewards.replicas=2",
    "faults.hang_timeout_s=30",
    "faults.max_restarts=1000",
    "learner.max_failures=1000",
    "rewards.timeout_s=10",
    "rewards.retries=20",
]


def role_of(title: str) -> str | None:
    patterns = {**{role: pattern for role, (pattern, _) in VICTIMS.items()}, **OTHERS}
    return next((role for role, pattern in patterns.items() if re.search(pattern, title)), None)


def memory(session: int) -> dict[str, list[float]]:
    """Role -> MiB that each of its processes has to itself."""
    found: dict[str, list[float]] = {}
    for process, title in faults.processes(session):
        with contextlib.suppress(psutil.Error):
            if role := role_of(title):
                found.setdefault(role, []).append(process.memory_full_info().uss / 2**20)
    return found


def strike(session: int, draw: random.Random) -> str | None:
    """Kills a process of those that there are; its role, None where there is none."""
    there: dict[str, list[psutil.Process]] = {}
    for process, title in faults.processes(session):
        if (role := role_of(title)) in VICTIMS:
            there.setdefault(role, []).append(process)
    if not there:
        return None
    role = draw.choices(list(there), [VICTIMS[role][1] for role in there])[0]
    with contextlib.suppress(psutil.Error):
        draw.choice(there[role]).kill()
    return role


class Run:
    """A run in a process and on a Ray of its own; its output goes to a file beside it."""

    def __init__(self, base: Path, start: list[str]):
        self.base, self.said = base, base.with_suffix(".log")
        self.process = launch([SMOKE, f"run.dir={base}", *SETTINGS, *start])
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        with open(self.said, "w") as file:
            for line in self.process.stdout:
                file.write(line)

    @property
    def folder(self) -> Path | None:
        return next(iter(self.base.iterdir()), None) if self.base.is_dir() else None

    def records(self) -> list[dict]:
        return read(self.folder) if self.folder else []

    def furthest(self) -> int:
        return max((r["step"] for r in self.records() if r["event"] == "metrics" and r["stage"] == "rl"), default=0)

    def wait_for(self, step: int, timeout: float) -> None:
        faults.wait_for(
            lambda: (time.sleep(1), self.furthest() >= step)[1], lambda: self.process.poll() is None, timeout
        )

    def end(self) -> int:
        """Asks it to end; its exit code (1: asked to end)."""
        os.kill(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(300)
        finally:
            for process, _ in faults.processes(self.process.pid):
                process.kill()


def starting_model(out: Path) -> list[str]:
    """Overrides that begin RL from models of the smoke config, made where there are none."""
    base = out / "start"
    if not base.is_dir():
        process = launch([SMOKE, f"run.dir={base}", "run.stages=[prepare,pretrain]", "telemetry.dashboard=false"])
        said = process.communicate()[0]
        assert process.returncode == 0, said[-3000:]
    models = next(base.iterdir()) / "models"
    return [
        f"model.init={models / 'pretrained'}",
        f"rewards.train=[{{name: attributes, params: {{path: {models / 'reward.safetensors'}}}}}]",
        "rewards.heldout=[]",
    ]


def soak(run: Run, seconds: float, every: float, seed: int) -> tuple[list[tuple[float, str]], list[tuple[float, dict]]]:
    """(kills: (time, role)), (memory: (time, role -> MiB of each process)), in seconds since the first step."""
    draw, begun, kills, used = random.Random(seed), time.time(), [], []
    next_kill, next_look = begun + (every or 1e9), begun
    while time.time() < begun + seconds:
        time.sleep(0.2)
        assert run.process.poll() is None, f"the run ended by itself; {run.said} says why"
        now = time.time()
        if now >= next_look:
            used.append((now - begun, memory(run.process.pid)))
            next_look = now + 5
        if now >= next_kill and now < begun + seconds - every:
            role = strike(run.process.pid, draw)
            if role:
                kills.append((now - begun, role))
                print(f"{now - begun:6.0f} s  step {run.furthest():5d}  killed: {role}", flush=True)
            next_kill += every
    return kills, used


def progress(records: list[dict], begun: float) -> list[tuple[float, int]]:
    """(seconds, step) whenever a step was reached that had not been reached before."""
    found, furthest = [], 0
    for r in records:
        if r["event"] == "metrics" and r["stage"] == "rl" and r["step"] > furthest:
            furthest = r["step"]
            found.append((r["time"] - begun, furthest))
    return found


def compared(ours: list[dict], theirs: list[dict]) -> tuple[int, list[str]]:
    """(last step that both have, what differs from the unbroken run up to it, what is missing or masked after it)."""
    end = max(series(ours, "rl", "loss")[0])
    last = min(end, max(series(theirs, "rl", "loss")[0]))
    masked = dict(zip(*series(ours, "rl", "groups/masked")))
    wrong = [f"step {step} was trained twice in one life" for step in faults.trained_twice(ours)]
    wrong += [
        f"step {step}: {'not there' if step not in masked else 'groups were masked'}"
        for step in range(last + 1, end + 1)
        if masked.get(step) != 0
    ]
    for key in faults.EXACT:
        a, b = (dict(zip(*series(records, "rl", key))) for records in (ours, theirs))
        wrong += [
            f"{key} of step {step}: {a.get(step)} and {b.get(step)}"
            for step in range(1, last + 1)
            if a.get(step) is None or a.get(step) != b.get(step)
        ]
    return last, wrong


def growth(used: list[tuple[float, dict]], role: str) -> tuple[float, float]:
    """(median MiB of a role's largest process in the second fifth of the time, in the last fifth)."""
    told = [(at, max(found[role])) for at, found in used if found.get(role)]
    end = max(at for at, _ in used)
    return tuple(
        statistics.median([size for at, size in told if low * end <= at <= high * end] or [float("nan")])
        for low, high in ((0.2, 0.4), (0.8, 1.0))
    )


def plot(told: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(1, 1.6))
    top.step(
        [at / 60 for at, _ in told["progress"]], [step for _, step in told["progress"]], where="post", color="black"
    )
    top.set_ylabel("step reached")
    colours = dict(zip([*VICTIMS, *OTHERS], pyplot.get_cmap("tab20").colors))
    for at, role in told["kills"]:
        top.axvline(at / 60, color=colours[role], linewidth=1, alpha=0.6)
    for role, colour in colours.items():
        points = [(at / 60, sum(found[role]) / len(found[role])) for at, found in told["memory"] if found.get(role)]
        bottom.plot(*zip(*points), ".", markersize=3, color=colour, label=role) if points else None
    bottom.set(
        xlabel="minutes; lines above: kills, in the colour of who was killed",
        ylabel="MiB of a process's own",
        ylim=(0, None),
    )
    bottom.legend(fontsize=8, ncol=2, markerscale=3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=int, default=10**9)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = starting_model(options.out)
    run = Run(options.out / f"broken-{int(time.time())}", start)
    run.wait_for(1, 300)
    begun = time.time()
    kills, used = soak(run, 60 * options.minutes, options.every, options.seed)
    code = run.end()
    records = run.records()
    steps = progress([r for r in records if r["time"] >= begun], begun)
    still = [b[0] - a[0] for a, b in zip([(0.0, 0), *steps], steps)]
    print(
        f"asked to end: exit code {code}; step {run.furthest()} after {len(kills)} kills "
        f"{dict(Counter(r for _, r in kills))}; "
        f"longest without a new step {max(still):.0f} s",
        flush=True,
    )

    told = {"kills": kills, "memory": used, "progress": steps, "exit": code}
    (options.out / "soak.json").write_text(json.dumps(told))  # half an hour's work, whatever becomes of the comparison
    if options.plot:
        plot(told, options.plot)
    unbroken = Run(options.out / f"unbroken-{int(time.time())}", start)
    unbroken.wait_for(min(run.furthest(), options.compare), 3600)
    unbroken.end()
    last, wrong = compared(records, unbroken.records())
    speed = [statistics.median(series(r, "rl", "seconds/step")[1]) for r in (records, unbroken.records())]
    (options.out / "soak.json").write_text(json.dumps({**told, "wrong": wrong, "seconds_per_step": speed}))
    for role in [*VICTIMS, *OTHERS]:
        print(f"{role:<20} {growth(used, role)[0]:7.0f} MiB -> {growth(used, role)[1]:7.0f} MiB")
    print(f"median seconds of a step: {speed[0]:.2f}, unbroken {speed[1]:.2f}")
    print(
        "\n".join(wrong[:20])
        or f"{run.furthest()} steps, no group lost, masked or trained twice; "
        f"every metric of the first {last} as in the unbroken run, to the bit"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
