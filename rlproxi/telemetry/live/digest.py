"""The contents of a run's log in bounded memory: its curves, its notable events, and how far the run is."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from ..values import number
from .curve import Curve

#: Bounds against a damaged or hostile log; a run has some sixty curves.
MAX_SERIES, MAX_NAME, MAX_MESSAGE = 600, 120, 600
KEPT_EVENTS, KEPT_GALLERIES = 200, 400
_LISTED = ("stage", "resume", "reward", "best", "alarm", "warning", "note")


class Digest:
    """Takes the records of a log in their order.

    Attributes:
        curves: stage -> name -> Curve over the stage's steps; ``evaluation@N`` are evaluations at N denoising steps.
        sharp: False once a "resume" has cut through a bucket, which then still holds superseded points. Only reading
            the log again, with the cuts known, makes the curves exact.
        malformed: lines that are no records, which the reader counts here. refused: values without a curve.

    Args:
        sampled: the records are a sample of the log: a step that goes backwards stands for a resume that is not in it.
    """

    def __init__(self, sampled: bool = False):
        self.sampled, self.sharp = sampled, True
        self.curves: dict[str, dict[str, Curve]] = {}
        self.refused = self.malformed = self._count = 0
        self.counts: Counter[str] = Counter()
        self.listed: dict[str, deque] = {event: deque(maxlen=KEPT_EVENTS) for event in _LISTED}
        self.galleries: list[int] = []
        self.reached: dict[str, int] = {}
        self.times: dict[str, deque[tuple[int, float]]] = {}
        self.last_time: float | None = None
        self.newest_stage: str | None = None

    def apply(self, record: dict) -> list | None:
        """Take one record and return the change for a page that shows the records before it.

        A change is ["points", stage, step, {name: value}], ["cut", stage, step, record], ["gallery", "rl", step] or
        ["event", record]; None if there is nothing to show.
        """
        event, time = record["event"], _time(record.get("time"))
        self.last_time = self.last_time if time is None else time
        if event == "metrics":
            return self._metrics(record, time)
        if event == "evaluation":
            return self._evaluation(record)
        if event == "samples":
            return self._samples(record["step"])
        self.counts[event] += 1
        short = _short(record)
        if event in self.listed:
            self.listed[event].append(short)
        if event == "resume":
            short["restart"] = record["stage"] in self.reached
            self.cut(record["stage"], record["step"])
            return ["cut", record["stage"], record["step"], short]
        return ["event", short] if event in self.listed else None

    def cut(self, stage: str, step: int) -> None:
        """Drop a stage's points behind ``step``; for the stage rl also those of its evaluations."""
        for name, curves in self.curves.items():
            if name == stage or (stage == "rl" and name.startswith("evaluation@")):
                for curve in curves.values():
                    self.sharp &= curve.cut(step)
        self.times.pop(stage, None)
        self.reached[stage] = min(self.reached.get(stage, step), step)
        if stage == "rl":
            self.galleries = [known for known in self.galleries if known <= step]

    def _metrics(self, record: dict, time: Any) -> list:
        stage, step = record["stage"][:MAX_NAME], record["step"]
        if self.sampled and step < self.reached.get(stage, step):
            self.cut(stage, step - 1)
        values = {name: number(value) for name, value in record.items() if _is_metric(value)}
        del values["step"]
        values.pop("time", None)
        self._add(stage, step, values)
        self.reached[stage], self.newest_stage = step, stage
        if time is not None:
            self.times.setdefault(stage, deque(maxlen=50)).append((step, time))
        return ["points", stage, step, values]

    def _evaluation(self, record: dict) -> list | None:
        step, steps = record.get("step"), record.get("steps")
        if type(step) is not int or type(steps) is not int:
            return None
        self.counts["evaluation"] += 1
        values: dict[str, float | None] = {}
        for part in ("heldout", "train", "details", "diversity", "distance", "spectrum"):
            if part in record:
                found = record[part]
                if part == "spectrum" and isinstance(found, dict):  # what guards need beside it is no curve
                    found = {key: found[key] for key in ("rows", "columns", "worst") if key in found}
                values.update(_flat(part, found))
        stage = f"evaluation@{steps}"
        self._add(stage, step, values)
        return ["points", stage, step, values]

    def _samples(self, step: int) -> list:
        if not self.galleries or step > self.galleries[-1]:
            self.galleries.append(step)
        if len(self.galleries) > KEPT_GALLERIES:  # every second one of the older half goes
            half = KEPT_GALLERIES // 2
            self.galleries = self.galleries[:half:2] + self.galleries[half:]
        return ["gallery", "rl", step]

    def _add(self, stage: str, step: int, values: dict[str, float | None]) -> None:
        curves = self.curves.get(stage)
        if curves is None:
            curves = self.curves.setdefault(stage, {}) if len(self.curves) < MAX_SERIES else {}
        for name, value in values.items():
            curve = curves.get(name)
            if curve is None:
                if self._count >= MAX_SERIES or len(name) > MAX_NAME:
                    self.refused += 1
                    continue
                curve = curves[name] = Curve()
                self._count += 1
            curve.add(step, value)

    def snapshot(self) -> dict:
        """The curves and events, ready for JSON."""
        return {
            "curves": {
                stage: {name: curve.buckets() for name, curve in curves.items()}
                for stage, curves in self.curves.items()
            },
            "events": {name: list(found) for name, found in self.listed.items()},
            "counts": dict(self.counts),
            "galleries": self.galleries,
            "refused": self.refused,
            "malformed": self.malformed,
        }

    def progress(self, totals: dict[str, int]) -> dict:
        """How far the run is, given the steps of each stage; "done": the stage that began last is done.

        "eta" is in seconds, at the pace of the stage's last fifty records; None if no pace is known.
        """
        newest = self.listed["stage"][-1] if self.listed["stage"] else {}
        running, done = newest.get("name"), newest.get("status") == "done"
        counted = running if running in self.reached else self.newest_stage or ""
        if running and counted != running and not counted.startswith(f"{running}/"):
            counted = ""
        step, total, times = self.reached.get(counted), totals.get(counted), self.times.get(counted, deque())
        pace = eta = None
        if len(times) > 1 and times[-1][0] > times[0][0]:
            pace = max(0.0, (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]))
        if pace is not None and total is not None and step is not None and not done:
            eta = max(0, total - step) * pace
        return {
            "stage": running or counted or None,
            "step": step,
            "total": total,
            "seconds_per_step": pace,
            "eta": eta,
            "updated": self.last_time,
            "done": done,
        }


def _time(value: Any) -> float | None:
    """Unix seconds; None for what no clock can show."""
    value = number(value)
    return value if value is not None and abs(value) < 1e12 else None


def _flat(name: str, value: Any, depth: int = 0) -> dict[str, float | None]:
    """{"heldout/judge": .., "heldout/judge/sem": ..} of {"judge": {"mean": .., "sem": ..}} under the name heldout."""
    if isinstance(value, dict):
        found: dict[str, float | None] = {}
        for key, part in value.items() if depth < 4 else ():
            if key != "missing":
                found.update(_flat(name if key == "mean" else f"{name}/{key}", part, depth + 1))
        return found
    return {name: number(value)} if _is_metric(value) else {}


def _is_metric(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _short(record: dict) -> dict:
    """An event for a page: at most 12 values, bounded texts, and numbers that JSON and a browser can hold."""
    return {
        key[:MAX_NAME]: value[:MAX_MESSAGE] if isinstance(value, str) else value
        for key, value in list(record.items())[:12]
        if value is None or isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 1e300)
    }
