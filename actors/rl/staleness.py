"""The rules of staleness: what may be dispatched, handed over, trained on and committed. No Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stamp:
    """What a group carries from dispatch to training: the attempt, its iteration, and the version that made it."""

    attempt: int
    iteration: int
    version: int


class Ledger:
    """The learner's version, the iterations in flight, and the stamps that are still of use.

    Version v is the weights after v iterations. Iteration i that trains on groups of version v is i - v versions stale.

    An *attempt* lasts from one ``begin`` of the learner to the next. A restarted learner's weights need not be the same
    to the bit, so a later attempt uses nothing of an earlier one.

    Args:
        bound: at most so many versions lie between sampling and training. 0 is the synchronous loop: the weights that
            iteration i updates also sample it.
        limit: the bound on bytes in flight. size: bytes of one iteration.
    """

    def __init__(self, bound: int, limit: int, size: int):
        self.bound, self.limit, self.size = bound, limit, size
        self.attempt, self.version, self.next = 0, 0, 0  # next: the first iteration that is not dispatched

    def begin(self, iteration: int) -> int:
        """A learner starts at ``iteration``, with that version's weights. Returns the number of its attempt."""
        self.attempt += 1
        self.version = self.next = iteration
        return self.attempt

    @property
    def used(self) -> int:
        """Bytes in flight. An iteration takes all of its own when it is dispatched, until it is committed."""
        return self.size * (self.next - self.version)

    def within_bound(self) -> bool:
        """Whether the next iteration may be sampled by the newest weights."""
        return self.next - self.version <= self.bound

    def has_room(self) -> bool:
        """Whether one more iteration fits. One always passes, however large, so that the loop cannot deadlock."""
        return self.used == 0 or self.used + self.size <= self.limit

    def dispatch(self) -> Stamp:
        """Take the next iteration into flight; returns the stamp of all its groups.

        Raises RuntimeError where the bounds do not allow it.
        """
        if not (self.within_bound() and self.has_room()):
            raise RuntimeError(
                f"iteration {self.next} dispatched at version {self.version} with {self.used} bytes in flight"
            )
        self.next += 1
        return Stamp(self.attempt, self.next - 1, self.version)

    def in_flight(self, stamp: Stamp) -> bool:
        """Whether a group of this stamp is of use: of this attempt, and of no iteration that was committed."""
        return stamp.attempt == self.attempt and self.version <= stamp.iteration < self.next

    def check(self, iteration: int, stamps: Iterable[Stamp]) -> None:
        """Raises RuntimeError unless ``iteration`` may be trained on groups of these stamps."""
        for stamp in stamps:
            fresh = 0 <= iteration - stamp.version <= self.bound
            if not (fresh and stamp.iteration == iteration and self.in_flight(stamp)):
                raise RuntimeError(f"iteration {iteration} of attempt {self.attempt} was given a group of {stamp}")

    def commit(self, iteration: int, attempt: int) -> None:
        """The learner has trained on ``iteration``, and published version ``iteration + 1``.

        Raises RuntimeError, and changes nothing, for another iteration's turn or a replaced learner's ``attempt``.
        """
        if attempt != self.attempt:
            raise RuntimeError(
                f"iteration {iteration} is committed by the learner of attempt {attempt}, which attempt {self.attempt} "
                "replaced"
            )
        if not (iteration == self.version < self.next):
            raise RuntimeError(f"iteration {iteration} is committed, where iteration {self.version} is trained")
        self.version += 1
