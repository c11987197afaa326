"""What a run's log says, in bounded memory: curves, the events worth a line, how far the run is."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from typing import Any

from .series import Series

#: Bounds against a log that is not what it should be; a run has some sixty curves.
MAX_SERIES, MAX_NAME, MAX_MESSAGE = 600, 120, 600
KEPT_EVENTS, KEPT_GALLERIES = 200, 400
_FARTHEST = 2**53
_LISTED = ("stage", "resume", "reward", "best", "alarm", "warning", "note")


class Malformed(ValueError):
    """A line that is no record of a run log."""


def parse(line: bytes) -> dict:
    """The record of a line. Raises Malformed for anything that is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise Malformed("no object with an event")
    if record["event"] in ("metrics", "resume", "samples"):
        step = record.get("step")
        if not isinstance(record.get("stage"), str) or type(step) is not int or abs(step) > _FARTHEST:
            raise Malformed("no stage or no step")
    return record


def evaluation_stage(steps: Any) -> str:
    """Evaluations at one number of denoising steps are curves of a stage of their own."""
    return f"evaluation@{steps}"


class Digest:
    """Takes records in the order of the log.

    ``curves``: stage -> name -> Series, over a stage's steps; evaluations under ``evaluation_stage``. ``sharp`` is
    False once a "resume" has cut through a bucket, which then still holds superseded points: only reading the log
    again, with the cuts known, makes it exact.

    Args:
        sampled: the records are some of the log's: a step that goes backwards stands for a resume that was not seen.
    """

    def __init__(self, sampled: bool = False):
        self.sampled, self.sharp = sampled, True
        self.curves: dict[str, dict[str, Series]] = {}
        self.series = self.refused = self.records = 0
        self.counts: Counter[str] = Counter()
        self.listed: dict[str, deque] = {event: deque(maxlen=KEPT_EVENTS) for event in _LISTED}
        self.galleries: list[int] = []
        self.reached: dict[str, int] = {}
        self.times: dict[str, deque] = {}
        self.first_time = self.last_time = None
        self.newest_stage: str | None = None

    def apply(self, record: dict) -> list | None:
        """Takes one record in; returns the change for a page that shows what was there before: ["points", stage, step,
        {name: value}], ["cut", stage, step, record], ["gallery", "rl", step] or
        ["event", record]. None where there is
        nothing to show."""
        self.records += 1
        event, time = record["event"], _time(record.get("time"))
        if time is not None:
            self.first_time = time if self.first_time is None else self.first_time
            self.last_time = time
        if event == "metrics":
            return self._metrics(record, time)
        if event == "evaluation":
            return self._evaluation(record)
        if event == "samples":
            return self._samples(record["step"])
        self.counts[event] += 1
        if event == "resume":
            restart = record["stage"] in self.reached
            self.cut(record["stage"], record["step"])
            self.listed["resume"].append({**_short(record), "restart": restart})
            return ["cut", record["stage"], record["step"], self.listed["resume"][-1]]
        if event in self.listed:
            short = _short(record)
            self.listed[event].append(short)
            return ["event", short]
        return None

    def cut(self, stage: str, step: int) -> None:
        """Drops a stage's points behind ``step``; with RL's those of its evaluations."""
        for name, curves in self.curves.items():
            if name == stage or (stage == "rl" and name.startswith("evaluation@")):
                for curve in curves.values():
                    self.sharp &= curve.cut(step)
        self.times.pop(stage, None)
        self.reached[stage] = min(self.reached.get(stage, step), step)
        if stage == "rl":
            self.galleries = [known for known in self.galleries if known <= step]

    # -- the kinds of records ---------------------------------------------------------------

    def _metrics(self, record: dict, time: Any) -> list:
        stage, step = record["stage"][:MAX_NAME], record["step"]
        if self.sampled and step < self.reached.get(stage, step):
            self.cut(stage, step - 1)
        values = {}
        for name, value in record.items():
            kind = type(value)
            if kind is float and value - value == 0.0:  # finite: by far the most
                values[name] = value
            elif kind in (int, float) or value is None:
                values[name] = _number(value)
        for name in ("time", "step"):
            values.pop(name, None)
        self._add(stage, step, values)
        self.reached[stage], self.newest_stage = step, stage
        if time is not None:
            self.times.setdefault(stage, deque(maxlen=50)).append((step, time))
        return ["points", stage, step, values]

    def _evaluation(self, record: dict) -> list | None:
        step, steps = record.get("step"), record.get("steps")
        if type(step) is not int or type(steps) is not int or abs(step) > _FARTHEST:
            return None
        self.counts["evaluation"] += 1
        values = {
            key: value
            for part in ("heldout", "train", "details", "diversity", "distance")
            if part in record
            for key, value in _flat(part, record[part]).items()
        }
        stage = evaluation_stage(steps)
        self._add(stage, step, values)
        return ["points", stage, step, values]

    def _samples(self, step: int) -> list:
        if not self.galleries or step > self.galleries[-1]:
            self.galleries.append(step)
        if len(self.galleries) > KEPT_GALLERIES:  # the older half thins out, the newest stay
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
                if self.series >= MAX_SERIES or len(name) > MAX_NAME:
                    self.refused += 1
                    continue
                curve = curves[name] = Series()
                self.series += 1
            curve.add(step, value)

    # -- what a page asks for ---------------------------------------------------------------

    def snapshot(self) -> dict:
        """Curves and events as JSON can hold them."""
        return {
            "curves": {
                stage: {name: curve.buckets() for name, curve in curves.items()}
                for stage, curves in self.curves.items()
            },
            "events": {name: list(found) for name, found in self.listed.items()},
            "counts": dict(self.counts),
            "galleries": self.galleries,
            "records": self.records,
            "refused": self.refused,
            "exact": self.sharp and not self.sampled,
        }

    def progress(self, totals: dict[str, int]) -> dict:
        """Where the run is: {"stage", "step", "total", "seconds_per_step", "eta", "started", "updated", "done"}.

        ``totals``: stage -> its steps. "eta" is seconds to the end of the stage at the pace of its last steps (those
        of the last fifty records); None where no pace is known. "done": the last stage that began is done.
        """
        running, done = None, False
        for record in self.listed["stage"]:
            done = record.get("status") == "done"
            running = str(record.get("name"))
        seen = next((s for s in (running, self.newest_stage) if s in self.reached), None)
        if seen is not None and seen != running and running and not str(self.newest_stage).startswith(f"{running}/"):
            seen = None
        pace, times = None, self.times.get(seen or "", ())
        if len(times) > 1 and times[-1][0] > times[0][0]:
            pace = max(0.0, (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]))
        step, total = self.reached.get(seen or ""), totals.get(seen or "")
        eta = max(0, total - step) * pace if pace is not None and total is not None and not done else None
        return {
            "stage": running or seen,
            "metrics": seen,
            "step": step,
            "total": total,
            "seconds_per_step": pace,
            "eta": eta,
            "started": self.first_time,
            "updated": self.last_time,
            "done": done,
        }


def _number(value: int | float | None) -> float | None:
    """A finite number or None; an integer beyond a float's range is None too."""
    try:
        value = None if value is None else float(value)
    except OverflowError:
        return None
    return value if value is not None and math.isfinite(value) else None


def _time(value: Any) -> float | None:
    """Unix seconds, or None for what is no time a clock can tell."""
    value = _number(value) if type(value) in (int, float) else None
    return value if value is not None and abs(value) < 1e12 else None


def _flat(name: str, value: Any, depth: int = 0) -> dict[str, float | None]:
    """{"heldout/judge": .., "heldout/judge/sem": ..} of {"judge": {"mean": .., "sem": ..}} under the name heldout."""
    if isinstance(value, dict):
        found: dict[str, float | None] = {}
        for key, part in value.items() if depth < 4 else ():
            if key != "missing":
                found.update(_flat(name if key == "mean" else f"{name}/{key}", part, depth + 1))
        return found
    return {name: _number(value)} if value is None or type(value) in (int, float) else {}


def _short(record: dict) -> dict:
    """An event with its texts bounded, and without what is large."""
    return {
        key[:MAX_NAME]: value[:MAX_MESSAGE] if isinstance(value, str) else value
        for key, value in list(record.items())[:12]
        if value is None or (isinstance(value, (str, bool, int, float)) and _sendable(value))
    }


def _sendable(value: Any) -> bool:
    """Whether JSON and a browser can hold a number."""
    return isinstance(value, str) or (math.isfinite(_number(value) or 0.0) and abs(value) < 1e300)
