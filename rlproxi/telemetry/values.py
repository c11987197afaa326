"""Checks of values that come out of a run's files, which may hold anything."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float | None:
    """A finite number; None for anything else, also for an integer that no float can hold."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def dig(values: Any, *keys: str | None) -> Any:
    """Return values[a][b]..., or None where a part of the path is missing or is not a mapping."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def whole(value: Any) -> int | None:
    """An integer that a browser can hold exactly, None for anything else."""
    return value if type(value) is int and abs(value) <= 2**53 else None
