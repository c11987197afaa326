"""Scores on fixed prompts and seeds, with their uncertainty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def mean_and_error(scores: np.ndarray, samples: int) -> dict[str, float]:
    """{"mean", "sem"} of scores [P * S] (prompt-major). Samples of one prompt are not independent, so the
    standard error is that of the prompts' means."""
    by_prompt = np.asarray(scores, np.float64).reshape(-1, samples).mean(1)
    sem = by_prompt.std(ddof=1) / np.sqrt(len(by_prompt)) if len(by_prompt) > 1 else 0.0
    return {"mean": float(by_prompt.mean()), "sem": float(sem)}


def summarise(scores: dict[str, np.ndarray], details: dict[str, dict[str, np.ndarray]], heldout: list[str],
              samples: int) -> dict:
    """One step count's entry of an evaluation file."""
    entry = {"heldout": {}, "train": {}, "details": {}}
    for name, values in scores.items():
        entry["heldout" if name in heldout else "train"][name] = mean_and_error(values, samples)
    for name, columns in details.items():
        entry["details"][name] = {key: float(np.nanmean(column)) for key, column in columns.items()
                                  if key != "all" and not np.isnan(column).all()}
    return entry


def write(run_dir: Path, tag: str, evaluation: dict, images: dict[int, np.ndarray], judged: dict[int, np.ndarray],
          correct: dict[int, dict[str, np.ndarray]]) -> None:
    """``evaluation/<tag>.json`` and, for each step count, ``samples/<tag>-N<steps>.npz``.

    ``correct``: step count -> what the judge found of each attribute, [P * S] (1 right, 0 wrong, NaN not claimed).
    """
    (run_dir / "evaluation").mkdir(exist_ok=True)
    (run_dir / "samples").mkdir(exist_ok=True)
    for steps, pictures in images.items():
        names = [name for name in correct[steps] if name != "all"]
        words = {"attributes": np.array(names),
                 "correct": np.stack([correct[steps][name] for name in names], 1)} if names else {}
        np.savez_compressed(run_dir / "samples" / f"{tag}-N{steps}.npz", images=pictures, heldout=judged[steps], **words)
    write_json(run_dir / "evaluation" / f"{tag}.json", evaluation)


def write_json(file: Path, values: dict) -> None:
    """Whole or not at all."""
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(json.dumps(values, indent=1), encoding="utf-8")
    draft.replace(file)
