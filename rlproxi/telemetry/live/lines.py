"""The lines of a file that grows, read on from the last offset; and a few lines from all over a large file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: A longer line is no record of ours, and is never held in memory.
LINE_LIMIT = 1 << 20
_BLOCK = 1 << 18


class Lines:
    """The complete lines of the file ``path``, with their offsets; one of more than ``limit`` bytes comes empty.

    A file that has become shorter, or is another one, is read from the start again; ``again`` counts how often.
    ``offset`` is how far the file has been read, ``rest`` the last line, which may still be written.
    """

    def __init__(self, path: Path, limit: int = LINE_LIMIT):
        self.path, self.limit, self.again = path, limit, 0
        self._identity: int | None = None
        self._restart()

    def _restart(self) -> None:
        self.offset, self.rest, self._skipping = 0, b"", False

    def size(self) -> int:
        """The file's size in bytes; 0 if there is no file."""
        with suppress(OSError):
            return os.stat(self.path).st_size
        return 0

    def read(self) -> list[tuple[int, bytes]] | None:
        """The (offset, line) pairs that end in the next block; None at the end of the file."""
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
        start = self.offset - len(self.rest)
        self.offset += len(block)
        *whole, self.rest = (self.rest + block).split(b"\n")
        found = []
        for line in whole:
            too_long = self._skipping or len(line) > self.limit
            if line or too_long:
                found.append((start, b"" if too_long else line))
            self._skipping = False
            start += len(line) + 1
        if self._skipping or len(self.rest) > self.limit:
            self._skipping, self.rest = True, b""
        return found


def spread(path: Path, count: int, size: int, block: int = 1 << 13) -> Iterator[bytes]:
    """Lines from ``count`` places, spread evenly over the first ``size`` bytes of a file, in order.

    Of each place of ``block`` bytes it is the first whole line; of the file's beginning and end, 8 times as long, all.
    """
    with open(path, "rb", buffering=0) as file:
        reached = 0
        for i in range(count + 1):
            at = max(reached, (size - 8 * block) * i // count)
            file.seek(at)
            lines = file.read(8 * block if i in (0, count) else block).split(b"\n")
            # The first piece is the rest of a line, unless a line begins here; the last one may go on.
            kept = lines[:-1] if at in (0, reached) else lines[1:-1]
            yield from kept if i in (0, count) else kept[:1]
            reached = at + sum(len(line) + 1 for line in (lines[:-1] if i in (0, count) else lines[:-1][:2]))
