"""Several rewards at once, and one that can be gamed, on the embedded portraits: the figures of docs/rewards/README.md.

    python tests/studies/rewards_on_portraits.py RUN_DIR [--iterations 40] [--weight 0.35] [--base FOLDER]

starts three short RL runs from the pre-trained model of a finished quickstart run:

- ``none`` and ``group``: `attributes` beside JPEG smallness times 100, whose ``weight`` is the smaller, without and
  with rewards.normalize=group;
- ``hacked``: JPEG smallness alone at three times the learning rate. The quickest way to a small file is an empty
  picture, so the judge must fall, the alarm go off, and models/best stay.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOUD = (
    "{{name: smallness, scorer: python, weight: {weight}, "
    "params: {{function: 'fixtures.reward_functions:loud_smallness'}}}}"
)


def go(start: Path, base: Path, name: str, iterations: int, *overrides: str) -> Path:
    """One RL run from the models of ``start``; returns its run directory, that of an earlier call where it finished."""
    from rlproxi.run import main

    for folder in base.glob(f"{name}-*"):
        if (folder / "report.html").is_file():
            return folder

    judge = f"{{name: judge, params: {{path: {start / 'models' / 'judge.safetensors'}}}}}"
    code = main(
        [
            str(ROOT / "configs" / "quickstart.yaml"),
            f"run.dir={base}",
            f"run.name={name}",
            "run.stages=[before, rl, after, report]",
            f"model.init={start / 'models' / 'pretrained'}",
            f"rl.steps={iterations}",
            "evaluate.steps=[3]",
            "evaluate.every=10",
            "evaluate.prompts=48",
            f"rewards.heldout=[{judge}]",
            *overrides,
        ]
    )
    assert code == 0, f"{name} ended with {code}"
    return next(base.glob(f"{name}-*"))


def curve(run_dir: Path, key: str, width: int = 5) -> tuple[list[int], list[float]]:
    """(iterations, running means of ``width`` values) of an RL metric."""
    import numpy as np

    from rlproxi.telemetry.runlog import read, series

    steps, values = series(read(run_dir), "rl", key)
    return list(steps[width - 1 :]), list(np.convolve(values, np.ones(width) / width, "valid"))


def evaluations(run_dir: Path) -> list[dict]:
    """The evaluations at three steps, in order of iteration."""
    import json

    found = [json.loads(file.read_text()) for file in (run_dir / "evaluation").glob("*.json")]
    return [{"iteration": e["iteration"], **e["by_steps"]["3"]} for e in sorted(found, key=lambda e: e["iteration"])]


def tell(name: str, run_dir: Path) -> None:
    for e in evaluations(run_dir):
        told = {**e["heldout"], **e["train"]}
        print(
            f"{name:8} iteration {e['iteration']:3}: "
            + ", ".join(f"{key} {value['mean']:.3f} ± {value['sem']:.3f}" for key, value in told.items()),
            flush=True,
        )


def draw(none: Path, group: Path, hacked: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, key, label in (
        (axes[0], "reward/attributes", "attributes"),
        (axes[1], "reward/smallness", "100 x JPEG smallness"),
    ):
        for run_dir, name in ((none, "normalize: none"), (group, "normalize: group")):
            ax.plot(*curve(run_dir, key), label=name)
        ax.set(title=label, xlabel="RL iteration", ylabel="mean of 5 iterations")
        ax.legend(frameon=False)
    seen = evaluations(hacked)
    steps = [e["iteration"] for e in seen]
    axes[2].errorbar(
        steps,
        [e["heldout"]["judge"]["mean"] for e in seen],
        [e["heldout"]["judge"]["sem"] for e in seen],
        color="C1",
        marker="o",
        capsize=3,
    )
    axes[2].set(title="a reward that can be gamed", xlabel="RL iteration")
    axes[2].set_ylabel("held-out judge", color="C1")
    other = axes[2].twinx()
    other.plot(steps, [e["train"]["smallness"]["mean"] for e in seen], color="C0", marker="o")
    other.set_ylabel("training reward", color="C0")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "rewards_on_portraits.png", dpi=110)
    print(out / "rewards_on_portraits.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--weight", type=float, default=0.35, help="of the loud reward; the other's is 1")
    parser.add_argument("--base", type=Path, help="where the runs go; finished ones there are not run again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    # Replicas import tests/fixtures/reward_functions.py by name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    start, base = options.run_dir.resolve(), options.base or Path(tempfile.mkdtemp(prefix="rewards-"))
    attributes = f"{{name: attributes, params: {{path: {start / 'models' / 'reward.safetensors'}}}}}"
    both = f"rewards.train=[{attributes}, {LOUD.format(weight=options.weight)}]"
    runs = {
        name: go(start, base, name, options.iterations, both, f"rewards.normalize={name}") for name in ("none", "group")
    }
    runs["hacked"] = go(
        start,
        base,
        "hacked",
        options.iterations,
        f"rewards.train=[{LOUD.format(weight=1)}]",
        "rl.lr=3.0e-4",
        "evaluate.patience=3",
    )
    for name, run_dir in runs.items():
        tell(name, run_dir)
    draw(*(runs[name] for name in ("none", "group", "hacked")), options.out)


if __name__ == "__main__":
    main()
