"""One change of GRPO's settings at a time, at equal compute.

    PYTHONPATH=.:tests python tests/studies/grpo_ablation.py --run RUN_DIR --out FOLDER \\
        [--seeds 0 1 2] [--seconds 200] [--arms base ...]
    PYTHONPATH=.:tests python tests/studies/grpo_ablation.py --out FOLDER

RUN_DIR is a quickstart run, whose starting policy, classifier and judge are used (at four steps). Each arm trains for
the same CPU seconds of one thread with the loop of few_steps.py: no Ray, else what a run does. The same command goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import few_steps
import numpy as np
from arms import collected

#: arm -> what differs from ``few_steps.GRPO``: four steps, all three actions, 8 prompts of 8 samples that share their
#: first noise, one update, lr 1e-4, no KL, mean over dimensions, each group's own std.
CHANGES: dict[str, list[str]] = {
    "base": [],
    "one action of three": ["grpo.trained_steps=1"],
    "two actions of three": ["grpo.trained_steps=2"],
    "own first noise": ["grpo.same_noise=false"],
    "lr 3e-5": ["rl.lr=3.0e-5"],
    "lr 2e-4": ["rl.lr=2.0e-4"],
    "lr 4e-4": ["rl.lr=4.0e-4"],
    "no warm-up": ["rl.warmup_steps=0"],
    "16 prompts of 4": ["rl.prompts_per_step=16", "rl.group_size=4"],
    "4 prompts of 16": ["rl.prompts_per_step=4", "rl.group_size=16"],
    "16 prompts of 8": ["rl.prompts_per_step=16"],
    "two updates": ["rl.updates_per_step=2"],
    "two updates, clip 1e-4": ["rl.updates_per_step=2", "grpo.clip_range=1.0e-4"],
    "reduction sum, clip 0.2": ["grpo.reduction=sum", "grpo.clip_range=0.2"],
    "ratio normalised": ["grpo.normalize_ratio=true"],
    "global std": ["grpo.advantage_std=global"],
    "KL 0.01": ["grpo.kl_coef=0.01"],
    "KL 0.1": ["grpo.kl_coef=0.1"],
    "guidance 2 in rollouts": ["sampler.guidance_scale=2.0"],
    "last-step gradient": ["grpo.last_step_weight=1.0"],
}
# Here, so that processes that import this module to find ``job`` have them as well.
few_steps.ARMS |= {arm: [*few_steps.GRPO, "grpo.same_noise=true", *changes] for arm, changes in CHANGES.items()}


def job(run: str, out: Path, seconds: float, arm: str, seed: int) -> list[dict]:
    return few_steps.job(run, out, seconds, [], arm, seed)


def table(rows: list[dict]) -> str:
    """Means over seeds; gains are over the start's, by the held-out judge."""
    start = next(row for row in rows if row["arm"] == "start-4")
    lines = [
        f"start: judge {start['judge']:.3f} ± {start['judge_sem']:.3f}, distance {start['total']:.3f}, "
        f"diversity {start['diversity']:.3f}",
        "",
        "| change | seeds | iterations | judge | gain | gain in 1,000 images | training reward | distance "
        "| diversity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in CHANGES:
        found = [row for row in rows if row["arm"] == arm]
        if not found:
            continue
        images = 64 * (2 if arm == "16 prompts of 8" else 1)
        mean = lambda name: float(np.mean([row[name] for row in found]))  # noqa: E731
        spread = f" ± {np.std([row['judge'] for row in found], ddof=1):.3f}" if len(found) > 1 else ""
        gain = mean("judge") - start["judge"]
        lines.append(
            f"| {arm} | {len(found)} | {mean('iterations'):.0f} | {mean('judge'):.3f}{spread} | {gain:+.3f} | "
            f"{gain / (mean('iterations') * images / 1000):+.4f} | {mean('attributes'):.3f} | {mean('total'):.3f} | "
            f"{mean('diversity'):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--arms", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    wanted = [("start-4", 0), *((arm, seed) for seed in options.seeds for arm in options.arms)] if options.run else []
    rows = collected(options.out, partial(job, options.run, options.out, options.seconds), wanted, options.processes)
    print(table(rows))


if __name__ == "__main__":
    main()
