"""The alarm of over-optimisation: the training reward rises while a reward that is not optimised falls.

This is Goodhart's law; Gao et al., arXiv 2210.10760, measure it for language models. The guard only reads evaluations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

from ...config.algorithms import configured
from ...config.loading import Config


@dataclass(frozen=True)
class Evaluated:
    """One evaluation on the fixed held-out prompts: mean rewards, and distance to data and diversity if known.

    sem: the standard error of the held-out reward. A reward without a score is NaN.
    """

    iteration: int
    train: float
    heldout: float
    sem: float
    distance: float | None = None
    diversity: float | None = None


class OverOptimisation:
    """Remembers the best evaluation and raises an alarm when training has gone past it.

    The alarm: the held-out reward is more than ``alarm_sigmas`` standard errors of the difference below its best, and
    the training reward is not below its value of then. If both have fallen it is a collapse. ``patience`` counts
    evaluations in a row that far below the best, in both cases.

    The evaluations share prompts and seeds, so the true error of a difference is smaller than the one used here
    (independent samples): the alarm is late rather than false.

    A held-out reward does not see everything. So there is an alarm as well where the distance to the data has grown to
    ``alarm_drift`` times its smallest value, or the diversity has fallen to ``alarm_sameness`` of its largest. It stops
    no run, and needs no held-out reward.
    """

    def __init__(self, config: Config):
        self.settings = config.evaluate
        self.best: Evaluated | None = None
        self.extremes: dict[str, tuple[float, int]] = {}  # smallest distance, largest diversity, with their iterations
        self.below = 0
        self.judged = False  # whether the newest evaluation has both rewards
        self.remedy = f"lower rl.lr or {configured(config.run.algorithm).hold_back}"

    def see(self, now: Evaluated) -> str | None:
        """Take the next evaluation; return the alarm's message, or None. ``best is now`` if it is the best so far."""
        # Each check runs on each evaluation, because it also remembers it.
        self.judged = math.isfinite(now.heldout + now.train)
        messages = [
            self._check_reward(now) if self.judged else None,
            self._check_unseen(now, "drift", "distance", "the distance to the data", operator.gt),
            self._check_unseen(now, "sameness", "diversity", "the diversity of a prompt's samples", operator.lt),
        ]
        return next((message for message in messages if message), None)

    def _check_unseen(
        self, now: Evaluated, alarm: str, measure: str, what: str, worse: Callable[[float, float], bool]
    ) -> str | None:
        bound, value = getattr(self.settings, f"alarm_{alarm}"), getattr(now, measure)
        if bound is None or value is None:
            return None
        best, at = self.extremes.get(measure, (value, now.iteration))
        if worse(best, value):
            best, at = value, now.iteration
        self.extremes[measure] = best, at
        if not worse(value, bound * best):
            return None
        held = f"while the held-out reward is {now.heldout:.3f}, which may not see it"
        if math.isnan(now.heldout):
            held = "and there is no held-out score"
        return (
            f"{alarm}: {what} went from {best:.3f} at iteration {at} to {value:.3f} at {now.iteration}, {held}: "
            f"look at the images; {self.remedy} (evaluate.alarm_{alarm})"
        )

    def _check_reward(self, now: Evaluated) -> str | None:
        best = self.best
        if best is None or now.heldout > best.heldout:
            self.best, self.below = now, 0
            return None
        fall, error = best.heldout - now.heldout, math.hypot(best.sem, now.sem)
        if fall <= self.settings.alarm_sigmas * error:
            self.below = 0
            return None
        self.below += 1
        fell = (
            f"the held-out reward fell from {best.heldout:.3f} at iteration {best.iteration} to {now.heldout:.3f} at "
            f"{now.iteration} (standard error of the difference {error:.3f})"
        )
        trained = f"the training reward went from {best.train:.3f} to {now.train:.3f}"
        if now.train >= best.train:
            return f"over-optimisation: {fell}, while {trained}; {self.remedy}"
        return f"collapse: {fell}, and {trained}; lower rl.lr"

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` is used up; never at an evaluation without a reward."""
        patience = self.settings.patience
        return patience is not None and self.judged and self.below >= patience
