"""Held-out evaluations, on fixed prompts and seeds: scores with their uncertainty, diversity, distance to data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..algorithms.guards.over_optimisation import Evaluated
from ..config.loading import Config
from ..files import write_json
from ..run_directory import RunDirectory


def mean_and_error(scores: np.ndarray, samples: int) -> dict[str, float | None]:
    """Return {"mean", "sem"} of scores [P * S], prompt-major, where "sem" is the standard error.

    Samples of one prompt are not independent, so the standard error is that of the prompts' means. NaN is a missing
    score: it is left out and counted as "missing". Both figures are None where all scores are missing.
    """
    scores = np.asarray(scores, np.float64).reshape(-1, samples)
    present = np.isfinite(scores)
    rows = present.any(1)
    by_prompt = np.where(present, scores, 0).sum(1)[rows] / present.sum(1)[rows]
    if not len(by_prompt):
        return {"mean": None, "sem": None, "missing": int(scores.size)}
    sem = by_prompt.std(ddof=1) / np.sqrt(len(by_prompt)) if len(by_prompt) > 1 else 0.0
    missing = int((~present).sum())
    return {"mean": float(by_prompt.mean()), "sem": float(sem), **({"missing": missing} if missing else {})}


def summarise(
    scores: dict[str, np.ndarray],
    details: dict[str, dict[str, np.ndarray]],
    heldout: list[str],
    samples: int,
    seen: dict | None = None,
) -> dict:
    """Return an evaluation file's entry for one number of denoising steps.

    Args:
        scores: reward -> [P * S]. Those named in ``heldout`` are held out, the others are training rewards.
        details: reward -> attribute -> [P * S]: 1 right, 0 wrong, NaN where the caption does not claim it.
        samples: S, the samples of each prompt.
        seen: a result of ``reference.Comparison``: "diversity", and "distance" and "spectrum" where they are known.
    """
    entry: dict[str, Any] = {"heldout": {}, "train": {}, "details": {}, **(seen or {})}
    for name, values in scores.items():
        entry["heldout" if name in heldout else "train"][name] = mean_and_error(values, samples)
    for name, columns in details.items():
        entry["details"][name] = {
            key: float(np.nanmean(column))
            for key, column in columns.items()
            if key != "all" and not np.isnan(column).all()
        }
    return entry


def headline(evaluation: dict, config: Config) -> Evaluated | None:
    """Return the figures that the over-optimisation guard compares, at the config's number of denoising steps.

    They are the first held-out reward, the weighted training rewards, distance, diversity and spectrum. A reward
    without a score is NaN in them. Returns None where the evaluation lacks that number of steps.
    """
    entry = evaluation["by_steps"].get(str(config.sampler.num_inference_steps))
    if not entry or "iteration" not in evaluation:
        return None

    def figure(scores: dict, key: str) -> float:
        return math.nan if scores.get(key) is None else scores[key]

    judges = config.rewards.heldout
    judge = entry["heldout"][judges[0].name] if judges else {}
    train = sum(r.weight * figure(entry["train"][r.name], "mean") for r in config.rewards.train)
    return Evaluated(
        evaluation["iteration"],
        train,
        figure(judge, "mean"),
        figure(judge, "sem"),
        entry.get("distance", {}).get("total"),
        entry.get("diversity"),
        evaluation.get("data", {}).get("diversity"),
        entry.get("spectrum"),
    )


def evaluated(run_dir: Path, config: Config, upto: int) -> list[Evaluated]:
    """Return the ``headline`` of each of a run's evaluations of iterations up to ``upto``, in order."""
    found = []
    for file in RunDirectory(run_dir).evaluations.glob("*.json"):
        seen = headline(json.loads(file.read_text(encoding="utf-8")), config)
        if seen is not None and seen.iteration <= upto:
            found.append(seen)
    return sorted(found, key=lambda seen: seen.iteration)


def write(
    run_dir: Path,
    tag: str,
    evaluation: dict,
    images: dict[int, np.ndarray],
    judged: dict[int, np.ndarray],
    correct: dict[int, dict[str, np.ndarray]],
) -> None:
    """Write the evaluation ``tag`` of a run, and its images for each number of denoising steps.

    Args:
        evaluation: {"by_steps": {steps: ``summarise``}, ...}.
        images: steps -> uint8 [P * S, H, W, 3].
        judged: steps -> held-out scores [P * S].
        correct: steps -> attribute -> [P * S]: 1 right, 0 wrong, NaN where the caption does not claim it.
    """
    files = RunDirectory(run_dir)
    files.samples.mkdir(exist_ok=True)
    for steps, pictures in images.items():
        names = [name for name in correct[steps] if name != "all"]
        arrays = {"images": pictures, "heldout": judged[steps]}
        if names:
            arrays["attributes"] = np.array(names)
            arrays["correct"] = np.stack([correct[steps][name] for name in names], 1)
        np.savez_compressed(files.evaluation_samples(tag, steps), **arrays)  # type: ignore[arg-type]  # numpy's stub
    write_json(files.evaluation(tag), evaluation)
