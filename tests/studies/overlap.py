"""Asynchronous against synchronous at equal reward: the figures of docs/asynchronous.md.

    PYTHONPATH=.:tests python tests/studies/overlap.py --run RUN_DIR --out FOLDER [--steps 50] [--seeds 0 1]
    PYTHONPATH=.:tests python tests/studies/overlap.py --out FOLDER --table [--plot FILE.png]

RUN_DIR is a finished quickstart run, whose starting policy and classifiers are used. Each arm is GRPO of the quickstart
on a Ray of its own:

- ``own``: one rollout actor and one learner rank of one thread each, as on a cluster where each role has devices of its
  own;
- ``shared``: two of each on the same two cores, as the quickstart has it: all roles want all of the machine.

Both with ``max_staleness`` 0 and 1, otherwise equal. Told of each: seconds of an iteration, images/s, the idle share of
each role (from the run's timeline), the training reward over the last tenth of the iterations, and how long it took
until the mean reward of ten iterations reached what the slower learner of the pair reached at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from fixtures.run_processes import ROOT
from rlproxi.telemetry.runlog import read, series

SPLITS = {"own": 1, "shared": 2}
WINDOW = 10


def run_arm(source: Path, out: Path, split: str, staleness: int, seed: int, steps: int) -> None:
    base = out / f"{split}-{staleness}-{seed}"
    if base.is_dir():
        return
    models, n = source / "models", SPLITS[split]
    draft = base.with_name(f".{base.name}")
    arguments = [
        str(ROOT / "configs" / "quickstart.yaml"),
        f"run.dir={draft}",
        "run.stages=[rl]",
        f"run.seed={seed}",
        f"model.init={models / 'pretrained'}",
        "rewards.heldout=[]",
        "telemetry.dashboard=false",
        "evaluate.every=0",
        f"rewards.train=[{{name: attributes, params: {{path: {models / 'reward.safetensors'}}}}}]",
        f"rl.steps={steps}",
        "rl.decay_from=1.0",
        f"rl.max_staleness={staleness}",
        f"rl.checkpoint_every={steps}",
        f"resources.rollout_actors={n}",
        f"resources.learner_workers={n}",
    ]
    print(f"{base.name}: ", end="", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "rlproxi.run", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    draft.rename(base)
    print(told(base), flush=True)


def told(base: Path) -> dict:
    """What is told of an arm. Times begin with the first dispatch; the first two iterations are left out of medians."""
    records = read(next(base.iterdir()))
    rl = [r for r in records if r["event"] == "metrics" and r["stage"] == "rl" and "seconds/step" in r]
    begun = rl[0]["time"] - rl[0]["seconds/step"]
    reward = np.array([r["reward/mean"] for r in rl])
    idle = sorted(key for key in rl[-1] if key.startswith("idle/"))
    return {
        "seconds/step": statistics.median(r["seconds/step"] for r in rl[2:]),
        "images/s": statistics.median(r["images_per_second"] for r in rl[2:]),
        **{key: statistics.mean(r[key] for r in rl[2:]) for key in idle},
        "last reward": float(reward[-max(1, len(reward) // 10) :].mean()),
        "total": rl[-1]["time"] - begun,
        "curve": [
            [r["time"] - begun, float(mean)]
            for r, mean in zip(rl[WINDOW - 1 :], np.convolve(reward, np.ones(WINDOW) / WINDOW, "valid"))
        ],
        "staleness": statistics.mean(series(records, "rl", "staleness/mean")[1][2:]),
        "clip": statistics.mean(series(records, "rl", "clip_fraction")[1] or [float("nan")]),
    }


def seconds_to(curve: list, level: float) -> float:
    return next((at for at, reward in curve if reward >= level), float("nan"))


def table(out: Path, plot: Path | None) -> None:
    arms = {
        tuple(base.name.rsplit("-", 2)): told(base)
        for base in sorted(out.iterdir())
        if base.is_dir() and not base.name.startswith(".")
    }
    (out / "overlap.json").write_text(json.dumps({"-".join(key): value for key, value in arms.items()}))
    print(
        "| split | max_staleness | seed | s/iteration | images/s | idle rollout | idle reward | idle learner "
        "| reward, last tenth | s to equal reward | total s |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for (split, staleness, seed), arm in arms.items():
        pair = [arms[split, other, seed] for other in ("0", "1") if (split, other, seed) in arms]
        level = min(each["curve"][-1][1] for each in pair)
        idle = [
            next((f"{v:.0%}" for k, v in arm.items() if k == f"idle/{role}"), "")
            for role in ("rollout", "reward", "learner")
        ]
        print(
            f"| {split} | {staleness} | {seed} | {arm['seconds/step']:.2f} | {arm['images/s']:.1f} "
            f"| {' | '.join(idle)} | {arm['last reward']:.3f} "
            f"| {seconds_to(arm['curve'], level):.0f} | {arm['total']:.0f} |"
        )
    if plot:
        draw(arms, plot)


def draw(arms: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = [split for split in SPLITS if any(key[0] == split for key in arms)]
    figure, axes = pyplot.subplots(1, len(splits), figsize=(5 * len(splits), 3.6), sharey=True, squeeze=False)
    for axis, split in zip(axes[0], splits):
        for (name, staleness, seed), arm in arms.items():
            if name == split:
                colour, words = ("tab:blue", "synchronous") if staleness == "0" else ("tab:orange", "max_staleness 1")
                axis.plot(*zip(*arm["curve"]), color=colour, label=words if seed == min(k[2] for k in arms) else None)
        axis.set(title={"own": "a core for each role", "shared": "all roles on both cores"}[split], xlabel="seconds")
    axes[0][0].set_ylabel(f"training reward, mean of {WINDOW} iterations")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.table else options.seeds:
        for split in options.splits:
            for staleness in (0, 1):
                run_arm(options.run.resolve(), options.out, split, staleness, seed, options.steps)
    table(options.out, options.plot)


if __name__ == "__main__":
    main()
