"""One curve in bounded memory: buckets of consecutive points, which are merged in pairs as the curve grows."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from operator import add

#: A curve has at most this many buckets, and half as many after a merge.
BUCKETS = 800
#: So many of the newest points are kept as they are, beside the buckets.
TAIL = 300


class Curve:
    """Points (step, value), ascending in step, in at most ``limit`` (even) buckets of ``stride`` points each.

    A bucket has its first and last step, and the mean, minimum and maximum of its values. With stride 1 nothing is
    lost. A value of None is a gap: it counts as a point of its bucket, but not in the mean.
    """

    def __init__(self, limit: int = BUCKETS, tail: int = TAIL):
        self.limit, self.stride = limit, 1
        self.first, self.last, self.size, self.count = (array("q") for _ in range(4))
        self.total, self.low, self.high = (array("d") for _ in range(3))
        self.tail: deque[tuple[int, float | None]] = deque(maxlen=tail)

    def __len__(self) -> int:
        return len(self.first)

    def add(self, step: int, value: float | None) -> None:
        """Append a point. A point whose step is known replaces the old one; an earlier step joins its bucket."""
        if self.last and step <= self.last[-1]:
            return self._again(step, value)
        self.tail.append((step, value))
        if len(self.first) >= self.limit and self.size[-1] >= self.stride:
            self._halve()
        if self.size and self.size[-1] < self.stride:
            self._merge_in(-1, step, value)
        else:
            self._insert(len(self.first), step, value)

    def cut(self, step: int) -> bool:
        """Drop the points behind ``step``; returns False if a bucket holds points of both sides, which then stays."""
        while self.first and self.first[-1] > step:
            for column in self._columns():
                column.pop()
        while self.tail and self.tail[-1][0] > step:
            self.tail.pop()
        if not self.last or self.last[-1] <= step:
            return True
        self.last[-1] = step
        return False

    def buckets(self) -> dict[str, int | list]:
        """The columns for a page: "stride", "x", the last step of each bucket, and "y", its mean (None in a gap).

        With a stride above 1 also "first", "low", "high", and "tail", the newest points as they are.
        """

        def short(value: float | None) -> float | None:
            return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")

        mean = [short(t / n) if n else None for t, n in zip(self.total, self.count, strict=True)]
        found: dict[str, int | list] = {"stride": self.stride, "x": self.last.tolist(), "y": mean}
        if self.stride == 1 and all(n <= 1 for n in self.size):
            return found
        return {
            **found,
            "first": self.first.tolist(),
            "low": [short(v) for v in self.low],
            "high": [short(v) for v in self.high],
            "tail": [[step, short(value)] for step, value in self.tail],
        }

    def _columns(self) -> tuple[array, ...]:
        return self.first, self.last, self.size, self.count, self.total, self.low, self.high

    def _insert(self, at: int, step: int, value: float | None) -> None:
        values = (0, 0.0, math.inf, -math.inf) if value is None else (1, value, value, value)
        cells = (step, step, 1, *values)
        for column, cell in zip(self._columns(), cells, strict=True):
            column.insert(at, cell)

    def _merge_in(self, at: int, step: int, value: float | None) -> None:
        self.size[at] += 1
        self.first[at] = min(self.first[at], step)
        self.last[at] = max(self.last[at], step)
        if value is not None:
            self.count[at] += 1
            self.total[at] += value
            self.low[at] = min(self.low[at], value)
            self.high[at] = max(self.high[at], value)

    def _again(self, step: int, value: float | None) -> None:
        for i, (known, _) in enumerate(self.tail):
            if known == step:
                self.tail[i] = (step, value)
        at = bisect_left(self.last, step)
        if self.size[at] == 1 and self.first[at] == step:
            for column in self._columns():
                column.pop(at)
            self._insert(at, step, value)
        elif self.stride == 1 and self.first[at] > step and len(self.first) < self.limit:
            self._insert(at, step, value)
        else:
            self._merge_in(at, step, value)

    def _halve(self) -> None:
        self.stride *= 2
        self.first, self.last = self.first[::2], self.last[1::2]
        self.low = array("d", map(min, self.low[::2], self.low[1::2]))
        self.high = array("d", map(max, self.high[::2], self.high[1::2]))
        for name in ("size", "count", "total"):
            column = getattr(self, name)
            setattr(self, name, array(column.typecode, map(add, column[::2], column[1::2])))
