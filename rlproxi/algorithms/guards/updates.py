"""Which updates are skipped, and when skipped ones roll training back or end it. No engine, no Ray, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...config.guards import Guards
from ..base import AlgorithmStopped

_REMEDY = "set model.precision=float32 to rule out rounding, and look at the data and the rewards of that step"


class GoBack(Exception):
    """Training must go back to the last good checkpoint. The message is for the user.

    ``spoilt``: no update was made since the newest checkpoint, so that one would fail again: take the one before it.
    """

    def __init__(self, message: str, spoilt: bool):
        super().__init__(message)
        self.spoilt = spoilt


class UpdateGuard:
    """Decides which updates are made. All ranks decide alike, because all see the same metrics.

    Args:
        lr_key: the config key of the stage's learning rate, for messages.
        rollbacks: how many there were already; each lowers the learning rate.
    """

    def __init__(self, settings: Guards, lr_key: str, rollbacks: int = 0):
        self.settings, self.lr_key, self.rollbacks = settings, lr_key, rollbacks
        self.streaks: dict[str, int] = {}  # network -> updates skipped in a row
        self.trained: set[str] = set()  # networks with an update made since the newest checkpoint, or the start
        self.at_start = True  # there is no checkpoint to go back to

    @property
    def lr_scale(self) -> float:
        """The factor on the learning rates."""
        return self.settings.lr_factor**self.rollbacks

    @property
    def steady(self) -> bool:
        """Whether the newest update of each network was made, so that a checkpoint written now is a good one."""
        return not any(self.streaks.values())

    def refuse(self, metrics: Mapping[str, float]) -> str | None:
        """Why an update with these metrics (over all ranks) must be skipped; None where it may be made.

        Raises AlgorithmStopped instead where guards.on_ratio is 'stop'.
        """
        s = self.settings
        for key, value, bound, what in (
            ("max_log_ratio", metrics.get("ratio/max_log"), s.max_log_ratio, "the largest |log-ratio|"),
            ("max_clip_fraction", metrics.get("clip_fraction"), s.max_clip_fraction, "the share of clipped ratios"),
        ):
            if value is not None and bound is not None and value > bound:
                message = (
                    f"{what} is {value:.3g} (guards.{key} = {bound:g}): the policy has left the one that sampled; "
                    f"lower {self.lr_key}, or use fewer rl.updates_per_step or a smaller rl.max_staleness"
                )
                if s.on_ratio == "stop":
                    raise AlgorithmStopped(message)
                return message
        return None

    def made(self, network: str) -> None:
        """Note that an update of the network was made."""
        self.streaks[network] = 0
        self.trained.add(network)

    def skipped(self, step: int, network: str, why: str) -> str:
        """Note that an update of the network was skipped in this step; return the message for the run log.

        Raises GoBack or AlgorithmStopped when it was the last that may be skipped in a row.
        """
        s = self.settings
        self.streaks[network] = count = self.streaks.get(network, 0) + 1
        message = (
            f"step {step}: an update of {network!r} is skipped, {count} in a row (guards.skips_in_a_row = "
            f"{s.skips_in_a_row}): {why}"
        )
        if count < s.skips_in_a_row:
            return message
        if s.on_nonfinite == "stop":
            raise AlgorithmStopped(
                f"{message}. Training ends here (guards.on_nonfinite = stop): lower {self.lr_key}, or {_REMEDY}"
            )
        spoilt = network not in self.trained
        if spoilt and self.at_start:
            raise AlgorithmStopped(f"{message}. No update of it was made, so {self.lr_key} is not the cause: {_REMEDY}")
        if self.rollbacks >= s.max_rollbacks:
            raise AlgorithmStopped(
                f"{message}. Training went back {self.rollbacks} times (guards.max_rollbacks), with {self.lr_key} "
                f"down to {self.lr_scale:g} of the config's: {_REMEDY}"
            )
        raise GoBack(message, spoilt)

    def went_back(self) -> None:
        """Note that a rollback begins: from now on the learning rate is lower."""
        self.rollbacks += 1

    def begun(self, at_start: bool) -> None:
        """Note that training goes on from a checkpoint just loaded or written, or from the start."""
        self.at_start = at_start
        self.trained.clear()
        self.streaks.clear()


def not_finite(norm: float | None, losses: int) -> str | None:
    """The message for ``losses`` losses, or a gradient of this norm, that are NaN or Inf; None where all is finite."""
    if losses:
        return f"{losses} of its losses are NaN or Inf"
    if norm is not None and not math.isfinite(norm):
        return f"its gradient is NaN or Inf (grad_norm {norm})"
    return None
