"""A record of the run log as values of the catalogue's metrics: what every exporter starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .catalogue import Metric, entry, lookup

#: The label ``stage`` of what belongs to the run as a whole.
WHOLE_RUN = "run"
_EVENTS = {"warning": "warnings", "alarm": "alarms"}


@dataclass(frozen=True)
class Observation:
    """One value. ``name`` as logged, "heldout/judge"; ``part`` what stands for the metric's <part>, else ""; ``step``
    None for what has none."""

    metric: Metric
    name: str
    part: str
    stage: str
    step: int | None
    value: float

    def labels(self, run: str) -> dict[str, str]:
        """The values of ``metric.labels``."""
        return {"run": run, "stage": self.stage, **({self.metric.part: self.part} if self.metric.part else {})}


def observations(event: str, fields: dict[str, Any], headline_steps: int | None = None) -> list[Observation]:
    """What a record tells, in the order of its keys; [] for an event without numbers. NaN and null are left out.

    ``headline_steps``: of evaluations at several step counts only the one at this count is told; None: all of them.
    """
    if event == "metrics":
        return [*_observed({"step": fields["step"], **_numbers(fields)}, fields)]
    if event == "evaluation":
        told = headline_steps is None or fields.get("steps") == headline_steps
        return [*_observed(_evaluated(fields), fields)] if told else []
    if event in _EVENTS:
        return [Observation(entry(_EVENTS[event]), _EVENTS[event], "", WHOLE_RUN, None, 1.0)]
    return []


def zeros() -> list[Observation]:
    """A run's counters before anything was counted: a series that begins with its first event shows no increase."""
    return [Observation(entry(name), name, "", WHOLE_RUN, None, 0.0) for name in _EVENTS.values()]


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in ("stage", "step")}


def _evaluated(fields: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's entry (evaluation.heldout.summarise) under the catalogue's names."""
    found: dict[str, Any] = {"diversity": fields.get("diversity")}
    for name, score in (fields.get("heldout") or {}).items():
        found[f"heldout/{name}"], found[f"heldout_sem/{name}"] = score.get("mean"), score.get("sem")
    for name, score in (fields.get("train") or {}).items():
        found[f"evaluation/{name}"] = score.get("mean")
    for name, value in (fields.get("distance") or {}).items():
        found[f"distance/{name}"] = value
    return found


def _observed(values: dict[str, Any], fields: dict[str, Any]) -> Iterator[Observation]:
    for name, value in values.items():
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):  # a text or a list that an algorithm of one's own logs
            continue
        if math.isfinite(number):
            metric = lookup(name)
            if metric is None:
                metric, part = entry("other/<name>"), name
            else:
                part = metric.part_of(name)
            yield Observation(metric, name, part, str(fields["stage"]), int(fields["step"]), number)
