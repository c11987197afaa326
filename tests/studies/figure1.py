"""Figure 1 of ProxT2I at the embedded scale: proximal and score models, before and after GRPO, by number of steps.

    PYTHONPATH=.:tests python tests/studies/figure1.py --out FOLDER [--seeds 0 1 2] [--rl-steps 60] \\
        [overrides of all runs ...]

For each seed: the quickstart's pre-training (the square error by level), that by L1 and by the square error as they
are, and quick-score's, at all times and at its sampler's own (the same network, data, batch and 520 steps), then GRPO
from each with as many images and network calls (ten sampling steps, two trained). Then ``rlproxi eval`` draws from all
of them: the proximal models by hybrid, the score models by Euler-Maruyama, probability-flow Euler, DDIM, DPM-Solver++
and UniPC. Judge and held-out prompts are those of the first seed's run for all. The same command goes on where it was
interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fixtures.run_processes import ROOT
from rlproxi.cli import main as cli

#: label -> folder's name, config, what differs from it
KINDS = {
    "prox, by level": ("prox-level", "quickstart", []),
    "prox": ("prox", "quickstart", ["pretrain.loss=matching", "pretrain.weight=lam"]),
    "prox, square error": ("prox-square", "quickstart", ["pretrain.weight=lam"]),
    "score": ("score", "quick-score", []),
    "score, own times": ("score-own", "quickstart", ["sampler.name=ddim", "sampler.eta=1"]),
}
SOLVERS = ("euler-maruyama", "euler", "ddim", "dpmsolver++", "unipc")
STEPS = "1,2,3,4,6,8,10,16,20,50"


def run(out: Path, name: str, recipe: str, makes: str, *overrides: str) -> Path:
    """A run directory out/name; one that has made its model is left as it is, one that was cut short goes on."""
    base = out / name
    found = next(iter(base.iterdir()), None) if base.is_dir() else None
    if found and (found / "models" / makes / "model_index.json").is_file():
        return found
    arguments = (
        ["--resume", str(found)] if found else [str(ROOT / "configs" / f"{recipe}.yaml"), f"run.dir={base}", *overrides]
    )
    print(f"\n== {name}", flush=True)
    code = subprocess.run(
        [sys.executable, "-m", "rlproxi.run", *arguments], cwd=ROOT, env={**os.environ, "RAY_ADDRESS": "local"}
    ).returncode
    if code:
        raise SystemExit(code)
    return found or next(iter(base.iterdir()))


def seed_runs(out: Path, seed: int, rl_steps: int, more: list[str]) -> dict[str, Path]:
    """label -> model folder of one seed."""
    found = {}
    for label, (name, recipe, differs) in KINDS.items():
        common = [f"run.seed={seed}", "telemetry.dashboard=false", *differs, *more]
        start = run(
            out, f"{name}-{seed}", recipe, "pretrained", "run.stages=[prepare,pretrain]", "pretrain.steps=520", *common
        )
        shutil.rmtree(start / "checkpoints", ignore_errors=True)
        models = start / "models"
        tuned = run(
            out,
            f"{name}-rl-{seed}",
            recipe,
            "final",
            "run.stages=[rl]",
            f"model.init={models / 'pretrained'}",
            "evaluate.every=0",
            f"rewards.train=[{{name: attributes, params: {{path: {models / 'reward.safetensors'}}}}}]",
            "rewards.heldout=[]",
            f"rl.steps={rl_steps}",
            "sampler.num_inference_steps=10",
            "grpo.trained_steps=2",
            *common,
        )
        found |= {label: models / "pretrained", f"{label} + GRPO": tuned / "models" / "final"}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--steps", default=STEPS)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS, help="of the score models")
    parser.add_argument("--runs-only", action="store_true", help="train, and draw nothing")
    options, more = parser.parse_known_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    models = []
    for seed in options.seeds:
        for label, folder in seed_runs(out, seed, options.rl_steps, more).items():
            if label.startswith("prox"):
                models.append(f"{label}={folder}@hybrid")
            else:
                models += [f"{label}, {solver}={folder}@{solver}" for solver in options.solvers]
    if options.runs_only:
        return 0
    judge = next((out / f"prox-{options.seeds[0]}").iterdir())
    return cli.main(
        [
            "eval",
            *models,
            "--config",
            str(judge),
            "--steps",
            options.steps,
            "--out",
            str(out / "eval"),
            "--reach",
            "score, ddim@50" if "50" in options.steps.split(",") else f"score, ddim@{options.steps.split(',')[-1]}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
