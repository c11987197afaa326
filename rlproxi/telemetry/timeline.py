"""The timeline of roles: ``timeline.jsonl``, one JSON object for each iteration.

{"time": unix seconds, "stage", "step", "spans": [[role, who, phase, start in unix seconds, seconds], ...]} has the
spans that ended since the line before. Roles are in ``ROLES`` and phases in ``PHASES``. ``who`` is the number of an
actor or rank, or the scorer's name. A role is idle where no span covers it, or one of the phase wait. Of a step that
was repeated after a restart the last line counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..files import append_line
from ..run_directory import RunDirectory

ROLES = ("rollout", "reward", "learner", "weights", "evaluation")
PHASES = ("sample", "score", "train", "wait", "sync", "checkpoint", "evaluate")


class Span(NamedTuple):
    """A time in which ``who`` of a ``role`` was in ``phase``: ``seconds`` from ``start`` (unix seconds)."""

    role: str
    who: int | str
    phase: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """When it ended, in unix seconds."""
        return self.start + self.seconds


class Diary:
    """The spans of one thread or asyncio loop: the open ones, and the newest ``most`` that ended and were not taken."""

    def __init__(self, most: int = 100_000):
        self.most = most
        self.ended: list[Span] = []
        self.open: dict[object, Span] = {}

    @contextlib.contextmanager
    def span(self, role: str, who: int | str, phase: str) -> Iterator[None]:
        """Note the time inside the block as a span, whether it ends with an error or without."""
        key, begun = object(), time.time()
        self.open[key] = Span(role, who, phase, begun, 0.0)
        try:
            yield
        finally:
            if self.open.pop(key, None):  # unless it was cleared meanwhile
                self.note(role, who, phase, begun, time.time() - begun)

    def note(self, role: str, who: int | str, phase: str, start: float, seconds: float) -> None:
        """Add a span that has ended."""
        self.ended.append(Span(role, who, phase, start, seconds))
        if len(self.ended) > self.most:
            del self.ended[: self.most // 2]

    def going_on(self, now: float) -> list[Span]:
        """Return the open spans as if they ended at ``now`` (unix seconds)."""
        return [span._replace(seconds=max(0.0, now - span.start)) for span in self.open.values()]

    def take(self) -> list[Span]:
        """Return the spans that have ended since the last call."""
        taken, self.ended = self.ended, []
        return taken

    def clear(self) -> None:
        """Drop all spans, as after a restart."""
        self.ended.clear()
        self.open.clear()


def idle_shares(
    spans: Iterable[Span], begun: float, ended: float, lanes: dict[str, Sequence[int | str]]
) -> dict[str, float]:
    """Return role -> the share of [begun, ended] in which its actors were idle, the mean over ``lanes[role]``.

    An actor without spans is idle throughout. Its spans may overlap, and may reach beyond the window.
    """
    if ended <= begun:
        return {}
    by_lane: dict[tuple[str, int | str], list[tuple[float, float]]] = {}
    for span in spans:
        if span.phase != "wait":
            clipped = max(begun, span.start), min(ended, span.end)
            if clipped[0] < clipped[1]:
                by_lane.setdefault((span.role, span.who), []).append(clipped)
    return {
        role: 1 - sum(_covered(by_lane.get((role, who), [])) for who in whos) / (len(whos) * (ended - begun))
        for role, whos in lanes.items()
        if whos
    }


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the intervals' union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def joined(spans: Iterable[Span], least: float = 0.02) -> list[Span]:
    """Return fewer spans that look the same, for a stage of many short steps.

    Waits shorter than ``least`` seconds are left out. Spans of one actor and phase with a shorter gap become one.
    """
    kept: list[Span] = []
    last: dict[tuple, int] = {}
    for span in sorted(spans, key=lambda span: span.start):
        if span.phase == "wait" and span.seconds < least:
            continue
        lane = span.role, span.who
        before = kept[last[lane]] if lane in last else None
        if before is not None and before.phase == span.phase and span.start - before.end < least:
            kept[last[lane]] = before._replace(seconds=max(before.end, span.end) - before.start)
        else:
            last[lane] = len(kept)
            kept.append(span)
    return kept


def append(run_dir: str | os.PathLike, stage: str, step: int, spans: Iterable[Span]) -> None:
    """Append an iteration's line. Raises OSError."""
    rows = [[s.role, s.who, s.phase, round(s.start, 4), round(s.seconds, 4)] for s in spans]
    line = json.dumps({"time": round(time.time(), 3), "stage": stage, "step": step, "spans": rows}, ensure_ascii=False)
    append_line(RunDirectory(run_dir).timeline, line)


def read(run_dir: str | os.PathLike) -> list[dict]:
    """Return all lines, see ``parse``; [] where there is no file."""
    path = RunDirectory(run_dir).timeline
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [found for line in lines if (found := parse(line)) is not None]


def parse(line: bytes) -> dict | None:
    """Return a line's values, spans as ``Span``; None for a line that ``append`` would not have written."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        found = json.loads(line)
        if type(found["stage"]) is str and type(found["step"]) is int:
            return {**found, "spans": [_span(*row) for row in found["spans"]]}
    return None


def _span(role: str, who: int | str, phase: str, start: float, seconds: float) -> Span:
    """Return a checked ``Span``. Raises ValueError, TypeError or OverflowError for values that make none."""
    named = type(role) is type(phase) is str and type(who) in (int, str)
    if not (named and math.isfinite(start) and math.isfinite(seconds)):
        raise ValueError("no span")
    return Span(role, who, phase, float(start), float(seconds))
