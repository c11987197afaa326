"""An asyncio loop whose clock jumps to the next timer: hours of waiting in milliseconds, the same every time.

``time.time()`` tells the loop's time meanwhile. Where nothing can happen any more and the work has not ended, it raises
``Deadlock`` instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any, Coroutine
from unittest import mock


class Deadlock(RuntimeError):
    """Everybody waits for somebody else."""


class _Selector(selectors.SelectSelector):
    """Instead of sleeping until the next timer, moves the clock there."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None):
        if timeout is None:
            raise Deadlock("nothing is left that could happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Threads that report back are not waited for: work that uses them belongs on another loop."""

    def __init__(self):
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(work: Coroutine, epoch: float = 1e9) -> Any:
    """Runs ``work`` to its end. Raises what it raises, or Deadlock. ``epoch``: what ``time.time()`` begins at."""
    loop = VirtualLoop()
    try:
        with mock.patch("time.time", lambda: epoch + loop.time()):
            return loop.run_until_complete(work)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
