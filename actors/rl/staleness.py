"""What may be dispatched, handed over, trained on and committed. Pure: no Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StalenessPolicy:
    """Version v is the weights after v iterations; iteration i trained on v's groups is i - v versions stale.

    ``bound`` 0 is the synchronous loop: iteration i is sampled by the weights that it will update.
    """

    bound: int

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise ValueError(f"the staleness bound is {self.bound}; it counts versions and cannot be negative")

    def may_dispatch(self, iteration: int, version: int) -> bool:
        """Whether groups of ``iteration`` may be sampled now, by weights of ``version``."""
        return 0 <= iteration - version <= self.bound

    def may_train(self, iteration: int, group_version: int) -> bool:
        """Whether ``iteration`` may train on a group that ``group_version`` made."""
        return 0 <= iteration - group_version <= self.bound


class ByteBudget:
    """Bounds the bytes in flight. One iteration is always let through, however large: no deadlock."""

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0

    def admits(self, size: int) -> bool:
        return self.used == 0 or self.used + size <= self.limit

    def take(self, size: int) -> None:
        self.used += size

    def give_back(self, size: int) -> None:
        if size > self.used:
            raise ValueError(f"{size} bytes given back where {self.used} were taken")
        self.used -= size


@dataclass(frozen=True)
class Stamp:
    """What a group carries from its dispatch to its training: whose it is, and the weights that made it."""

    life: int
    iteration: int
    version: int


class Ledger:
    """The learner's version, the iterations in flight, and the stamps that are still of use.

    A *life* lasts from one ``begin`` of the learner to the next. A restarted learner trains the same iterations again,
    with weights that need not be the same to the bit, so nothing of an earlier life is handed over, trained on or
    committed in a later one.

    Args:
        policy, limit: the bounds on staleness and on bytes in flight. size: bytes of one iteration, which is admitted
            whole, because the learner gives bytes back only when it has all of it.
    """

    def __init__(self, policy: StalenessPolicy, limit: int, size: int):
        self.policy, self.budget, self.size = policy, ByteBudget(limit), size
        self.life, self.version, self.next = 0, 0, 0  # next: the first iteration that is not dispatched

    def begin(self, iteration: int) -> int:
        """A learner starts at ``iteration``, with that version's weights. Returns the number of its life."""
        self.life += 1
        self.version = self.next = iteration
        self.budget.used = 0
        return self.life

    def within_bound(self) -> bool:
        """Whether the next iteration may be sampled by the newest weights."""
        return self.policy.may_dispatch(self.next, self.version)

    def has_room(self) -> bool:
        """Whether the bytes of one more iteration fit."""
        return self.budget.admits(self.size)

    def dispatch(self) -> Stamp:
        """Takes the next iteration into flight; the stamp of all its groups. RuntimeError where that is not allowed."""
        if not (self.within_bound() and self.has_room()):
            raise RuntimeError(
                f"iteration {self.next} dispatched at version {self.version} with {self.budget.used} bytes in flight"
            )
        stamp = Stamp(self.life, self.next, self.version)
        self.budget.take(self.size)
        self.next += 1
        return stamp

    def in_flight(self, stamp: Stamp) -> bool:
        """Whether what carries the stamp is still waited for: of this life, and of no iteration that was committed."""
        return stamp.life == self.life and self.version <= stamp.iteration < self.next

    def check(self, iteration: int, stamps: Iterable[Stamp]) -> None:
        """Raises RuntimeError unless ``iteration`` may be trained on groups of these stamps."""
        for stamp in stamps:
            if not (
                self.in_flight(stamp)
                and stamp.iteration == iteration
                and self.policy.may_train(iteration, stamp.version)
            ):
                raise RuntimeError(f"iteration {iteration} of life {self.life} was given a group of {stamp}")

    def commit(self, iteration: int, life: int | None = None) -> None:
        """``iteration`` was trained on, and version ``iteration + 1`` is published.

        Raises RuntimeError where it was not its turn, or where a learner that was replaced says so (``life``: what
        ``begin`` told it). Nothing is changed then.
        """
        if life is not None and life != self.life:
            raise RuntimeError(
                f"iteration {iteration} is committed by the learner of life {life}, which life {self.life} replaced"
            )
        if not (iteration == self.version < self.next):
            raise RuntimeError(f"iteration {iteration} is committed, where iteration {self.version} is trained")
        self.budget.give_back(self.size)
        self.version += 1
