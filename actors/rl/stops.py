"""Why a run stops: what roles, ranks and driver tell each other. Imports nothing of the project."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Cause(str, Enum):
    """What kind of stop it is, which decides what the driver does next (``actors.run.lifecycle``)."""

    ENDED = ""  #: Nothing can be done: the run ends with the reason.
    LOST = "lost"  #: The conductor or the weight store died or hangs: new ones go on from the last checkpoint.
    OUT_OF_MEMORY = "out_of_memory"  #: A forward did not fit: the stage goes on with smaller micro-batches.


@dataclass(frozen=True)
class Stop:
    """A stop of the run. ``reason``: a message for the user."""

    reason: str
    cause: Cause = Cause.ENDED


class RoleLost(RuntimeError):
    """A rank fails with this when a role is lost: Ray Train restarts the rank, which then finds the new role."""


class Overdue:
    """Tells when a condition has held for longer than ``limit_s`` seconds without a break."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self.limit_s, self.clock = limit_s, clock
        self.since: float | None = None

    def __call__(self, holds: bool) -> bool:
        """Takes whether the condition holds now; returns whether it has held for too long."""
        if not holds:
            self.since = None
        elif self.since is None:
            self.since = self.clock()
        return self.since is not None and self.clock() - self.since > self.limit_s
