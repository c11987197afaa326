"""Which updates are not made, and what follows when it happens again and again. Pure: no engine, no Ray, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...config.guards import Guards
from ..base import AlgorithmStopped

_REMEDY = (
    "set model.precision=float32 to see whether rounding is the cause, and look at the data and the rewards of that "
    "step"
)


class GoBack(Exception):
    """Training is to go on from the last good checkpoint, in words for the user.

    ``spoilt``: nothing was learnt since the newest checkpoint, which would lead to the same place: the one before it.
    """

    def __init__(self, words: str, spoilt: bool):
        super().__init__(words)
        self.spoilt = spoilt


class UpdateGuard:
    """Judges every update of every network, the same on every rank because what it sees is the same on every rank.

    Args:
        lr_key: the config key of the stage's learning rate, for its words.
        rollbacks: how many there were already; they keep the learning rate low.
    """

    def __init__(self, settings: Guards, lr_key: str, rollbacks: int = 0):
        self.settings, self.lr_key, self.rollbacks = settings, lr_key, rollbacks
        self.streaks: dict[str, int] = {}  # network -> updates skipped in a row
        self.learnt: set[str] = set()  # networks with an update since the newest checkpoint, or the start
        self.at_start = True  # there is no checkpoint to go back to

    @property
    def lr_scale(self) -> float:
        """What learning rates are multiplied by."""
        return self.settings.lr_factor**self.rollbacks

    @property
    def steady(self) -> bool:
        """Whether the newest update of each network was made: a checkpoint of now is a good one."""
        return not any(self.streaks.values())

    def refuse(self, metrics: Mapping[str, float]) -> str | None:
        """Why an update with these metrics (over all ranks) should not be made; None where nothing speaks against it.

        Raises AlgorithmStopped where guards.on_ratio says so.
        """
        s = self.settings
        for key, value, bound, what in (
            ("max_log_ratio", metrics.get("ratio/max_log"), s.max_log_ratio, "the largest |log-ratio|"),
            ("max_clip_fraction", metrics.get("clip_fraction"), s.max_clip_fraction, "the share of clipped ratios"),
        ):
            if value is not None and bound is not None and value > bound:
                words = (
                    f"{what} is {value:.3g} (guards.{key} = {bound:g}): the policy has left the one that sampled; "
                    f"lower {self.lr_key}, or use fewer grpo.updates_per_step or a smaller grpo.max_staleness"
                )
                if s.on_ratio == "stop":
                    raise AlgorithmStopped(words)
                return words
        return None

    def made(self, network: str) -> None:
        """An update of the network was made."""
        self.streaks[network] = 0
        self.learnt.add(network)

    def skipped(self, step: int, network: str, why: str) -> str:
        """An update of the network, in the step of this number, was not made; returns words for the run log.

        Raises GoBack or AlgorithmStopped for the last that may be skipped in a row.
        """
        s = self.settings
        self.streaks[network] = count = self.streaks.get(network, 0) + 1
        words = (
            f"step {step}: an update of {network!r} is skipped, {count} in a row (guards.skips_in_a_row = "
            f"{s.skips_in_a_row}): {why}"
        )
        if count < s.skips_in_a_row:
            return words
        if s.on_nonfinite == "stop":
            raise AlgorithmStopped(
                f"{words}. Training ends here (guards.on_nonfinite = stop): lower {self.lr_key}, or {_REMEDY}"
            )
        spoilt = network not in self.learnt
        if spoilt and self.at_start:
            raise AlgorithmStopped(
                f"{words}. Not one update of it was made, so {self.lr_key} has no part in it: {_REMEDY}"
            )
        if self.rollbacks >= s.max_rollbacks:
            raise AlgorithmStopped(
                f"{words}. It went back {self.rollbacks} times (guards.max_rollbacks), with {self.lr_key} "
                f"down to {self.lr_scale:g} of the config's: {_REMEDY}"
            )
        raise GoBack(words, spoilt)

    def went_back(self) -> None:
        """A rollback begins: from now on the learning rate is lower."""
        self.rollbacks += 1

    def begun(self, at_start: bool) -> None:
        """Training goes on from a checkpoint that was just loaded or written, or from the start."""
        self.at_start = at_start
        self.learnt.clear()
        self.streaks.clear()


def not_finite(norm: float | None, losses: int) -> str | None:
    """Words for ``losses`` losses, or a gradient of this norm, that are NaN or Inf; None where all is finite."""
    if losses:
        return f"{losses} of its losses are NaN or Inf"
    if norm is not None and not math.isfinite(norm):
        return f"its gradient is NaN or Inf (grad_norm {norm})"
    return None
