"""Which rows of which shards make batch number b. A seed decides it, and no earlier batch has to be read for it.

An epoch takes the shards in a new order, ``window`` of them at a time. Each bucket's rows are shuffled within a window.
The rows of the windows follow each other, and every ``batch_size`` of them are a batch, so a batch may begin with a few
rows of the window before. The batches that end in one window come in random order. The rows of a bucket that are left
at the end of an epoch are not used in it; another epoch leaves other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..seeds import Purpose, rng
from .buckets import Size

#: Shards that are mixed: enough to mix sources, few enough to stay in a node's page cache.
WINDOW = 16


@dataclass(frozen=True)
class BatchRows:
    """The rows of one global batch: (shard, row within the shard's bucket) for each sample."""

    epoch: int
    bucket: Size
    rows: list[tuple[int, int]]

    def share(self, rank: int, world: int) -> list[tuple[int, int]]:
        """The rows of one of ``world`` ranks: equal parts, in order."""
        count = len(self.rows) // world
        return self.rows[rank * count : (rank + 1) * count]


class Order:
    """The batches of all epochs, by number, of ``batch_size`` rows for all ranks together.

    ``index``: for each shard, the number of rows in each bucket. Raises ValueError if no bucket fills a batch.
    """

    def __init__(self, index: Sequence[Mapping[Size, int]], batch_size: int, seed: int, window: int = WINDOW):
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.buckets = sorted({bucket for shard in index for bucket in shard})
        counts = [[shard.get(bucket, 0) for bucket in self.buckets] for shard in index]
        self.rows = np.array(counts, np.int64).reshape(len(index), len(self.buckets))
        totals = self.rows.sum(0)
        self.batches_per_epoch = int((totals // batch_size).sum())
        #: The number of rows in buckets with fewer rows than a batch, which no epoch uses.
        self.never_used = int(totals[totals < batch_size].sum())
        if not self.batches_per_epoch:
            filled = ", ".join(f"{h}x{w}: {n}" for (h, w), n in zip(self.buckets, totals, strict=True)) or "none"
            remedy = "add data, lower pretrain.batch_size, or set data.buckets=false"
            raise ValueError(f"no bucket fills a batch of {batch_size} (rows in each: {filled}): {remedy}")
        # Only the newest are kept. Plain dictionaries, so that an order can be sent to other processes.
        self._epochs: dict[int, _Epoch] = {}
        self._shuffles: dict[tuple[int, int, int], np.ndarray] = {}

    def batch(self, number: int) -> BatchRows:
        """Batch ``number`` = 0, 1, 2, ... of the endless sequence of epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        full = self.plan(epoch).rows_before // self.batch_size  # batches of each bucket that end before each window
        before = full.sum(1)
        window = int(np.searchsorted(before, place, "right")) - 1
        ends = enumerate(zip(full[window], full[window + 1], strict=True))
        pairs = [(bucket, chunk) for bucket, (first, last) in ends for chunk in range(first, last)]
        shuffled = rng(self.seed, Purpose.BATCHES, epoch, window).permutation(len(pairs))
        bucket, chunk = pairs[shuffled[place - before[window]]]
        return BatchRows(epoch, self.buckets[bucket], self._rows(epoch, bucket, chunk))

    def plan(self, epoch: int) -> _Epoch:
        """The windows of an epoch."""
        if epoch not in self._epochs:
            shards = rng(self.seed, Purpose.SHARDS, epoch).permutation(len(self.rows))
            windows = [shards[i : i + self.window] for i in range(0, len(shards), self.window)]
            rows_before = np.zeros((len(windows) + 1, len(self.buckets)), np.int64)
            rows_before[1:] = np.cumsum([self.rows[window].sum(0) for window in windows], 0)
            self._epochs = {epoch: _Epoch(windows, rows_before)}
        return self._epochs[epoch]

    def _rows(self, epoch: int, bucket: int, chunk: int) -> list[tuple[int, int]]:
        """Rows [chunk * batch_size, ...) of a bucket's sequence over the windows."""
        before = self.plan(epoch).rows_before[:, bucket]
        at, end, rows = chunk * self.batch_size, (chunk + 1) * self.batch_size, []
        while at < end:
            window = int(np.searchsorted(before, at, "right")) - 1
            stop = min(end, int(before[window + 1]))
            rows += self._shuffled(epoch, window, bucket)[at - before[window] : stop - before[window]].tolist()
            at = stop
        return [(shard, row) for shard, row in rows]

    def _shuffled(self, epoch: int, window: int, bucket: int) -> np.ndarray:
        """[n, 2] (shard, row) of a bucket in a window, shuffled."""
        name = (epoch, window, bucket)
        if name not in self._shuffles:
            if len(self._shuffles) >= 4 * len(self.buckets):  # a batch may reach back into windows before its own
                del self._shuffles[next(iter(self._shuffles))]
            shards = self.plan(epoch).windows[window]
            counts = self.rows[shards, bucket]
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            pairs = np.stack([np.repeat(shards, counts), np.arange(counts.sum()) - starts], 1)
            self._shuffles[name] = rng(self.seed, Purpose.ROWS, *name).permutation(pairs)
        return self._shuffles[name]


@dataclass(frozen=True)
class _Epoch:
    """The shards of each window of an epoch, and each bucket's rows in the windows before, [windows + 1, buckets]."""

    windows: list[np.ndarray]
    rows_before: np.ndarray
