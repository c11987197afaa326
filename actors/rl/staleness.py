"""The rules of staleness: what may be dispatched, handed over, trained on and committed. No Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StalenessPolicy:
    """At most ``bound`` versions of the weights lie between sampling and training.

    Version v is the weights after v iterations. Iteration i that trains on groups of version v is i - v versions stale.
    ``bound`` 0 is the synchronous loop: the weights that iteration i updates also sample it.
    """

    bound: int

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise ValueError(f"the staleness bound is {self.bound}; it counts versions and cannot be negative")

    def allows(self, iteration: int, version: int) -> bool:
        """Whether weights of ``version`` may sample groups of ``iteration``, and the iteration train on them."""
        return 0 <= iteration - version <= self.bound


class ByteBudget:
    """Bounds the bytes in flight. One iteration always passes, however large, so that the loop cannot deadlock."""

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0

    def admits(self, size: int) -> bool:
        """Whether ``size`` more bytes fit, or nothing is in flight."""
        return self.used == 0 or self.used + size <= self.limit

    def take(self, size: int) -> None:
        """Count ``size`` bytes as in flight."""
        self.used += size

    def give_back(self, size: int) -> None:
        """Free ``size`` bytes. Raises ValueError where fewer were taken."""
        if size > self.used:
            raise ValueError(f"{size} bytes given back where {self.used} were taken")
        self.used -= size


@dataclass(frozen=True)
class Stamp:
    """What a group carries from dispatch to training: the attempt, its iteration, and the version that made it."""

    attempt: int
    iteration: int
    version: int


class Ledger:
    """The learner's version, the iterations in flight, and the stamps that are still of use.

    An *attempt* lasts from one ``begin`` of the learner to the next. A restarted learner trains the same iterations
    again, with weights that need not be the same to the bit. So a later attempt uses nothing of an earlier one: it is
    not handed over, trained on or committed.

    Args:
        policy, limit: the bounds on staleness and on bytes in flight. size: bytes of one iteration. They are taken at
            once, because the learner gives them back only when it has the whole iteration.
    """

    def __init__(self, policy: StalenessPolicy, limit: int, size: int):
        self.policy, self.budget, self.size = policy, ByteBudget(limit), size
        self.attempt, self.version, self.next = 0, 0, 0  # next: the first iteration that is not dispatched

    def begin(self, iteration: int) -> int:
        """A learner starts at ``iteration``, with that version's weights. Returns the number of its attempt."""
        self.attempt += 1
        self.version = self.next = iteration
        self.budget.used = 0
        return self.attempt

    def within_bound(self) -> bool:
        """Whether the next iteration may be sampled by the newest weights."""
        return self.policy.allows(self.next, self.version)

    def has_room(self) -> bool:
        """Whether the bytes of one more iteration fit."""
        return self.budget.admits(self.size)

    def dispatch(self) -> Stamp:
        """Take the next iteration into flight; returns the stamp of all its groups.

        Raises RuntimeError where the bounds do not allow it.
        """
        if not (self.within_bound() and self.has_room()):
            raise RuntimeError(
                f"iteration {self.next} dispatched at version {self.version} with {self.budget.used} bytes in flight"
            )
        stamp = Stamp(self.attempt, self.next, self.version)
        self.budget.take(self.size)
        self.next += 1
        return stamp

    def in_flight(self, stamp: Stamp) -> bool:
        """Whether a group of this stamp is of use: of this attempt, and of no iteration that was committed."""
        return stamp.attempt == self.attempt and self.version <= stamp.iteration < self.next

    def check(self, iteration: int, stamps: Iterable[Stamp]) -> None:
        """Raises RuntimeError unless ``iteration`` may be trained on groups of these stamps."""
        for stamp in stamps:
            if not (
                self.in_flight(stamp) and stamp.iteration == iteration and self.policy.allows(iteration, stamp.version)
            ):
                raise RuntimeError(f"iteration {iteration} of attempt {self.attempt} was given a group of {stamp}")

    def commit(self, iteration: int, attempt: int) -> None:
        """The learner has trained on ``iteration``, and published version ``iteration + 1``.

        Raises RuntimeError, and changes nothing, where it is another iteration's turn, or where the learner of
        ``attempt`` was replaced.
        """
        if attempt != self.attempt:
            raise RuntimeError(
                f"iteration {iteration} is committed by the learner of attempt {attempt}, which attempt {self.attempt} "
                "replaced"
            )
        if not (iteration == self.version < self.next):
            raise RuntimeError(f"iteration {iteration} is committed, where iteration {self.version} is trained")
        self.budget.give_back(self.size)
        self.version += 1
