"""Several rewards as one number for each sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..config.sections import NORMALIZE


def combine(parts: Mapping[str, np.ndarray], weights: Mapping[str, float], normalize: str = "none") -> np.ndarray:
    """The weighted sum of rewards, each [P, G] (P groups of G samples) -> float32 [P, G].

    ``normalize='group'`` first takes from each reward its mean in the group and divides by its standard deviation
    there, so that the weights say how much each counts, whatever its scale; a reward that is the same for the whole
    group then says nothing about it. NaN is a missing score, and a sample that lacks one reward lacks the sum.

    Raises ValueError for another ``normalize``.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"rewards.normalize {normalize!r} is unknown; choose one of {', '.join(NORMALIZE)}")
    total: np.ndarray | float = 0.0
    for name, values in parts.items():
        values = np.asarray(values, np.float64)
        total = total + weights[name] * (_standardised(values) if normalize == "group" else values)
    return np.asarray(total, np.float32)


def mean_present(scores: np.ndarray) -> float:
    """The mean over the scores that are there; NaN where there is none."""
    present = np.asarray(scores, np.float64)[np.isfinite(scores)]
    return float(present.mean()) if present.size else float("nan")


def _standardised(values: np.ndarray) -> np.ndarray:
    """(x - mean)/std of each group [P, G] over the scores that are there; 0 where a group has no spread."""
    present = np.isfinite(values)
    count = np.maximum(present.sum(1, keepdims=True), 1)
    deviation = values - np.where(present, values, 0).sum(1, keepdims=True) / count
    std = np.sqrt(np.where(present, deviation**2, 0).sum(1, keepdims=True) / count)
    # Rounding leaves a spread of about 1e-7 of the value in a group of equal float32 scores.
    size = np.abs(np.where(present, values, 0)).max(1, keepdims=True)
    flat = std <= 1e-6 * np.maximum(size, 1e-6)
    return np.where(flat & present, 0.0, deviation / np.where(flat, 1.0, std))
