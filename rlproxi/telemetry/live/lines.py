"""The lines of a file that grows, read on from where one stopped; and a few lines from all over a large one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

#: A longer line is no record of ours: it is passed over and counted, and never held in memory.
LINE_LIMIT = 1 << 20
_BLOCK = 1 << 18


class Lines:
    """Complete lines of ``path`` with their offsets. What has no line end yet waits, as a writer may be at it.

    ``offset`` is how far the file has been read, ``dropped`` the number of lines longer than ``limit``. A file that
    has become shorter, or another one, is read from the start again, and ``again`` counts how often.
    """

    def __init__(self, path: Path, limit: int = LINE_LIMIT):
        self.path, self.limit = path, limit
        self.dropped = self.again = 0
        self._identity: int | None = None
        self._restart()

    def _restart(self) -> None:
        self.offset, self._rest, self._skipping = 0, b"", False

    def size(self) -> int:
        """Bytes in the file now; 0 where there is none."""
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0

    def read(self) -> list[tuple[int, bytes]] | None:
        """The next (offset, line) pairs, those that end in the next block; None at the end of what is there."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size < self.offset or self._identity not in (None, found.st_ino):
                    self._restart()
                    self.again += 1
                self._identity = found.st_ino
                file.seek(self.offset)
                block = file.read(_BLOCK)
        except OSError:  # not there yet, or not readable now
            return None
        return self._split(block) if block else None

    def _split(self, block: bytes) -> list[tuple[int, bytes]]:
        start = self.offset - len(self._rest)
        self.offset += len(block)
        *whole, self._rest = (self._rest + block).split(b"\n")
        found = []
        for line in whole:
            if self._skipping or len(line) > self.limit:
                self.dropped += 1
                self._skipping = False
            elif line:
                found.append((start, line))
            start += len(line) + 1
        if self._skipping or len(self._rest) > self.limit:
            self._skipping, self._rest = True, b""
        return found


def spread(path: Path, count: int, size: int, block: int = 1 << 13) -> Iterator[bytes]:
    """Lines from ``count`` places evenly over the first ``size`` bytes of a file, in order: the first whole line of
    each place, and all of the beginning's and the end's."""
    with open(path, "rb", buffering=0) as file:
        reached = 0
        for i in range(count + 1):
            at = max(reached, (size - 8 * block) * i // count)
            file.seek(at)
            lines = file.read(8 * block if i in (0, count) else block).split(b"\n")
            # The first piece is the rest of a line, unless a line begins here; the last one may go on.
            kept = lines[:-1] if at in (0, reached) else lines[1:-1]
            for line in kept if i in (0, count) else kept[:1]:
                yield line
            reached = at + sum(len(line) + 1 for line in (lines[:-1] if i in (0, count) else lines[:-1][:2]))
