"""The kinds of a stop that the driver knows a remedy for (see ``Scribe.stop``); every other ends the run."""

from rlproxi.errors import OUT_OF_MEMORY

#: An actor that the run cannot do without has died or hangs: new ones go on from the last checkpoint.
LOST = "lost"


class RoleLost(RuntimeError):
    """What a learner's rank fails with where it is told so: Ray Train starts it again, and it goes on with new ones."""


__all__ = ["LOST", "OUT_OF_MEMORY", "RoleLost"]
