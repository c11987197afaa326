"""What a run notices about itself while it trains: pure observers of an iteration's metrics, each with words for the user.

They look at what all ranks know, so that all ranks come to the same end, and remember nothing across a restart: what goes on
being wrong is told again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from ...config.guards import Guards
from ..base import AlgorithmStopped

_PER_STEP = "ratio/first_max/"


class Mismatch:
    """Rollout against learner: before the first update on samples of the very same weights every ratio is 1.

    Told once, and anew after it was well again. ``tolerance`` is of |log-ratio|.
    """

    def __init__(self, tolerance: float):
        self.tolerance, self.told = tolerance, False

    def see(self, iteration: int, metrics: Mapping[str, float]) -> str | None:
        """Takes the metrics of an iteration whose samples are of the learner's own weights."""
        found = {name.removeprefix(_PER_STEP): value for name, value in metrics.items() if name.startswith(_PER_STEP)}
        if not found:
            return None
        index = max(found, key=found.get)
        if found[index] <= self.tolerance:
            self.told = False
            return None
        if self.told:
            return None
        self.told = True
        return (
            f"iteration {iteration}: rollout and learner disagree before the first update, most at sampling step {index}, "
            f"by {found[index]:.2e} in the log-ratio (grpo.first_ratio_tolerance = {self.tolerance:.0e}), though the samples "
            "are of the same weights: see whether a rollout actor was restarted on another kind of chip, and set "
            "model.precision=float32 to rule out rounding"
        )


class FlatGroups:
    """Iterations in a row in which not one group has rewards that differ. Told once in a row, at ``patience``."""

    def __init__(self, patience: int | None):
        self.patience, self.row = patience, 0

    def see(self, iteration: int, metrics: Mapping[str, float], groups: int) -> str | None:
        flat, masked = metrics.get("advantages/zero_variance_groups"), metrics.get("groups/masked", 0.0)
        if flat is None or self.patience is None or masked >= groups:  # what has no score says nothing
            return None
        self.row = self.row + 1 if flat + masked >= groups else 0
        if self.row != self.patience:
            return None
        return (
            f"iteration {iteration}: not one of {groups} groups had rewards that differ, {self.row} iterations in a row "
            "(guards.flat_iterations): nothing is learnt. Take a finer reward or harder prompts (data.prompts), or a larger "
            "grpo.group_size; with grpo.same_noise=true set it to false"
        )


class FallingReward:
    """A training reward that has been falling for long: by medians, which single iterations do not move.

    Iterations are taken in windows. A window is low where its median is below the best window's by more than three standard
    errors of a median, from the spread inside the two (1.4826 MAD, times 1.2533/sqrt(n)). Two low windows in a row are told,
    and then nothing until the reward has recovered.
    """

    def __init__(self, window: int | None):
        self.window, self.best, self.low = window, None, 0
        self.values: list[float] = []

    def see(self, iteration: int, reward: float | None) -> str | None:
        """Takes an iteration's mean training reward; None or NaN is a missing one."""
        if self.window is None or reward is None or reward != reward:
            return None
        self.values.append(reward)
        if len(self.values) < self.window:
            return None
        now, self.values = self._summary(self.values), []
        if self.best is None or now[0] > self.best[0]:
            self.best, self.low = (*now, iteration), 0
            return None
        middle, spread, at = self.best
        self.low = self.low + 1 if middle - now[0] > 3 * (spread**2 + now[1] ** 2) ** 0.5 else 0
        if self.low != 2:
            return None
        return (
            f"iteration {iteration}: the training reward has been falling: its median over {self.window} iterations is "
            f"{now[0]:.4g}, and was {middle:.4g} up to iteration {at} (guards.falling_window): lower the algorithm's lr or raise its "
            "kl_coef or anchor, and look at the held-out reward and the pictures"
        )

    def _summary(self, values: list[float]) -> tuple[float, float]:
        """The median and its standard error."""
        middle = median(values)
        return middle, 1.4826 * median(abs(v - middle) for v in values) * 1.2533 / len(values) ** 0.5


class Watch:
    """All of them, by the config's section ``guards``."""

    def __init__(self, settings: Guards, tolerance: float | None):
        self.settings = settings
        self.mismatch = None if tolerance is None else Mismatch(tolerance)
        self.flat, self.falling = FlatGroups(settings.flat_iterations), FallingReward(settings.falling_window)

    def see(self, iteration: int, metrics: Mapping[str, float], groups: int, fresh: bool) -> Iterator[str]:
        """Words of what is wrong in an iteration of so many groups. ``fresh``: samples of the learner's own weights.

        Raises AlgorithmStopped with them where the config says that it ends the run.
        """
        mismatch = self.mismatch.see(iteration, metrics) if self.mismatch and fresh else None
        for words, action, key in (
            (mismatch, self.settings.on_mismatch, "on_mismatch"),
            (self.flat.see(iteration, metrics, groups), self.settings.on_flat, "on_flat"),
            (self.falling.see(iteration, metrics.get("reward/mean")), "warn", ""),
        ):
            if words and action == "stop":
                raise AlgorithmStopped(f"{words} (guards.{key} = stop)")
            if words:
                yield words
