"""Records of the run log as values of the catalogue's metrics, for the exporters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .catalogue import Metric, entry, lookup

#: The label ``stage`` of values of the whole run.
WHOLE_RUN = "run"
_EVENTS = {"warning": "warnings", "alarm": "alarms"}


@dataclass(frozen=True)
class Observation:
    """One value of a metric, which was logged as ``name``; ``step`` is None for a value without one.

    ``part`` is the word in place of the metric's <part>, as "judge" in "heldout/judge"; "" for a metric without one.
    """

    metric: Metric
    name: str
    part: str
    stage: str
    step: int | None
    value: float

    def labels(self, run: str) -> dict[str, str]:
        """Return the values of ``metric.labels``."""
        return {"run": run, "stage": self.stage, **({self.metric.part: self.part} if self.metric.part else {})}


def observations(event: str, fields: dict[str, Any], headline_steps: int | None = None) -> list[Observation]:
    """Return a record's finite values; of evaluations only those at ``headline_steps`` denoising steps, if not None."""
    if event == "metrics":
        values = {"step": fields["step"], **fields, "stage": None}
        return [*_observed(values, fields)]
    if event == "evaluation":
        wanted = headline_steps is None or fields.get("steps") == headline_steps
        return [*_observed(_evaluated(fields), fields)] if wanted else []
    if event in _EVENTS:
        return [Observation(entry(_EVENTS[event]), _EVENTS[event], "", WHOLE_RUN, None, 1.0)]
    return []


def zeros() -> list[Observation]:
    """Return a run's counters at 0, for the start: Prometheus sees no increase in a series that begins with 1."""
    return [Observation(entry(name), name, "", WHOLE_RUN, None, 0.0) for name in _EVENTS.values()]


def _evaluated(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's entry (evaluation.heldout.summarise) under the catalogue's names."""
    found: dict[str, Any] = {"diversity": fields.get("diversity")}
    for name, score in (fields.get("heldout") or {}).items():
        found[f"heldout/{name}"], found[f"heldout_sem/{name}"] = score.get("mean"), score.get("sem")
    for name, score in (fields.get("train") or {}).items():
        found[f"evaluation/{name}"] = score.get("mean")
    for name, value in (fields.get("distance") or {}).items():
        found[f"distance/{name}"] = value
    found["spectrum/worst"] = (fields.get("spectrum") or {}).get("worst")
    return found


def _observed(values: dict[str, Any], fields: dict[str, Any]) -> Iterator[Observation]:
    for name, value in values.items():
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):  # a text or a list that a custom algorithm logs
            continue
        if math.isfinite(number):
            known = lookup(name)
            metric, part = (known, known.part_of(name) or "") if known else (entry("other/<name>"), name)
            yield Observation(metric, name, part, str(fields["stage"]), int(fields["step"]), number)
