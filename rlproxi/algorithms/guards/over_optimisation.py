"""The alarm of over-optimisation: the training reward rises while a reward that is not optimised falls.

This is Goodhart's law; Gao et al., arXiv 2210.10760, measure it for language models. The guard only reads evaluations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...config.algorithms import AlgorithmClass, configured
from ...config.loading import Config


@dataclass(frozen=True)
class Evaluated:
    """One evaluation on the fixed held-out prompts: mean rewards, and distance to data and diversity if known.

    sem: the standard error of the held-out reward.
    """

    iteration: int
    train: float
    heldout: float
    sem: float
    distance: float | None = None
    diversity: float | None = None


class OverOptimisation:
    """Remembers the best evaluation and raises an alarm when training has gone past it.

    The alarm: the held-out reward is more than ``sigmas`` standard errors of the difference below its best, and the
    training reward is not below its value of then. If both have fallen it is a collapse. ``patience`` counts
    evaluations in a row that far below the best, in both cases.

    The evaluations share prompts and seeds, so the true error of a difference is smaller than the one used here
    (independent samples): the alarm is late rather than false.

    A held-out reward does not see everything. So there is an alarm as well where the distance to the data has grown to
    ``drift`` times its smallest value, or the diversity has fallen to ``sameness`` of its largest. It stops no run.

    Args:
        sigmas: standard errors that the fall has to exceed.
        patience: the run should stop after so many evaluations in a row below the best; None: never.
        drift, sameness: None: the distance, or the diversity, raises no alarm.
        hold_back: what the messages advise beside a lower rl.lr; see ``Algorithm.hold_back``.
    """

    def __init__(
        self,
        sigmas: float = 2.0,
        patience: int | None = None,
        drift: float | None = None,
        sameness: float | None = None,
        hold_back: str = AlgorithmClass.hold_back,
    ):
        self.sigmas = sigmas
        self.patience = patience
        self.drift = drift
        self.best: Evaluated | None = None
        self.sameness = sameness
        self.nearest: tuple[float, int] | None = None  # the smallest distance, and its iteration
        self.widest: tuple[float, int] | None = None  # the largest diversity, and its iteration
        self.below = 0
        self.remedy = f"lower rl.lr or {hold_back}"

    @classmethod
    def of(cls, config: Config) -> OverOptimisation:
        """The guard of a run's evaluations."""
        e, kind = config.evaluate, configured(config.run.algorithm)
        return cls(e.alarm_sigmas, e.patience, e.alarm_drift, e.alarm_sameness, kind.hold_back)

    def see(self, now: Evaluated) -> str | None:
        """Take the next evaluation; return the alarm's message, or None. ``best is now`` if it is the best so far."""
        # Each check runs on each evaluation, because it also remembers it.
        messages = [self._check_reward(now), self._check_distance(now), self._check_diversity(now)]
        return next((message for message in messages if message), None)

    def _unseen(self, now: Evaluated) -> str:
        return (
            f"while the held-out reward is {now.heldout:.3f}, which may not see it: look at the images; {self.remedy}"
        )

    def _check_distance(self, now: Evaluated) -> str | None:
        if self.drift is None or now.distance is None:
            return None
        if self.nearest is None or now.distance < self.nearest[0]:
            self.nearest = now.distance, now.iteration
        nearest, at = self.nearest
        if now.distance <= self.drift * nearest:
            return None
        return (
            f"drift: the distance to the data went from {nearest:.3f} at iteration {at} to "
            f"{now.distance:.3f} at {now.iteration}, {self._unseen(now)} (evaluate.alarm_drift)"
        )

    def _check_diversity(self, now: Evaluated) -> str | None:
        if self.sameness is None or now.diversity is None:
            return None
        if self.widest is None or now.diversity > self.widest[0]:
            self.widest = now.diversity, now.iteration
        widest, at = self.widest
        if now.diversity >= self.sameness * widest:
            return None
        return (
            f"sameness: the diversity of a prompt's samples fell from {widest:.3f} at iteration "
            f"{at} to {now.diversity:.3f} at {now.iteration}, {self._unseen(now)} (evaluate.alarm_sameness)"
        )

    def _check_reward(self, now: Evaluated) -> str | None:
        if self.best is None or now.heldout > self.best.heldout:
            self.best, self.below = now, 0
            return None
        best = self.best
        fall, error = best.heldout - now.heldout, math.hypot(best.sem, now.sem)
        if fall <= self.sigmas * error:
            self.below = 0
            return None
        self.below += 1
        fell = (
            f"the held-out reward fell from {best.heldout:.3f} at iteration {best.iteration} to {now.heldout:.3f} at "
            f"{now.iteration} (standard error of the difference {error:.3f})"
        )
        if now.train >= best.train:
            return (
                f"over-optimisation: {fell}, while the training reward went from {best.train:.3f} to {now.train:.3f}; "
                f"{self.remedy}"
            )
        return f"collapse: {fell}, and the training reward fell from {best.train:.3f} to {now.train:.3f}; lower rl.lr"

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` is used up."""
        return self.patience is not None and self.below >= self.patience
