"""Warnings while a run trains. Each guard reads an iteration's metrics and returns a message for the user, or None.

They read what all ranks know, so that all ranks decide alike. They remember nothing across a restart, so a problem that
persists is reported again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from ...config.guards import Guards
from ..base import Algorithm, AlgorithmStopped

_PER_STEP = "ratio/first_max/"


class Mismatch:
    """Rollout and learner disagree: before the first update, on samples of the same weights, some ratio is not 1.

    The message comes once, and again after a time without disagreement. ``tolerance`` is of |log-ratio|, ``key`` its
    config key.
    """

    def __init__(self, tolerance: float, key: str):
        self.tolerance, self.key, self.reported = tolerance, key, False

    def see(self, iteration: int, metrics: Mapping[str, float]) -> str | None:
        """Take the metrics of an iteration whose samples are of the learner's own weights."""
        found = {name.removeprefix(_PER_STEP): value for name, value in metrics.items() if name.startswith(_PER_STEP)}
        if not found:
            return None
        index = max(found, key=lambda name: found[name])
        reported, self.reported = self.reported, not found[index] <= self.tolerance
        if reported or not self.reported:
            return None
        return (
            f"iteration {iteration}: rollout and learner disagree before the first update, most at sampling step "
            f"{index}, by {found[index]:.2e} in the log-ratio ({self.key} = {self.tolerance:.0e}): check whether a "
            "rollout actor was restarted on another kind of chip, and set model.precision=float32 to rule out rounding"
        )


class FlatGroups:
    """Iterations in a row in which no group has rewards that differ. The message comes once in a row, at ``patience``.

    ``spread``: what the message advises to make them differ; see ``Algorithm.spread``.
    """

    def __init__(self, patience: int | None, spread: str = Algorithm.spread):
        self.patience, self.spread, self.row = patience, spread, 0

    def see(self, iteration: int, metrics: Mapping[str, float], groups: int) -> str | None:
        """Take the metrics of an iteration of so many groups."""
        flat, masked = metrics.get("advantages/zero_variance_groups"), metrics.get("groups/masked", 0.0)
        if flat is None or self.patience is None or masked >= groups:  # groups without scores tell nothing
            return None
        self.row = self.row + 1 if flat + masked >= groups else 0
        if self.row != self.patience:
            return None
        return (
            f"iteration {iteration}: not one of {groups} groups had rewards that differ, {self.row} iterations in a "
            "row (guards.flat_iterations): the policy cannot improve. Take a finer reward or harder prompts "
            f"(data.prompts), or {self.spread}"
        )


class FallingReward:
    """A training reward that has been falling for long, by medians, which single iterations do not move.

    Iterations are taken in windows. A window is low where its median is below the best window's by more than three
    standard errors of a median, from the spread inside the two (1.4826 MAD, times 1.2533/sqrt(n)). The message comes at
    the second low window in a row, and not again until the reward has recovered.

    ``hold_back``: what the message advises beside a lower rl.lr; see ``Algorithm.hold_back``.
    """

    def __init__(self, window: int | None, hold_back: str = Algorithm.hold_back):
        self.window, self.hold_back, self.low = window, hold_back, 0
        self.best: tuple[float, float, int] | None = None  # median, its standard error, iteration
        self.values: list[float] = []

    def see(self, iteration: int, reward: float | None) -> str | None:
        """Take an iteration's mean training reward; None or NaN is a missing one."""
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
            f"{now[0]:.4g}, and was {middle:.4g} up to iteration {at} (guards.falling_window): lower rl.lr or "
            f"{self.hold_back}, and look at the held-out reward and the images"
        )

    def _summary(self, values: list[float]) -> tuple[float, float]:
        """The median and its standard error."""
        middle = median(values)
        return middle, 1.4826 * median(abs(v - middle) for v in values) * 1.2533 / len(values) ** 0.5


class TrainingWarnings:
    """All guards of this module, as the config's section ``guards`` sets them and with the algorithm's advice."""

    def __init__(self, settings: Guards, algorithm: Algorithm):
        self.settings, key = settings, algorithm.ratio_tolerance
        self.mismatch: Mismatch | None = None
        if key is not None:
            self.mismatch = Mismatch(getattr(algorithm.settings, key), f"{algorithm.config.section}.{key}")
        self.flat = FlatGroups(settings.flat_iterations, algorithm.spread)
        self.falling = FallingReward(settings.falling_window, algorithm.hold_back)

    def see(self, iteration: int, metrics: Mapping[str, float], groups: int, fresh: bool) -> Iterator[str]:
        """The messages about an iteration of so many groups. ``fresh``: its samples are of the learner's own weights.

        Raises AlgorithmStopped with the message where the config says that the problem ends the run.
        """
        mismatch = self.mismatch.see(iteration, metrics) if self.mismatch and fresh else None
        for message, action, key in (
            (mismatch, self.settings.on_mismatch, "on_mismatch"),
            (self.flat.see(iteration, metrics, groups), self.settings.on_flat, "on_flat"),
            (self.falling.see(iteration, metrics.get("reward/mean")), "warn", ""),
        ):
            if message and action == "stop":
                raise AlgorithmStopped(f"{message} (guards.{key} = stop)")
            if message:
                yield message
