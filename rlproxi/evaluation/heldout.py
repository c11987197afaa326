"""What is measured on fixed prompts and seeds: scores with their uncertainty, diversity, distance to data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..algorithms.guards.over_optimisation import Evaluated
from ..config.loading import Config
from ..files import write_json
from ..run_directory import RunDirectory


def mean_and_error(scores: np.ndarray, samples: int) -> dict[str, float | None]:
    """{"mean", "sem"} of scores [P * S] (prompt-major). Samples of one prompt are not independent, so the
    standard error is that of the prompts' means.

    NaN is a missing score: it is left out and counted as "missing". Both figures are None where all are.
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
    """One step count's entry of an evaluation file.

    ``seen``: what ``reference.Comparison`` found: "diversity", a number, and "distance", {"total", "layout",
    "texture"}. What is not known stays out of the entry.
    """
    entry = {"heldout": {}, "train": {}, "details": {}, **(seen or {})}
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
    """What the over-optimisation alarm looks at: the first held-out reward and the weighted training rewards, at the
    config's step count. None where the evaluation has no such figures."""
    entry = evaluation["by_steps"].get(str(config.sampler.num_inference_steps))
    if not entry or not config.rewards.heldout or "iteration" not in evaluation:
        return None
    judge = entry["heldout"][config.rewards.heldout[0].name]
    train = [entry["train"][r.name]["mean"] for r in config.rewards.train]
    if judge["mean"] is None or None in train:
        return None
    total = sum(r.weight * mean for r, mean in zip(config.rewards.train, train))
    return Evaluated(
        evaluation["iteration"],
        total,
        judge["mean"],
        judge["sem"],
        entry.get("distance", {}).get("total"),
        entry.get("diversity"),
    )


def evaluated(run_dir: Path, config: Config, upto: int) -> list[Evaluated]:
    """The headlines of a run's evaluations of iterations up to ``upto``, in order."""
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
    """``evaluation/<tag>.json`` and, for each step count, ``samples/<tag>-N<steps>.npz``.

    ``correct``: step count -> what the judge found of each attribute, [P * S] (1 right, 0 wrong, NaN not claimed).
    """
    files = RunDirectory(run_dir)
    files.samples.mkdir(exist_ok=True)
    for steps, pictures in images.items():
        names = [name for name in correct[steps] if name != "all"]
        words = (
            {"attributes": np.array(names), "correct": np.stack([correct[steps][name] for name in names], 1)}
            if names
            else {}
        )
        np.savez_compressed(files.evaluation_samples(tag, steps), images=pictures, heldout=judged[steps], **words)
    write_json(files.evaluation(tag), evaluation)
