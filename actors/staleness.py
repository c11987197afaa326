"""May this group be dispatched, may it be trained on? Pure: no Ray, no clock, no I/O."""

from __future__ import annotations

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
