"""summary.json: the figures of a run for scripts, from its directory alone."""

from __future__ import annotations

import json
import math
import subprocess
from importlib import metadata
from pathlib import Path

from ..config.loading import Config
from ..run_directory import RunDirectory
from ..telemetry.runlog import read, series, stage_seconds
from ..telemetry.values import dig


def summary(run_dir: Path, config: Config) -> dict:
    """Return the content of summary.json; a figure that the run lacks is None."""
    records = read(run_dir)
    seconds = stage_seconds(records)
    rewards = [r for r in series(records, "rl", "reward/mean")[1] if not math.isnan(r)]
    rates = [r for r in series(records, "rl", "images_per_second")[1] if not math.isnan(r)]

    def entry(tag: str) -> dict:
        file = RunDirectory(run_dir).evaluation(tag)
        found = json.loads(file.read_text())["by_steps"] if file.is_file() else {}
        return found.get(str(config.sampler.num_inference_steps), {})

    def both(*key: str | None) -> dict[str, float | None]:
        return {tag: dig(entry(tag), *key) for tag in ("before", "after")}

    judge = config.rewards.heldout[0].name if config.rewards.heldout else None
    best = max((r["step"] for r in records if r["event"] == "best"), default=None)
    packages = ("ray", "torch", "deepspeed", "transformers", "diffusers", "numpy")
    return {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "reward": {"first": rewards[0] if rewards else None, "last": rewards[-1] if rewards else None},
        "heldout": {**both("heldout", judge, "mean"), "best_iteration": best},
        "distance": both("distance", "total"),
        "diversity": both("diversity"),
        "spectrum": both("spectrum", "worst"),
        "images_per_second": sum(rates) / len(rates) if rates else None,
        "seed": config.run.seed,
        "git": _git(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _git() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None
