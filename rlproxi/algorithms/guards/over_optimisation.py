"""The alarm of over-optimisation: the training reward rises while a reward that is not optimised falls.

This is Goodhart's law; Gao et al., arXiv 2210.10760, measure it for language models. The guard only reads evaluations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...config.algorithms import configured
from ...config.loading import Config

#: What images may have in common that the data do not have, over the data's power: a grid of 2 % of the range adds 0.2
#: at the period of 8 pixels, where portraits have most, and more at shorter ones. Of n real images it is about 1/n with
#: an exponential tail: of the 14 figures of an evaluation the largest passes 12/n once in ten thousand.
COMMON, CHANCE = 0.12, 12
#: Images from which on the power itself needs no allowance for chance; of 16 real ones it reached 2.2 times the data's.
ENOUGH = 32


@dataclass(frozen=True)
class Evaluated:
    """One evaluation on the fixed held-out prompts: mean rewards, and what is known of its images.

    sem: the standard error of the held-out reward. A reward without a score is NaN. distance: to the data. diversity,
    data_diversity: of a prompt's samples, and of as many real images. spectrum: ``evaluation.spectrum``'s.
    """

    iteration: int
    train: float
    heldout: float
    sem: float
    distance: float | None = None
    diversity: float | None = None
    data_diversity: float | None = None
    spectrum: Mapping[str, Any] | None = None


class OverOptimisation:
    """Remembers the best evaluation and raises an alarm when training has gone past it.

    The alarm: the held-out reward is more than ``alarm_sigmas`` standard errors of the difference below its best, and
    the training reward is not below its value of then. If both have fallen it is a collapse. ``patience`` counts
    evaluations in a row that far below the best, in both cases.

    The evaluations share prompts and seeds, so the true error of a difference is smaller than the one used here
    (independent samples): the alarm is late rather than false.

    A held-out reward does not see everything. So there is an alarm as well where the distance to the data has grown to
    ``alarm_drift`` times its smallest value, where the diversity has fallen to ``alarm_sameness`` of its largest (or of
    real images' diversity, if that is less: a start that draws poor pictures too has more), or where a grid lies over
    the images (``alarm_grid``). It stops no run, and needs no held-out reward.
    """

    def __init__(self, config: Config):
        self.settings = config.evaluate
        self.best: Evaluated | None = None
        self.extremes: dict[str, tuple[float, int]] = {}  # smallest distance, largest diversity, with their iterations
        self.smallest: dict[tuple[str, str, str], float] = {}  # (ratio or common, direction, period) -> smallest value
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
            self._check_grid(now),
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
        level = best
        if measure == "diversity" and now.data_diversity is not None:
            level = min(best, now.data_diversity)
        if not worse(value, bound * level):
            return None
        return self._unseen(
            now, alarm, f"{what} went from {best:.3f} at iteration {at} to {value:.3f} at {now.iteration}"
        )

    def _check_grid(self, now: Evaluated) -> str | None:
        """Look for a period whose power grew beyond the data's, or that all images have in common, unlike the data."""
        bound, spectrum = self.settings.alarm_grid, now.spectrum
        if bound is None or spectrum is None:
            return None
        common = max(COMMON, CHANCE / spectrum["images"])
        bound *= max(1.0, (ENOUGH / spectrum["images"]) ** 0.5)
        worst: tuple[float, str, str] | None = None  # how far beyond its bound, and where
        for kind, figures, level in (("ratio", spectrum, bound), ("common", spectrum["common"], common)):
            for direction in ("rows", "columns"):
                for period, value in figures[direction].items():
                    key = (kind, direction, period)
                    least = self.smallest[key] = min(value, self.smallest.get(key, value))
                    excess = min(value / level, value / max(bound * least, 1e-12))
                    if excess > 1 and (worst is None or excess > worst[0]):
                        worst = (excess, direction, period)
        if worst is None:
            return None
        _, direction, period = worst
        value = spectrum[direction][period]
        return self._unseen(
            now,
            "grid",
            f"a grid of period {period} pixels lies over the {direction} of the images at iteration {now.iteration} "
            f"({value:.2f} of the data's power there, {self.smallest['ratio', direction, period]:.2f} at the least; "
            f"{spectrum['common'][direction][period]:.2f} is common to all images, and not to the data's)",
        )

    def _unseen(self, now: Evaluated, alarm: str, what: str) -> str:
        held = f"while the held-out reward is {now.heldout:.3f}, which may not see it"
        if math.isnan(now.heldout):
            held = "and there is no held-out score"
        return f"{alarm}: {what}, {held}: look at the images; {self.remedy} (evaluate.alarm_{alarm})"

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
