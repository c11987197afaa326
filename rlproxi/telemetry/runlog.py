"""The run log: ``metrics.jsonl``, one JSON object a line, only ever appended to.

Every record has "time" (unix seconds) and "event"; the rest follows from the event:

=========== ==================================================================================
metrics     "stage" (pretrain, rl, ...), "step", and any number of values; see ``catalogue``
stage       "name", "status" (start or done), and "seconds" when done
resume      "stage", "step": earlier records of that stage for a step > this one no longer count
evaluation  "tag", "stage", "step", and the figures
reward      "name", "scorer", and where its scores come from (class, checkpoint hashes)
samples     "stage", "step", "file": a gallery of training samples was written, see ``gallery``
best        "stage", "step", "heldout": the best held-out reward so far, saved as models/best
alarm       "stage", "step", "message", "best": over-optimisation, and the iteration to go back to, or null
warning     "message"
note        "message"
=========== ==================================================================================

Dashboards, reports and resumes read this file, so no process holds the only copy of a fact.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterable
from typing import Any

from ..run_directory import RunDirectory
from .values import number, whole

EVENTS = ("metrics", "stage", "resume", "evaluation", "reward", "samples", "best", "alarm", "warning", "note")
_PLACE = ("stage", "step")
_REQUIRED = {"metrics": _PLACE, "resume": _PLACE, "samples": _PLACE, "stage": ("name", "status")}


class RunLog(contextlib.AbstractContextManager["RunLog"]):
    """The run log of ``run_dir``, open for appending. The folder is made if it is missing.

    Each record is one write, so several processes of one machine may log into the same file, and a killed one leaves at
    most one torn line. If ``patient``, a record that cannot be written is held and written before the next one; of more
    than 100,000 the oldest are lost. Else ``append`` raises OSError.
    """

    def __init__(self, run_dir: str | os.PathLike, patient: bool = False):
        self.patient, self._torn = patient, False
        self.held: collections.deque[bytes] = collections.deque(maxlen=100_000)
        self.path = RunDirectory(run_dir).log
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (``close`` closes it)
        size = self.file.seek(0, os.SEEK_END)
        if size:
            self.file.seek(size - 1)
            if self.file.read(1) != b"\n":
                # A writer was killed in the middle of a line, which is ended here: the next record starts on its own.
                self.file.write(b"\n")

    def append(self, event: str, /, **fields: Any) -> None:
        """Log one record. Numpy and torch scalars become numbers, NaN and Inf become null.

        Raises ValueError for an unknown event or a missing field, TypeError for what JSON cannot hold.
        """
        if event not in EVENTS:
            raise ValueError(f"event {event!r} is unknown; choose one of {', '.join(EVENTS)}")
        needed = _REQUIRED.get(event, ())
        if set(needed) - set(fields) or {"time", "event"} & set(fields):
            wanted = f"a {event!r} record needs {', '.join(needed) or 'no field'} and sets 'time' and 'event' itself"
            raise ValueError(f"{wanted}; got {', '.join(fields) or 'nothing'}")
        record = {"time": round(time.time(), 3), "event": event}
        record.update((name, plain(value, name)) for name, value in fields.items())
        self.held.append((json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8"))
        try:
            self._write_held()
        except OSError:
            if not self.patient:
                self.held.clear()
                raise

    def _write_held(self) -> None:
        while self.held:
            line = b"\n" * self._torn + self.held[0]
            written = self.file.write(line)
            if written != len(line):  # an unbuffered write may be partial
                self._torn = self._torn or bool(written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._torn = False
            self.held.popleft()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __exit__(self, *_) -> None:
        self.close()


def plain(value: Any, name: str = "value") -> Any:
    """Return ``value`` as JSON can hold it, NaN and Inf as None. Raises TypeError, which names ``name``, for others."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, name) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either: a 0-d array gives a number
        return plain(value.tolist(), name)
    raise TypeError(f"{name} is a {type(value).__name__}, which the run log cannot hold")


def read(run_dir: str | os.PathLike) -> list[dict]:
    """Return all records in the order they were written, see ``parse``; [] where there is no log yet."""
    path = RunDirectory(run_dir).log
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [record for line in lines if (record := parse(line)) is not None]


def parse(line: bytes) -> dict | None:
    """Return a line's record; None for a line that ``append`` would not have written, or not to its end."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # a ValueError covers JSON and UTF-8 errors
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    if "step" in record and whole(record["step"]) is None:
        return None
    for name in _REQUIRED.get(record["event"], ()):
        if not isinstance(record.get(name), int if name == "step" else str):
            return None
    return record


def last_step(records: Iterable[dict], stage: str) -> int | None:
    """Return the last step of a stage with metrics that no "resume" has dropped; None where there is none."""
    last: int | None = None
    for record in records:
        if record.get("stage") == stage and last is not None and record["event"] == "resume":
            last = min(last, record["step"]) or None
        elif record.get("stage") == stage and record["event"] == "metrics":
            last = max(last or 0, record["step"])
    return last


def series(records: Iterable[dict], stage: str, key: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of one metric, ascending in step; null becomes NaN, so that a plot shows a gap.

    A "resume" record drops the stage's values of later steps. Of two records of one step the last counts.
    """
    values: dict[int, float] = {}
    for record in records:
        if record.get("stage") != stage:
            continue
        if record["event"] == "resume":
            values = {step: value for step, value in values.items() if step <= record["step"]}
        elif record["event"] == "metrics" and key in record:
            found = number(record[key])
            values[record["step"]] = math.nan if found is None else found
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def keys(records: Iterable[dict], stage: str, prefix: str = "") -> list[str]:
    """Return the names that a stage logged and that begin with ``prefix``, in order of appearance."""
    found: dict[str, None] = {}
    for record in records:
        if record["event"] == "metrics" and record.get("stage") == stage:
            found.update(dict.fromkeys(key for key in record if key.startswith(prefix)))
    return [key for key in found if key not in ("time", "event", "stage", "step")]


def ended(stages: Iterable[dict], configured: Any, summary: bool) -> bool:
    """Return whether a run has ended: its newest stage is done, and it wrote a summary or did all its stages.

    Args:
        stages: the "stage" records in their order. configured: ``run.stages`` of the config, which may hold anything.
        summary: whether summary.json is there.
    """
    found = list(stages)
    if not found:
        return summary
    status = {str(record.get("name")): record.get("status") for record in found}
    wanted = configured if isinstance(configured, list) else []
    every = bool(wanted) and all(isinstance(name, str) and status.get(name) == "done" for name in wanted)
    return found[-1].get("status") == "done" and (summary or every)


def stage_seconds(records: Iterable[dict]) -> dict[str, float]:
    """Return the seconds of each stage that is done, summed over its runs."""
    seconds: dict[str, float] = {}
    for record in records:
        if record["event"] == "stage" and record["status"] == "done":
            seconds[record["name"]] = seconds.get(record["name"], 0.0) + (number(record.get("seconds")) or 0.0)
    return seconds
