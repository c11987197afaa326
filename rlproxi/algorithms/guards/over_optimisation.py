"""Over-optimisation: the training reward climbs while what is not optimised falls (Goodhart's law; Gao et al.,
arXiv 2210.10760, measure it for language models). A pure observer of evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluated:
    """One evaluation on the fixed held-out prompts: means and standard errors, and diversity and distance to data if known."""

    iteration: int
    train: float
    heldout: float
    sem: float
    distance: float | None = None
    diversity: float | None = None


_UNSEEN = (
    ", while the held-out reward is {now.heldout:.3f}, which may not see it: look at the pictures; raise the algorithm's "
    "anchor or kl_coef, or lower its lr"
)


class OverOptimisation:
    """Remembers the best evaluation and tells when training has gone past it.

    The alarm: since the best held-out score, the held-out score has fallen by more than ``sigmas`` standard errors of
    the difference, and the training reward has not fallen. A fall of both is a collapse, not over-optimisation, but
    the best is behind it just the same: ``patience`` counts evaluations in a row below the best by that much.

    The evaluations share prompts and seeds, so the true error of a difference is smaller than the one used here
    (independent samples): the alarm is late rather than false.

    A judge does not see everything: where the distance to the data has grown to ``drift`` times its smallest value, or the
    diversity fallen to ``sameness`` of its largest, that is told too, whatever the judge says. It ends nothing.

    Args:
        sigmas: how sure the fall has to be.
        patience: so many evaluations in a row below the best and the run had better stop; None never says so.
        drift, sameness: None looks at no distance, at no diversity.
    """

    def __init__(
        self,
        sigmas: float = 2.0,
        patience: int | None = None,
        drift: float | None = None,
        sameness: float | None = None,
    ):
        self.sigmas = sigmas
        self.patience = patience
        self.drift = drift
        self.best: Evaluated | None = None
        self.sameness = sameness
        self.nearest: Evaluated | None = None
        self.widest: Evaluated | None = None
        self.below = 0

    def see(self, now: Evaluated) -> str | None:
        """Takes the next evaluation; returns the alarm's words, or None. ``best is now`` if it is the best so far."""
        # All look at each evaluation, to remember it.
        told = [self._look_at_reward(now), self._look_at_distance(now), self._look_at_diversity(now)]
        return next((words for words in told if words), None)

    def _look_at_distance(self, now: Evaluated) -> str | None:
        if self.drift is None or now.distance is None:
            return None
        if self.nearest is None or now.distance < self.nearest.distance:
            self.nearest = now
        near = self.nearest
        if now.distance <= self.drift * near.distance:
            return None
        return (
            f"drift: the distance to the data went from {near.distance:.3f} at iteration {near.iteration} to "
            f"{now.distance:.3f} at {now.iteration}{_UNSEEN.format(now=now)} (evaluate.alarm_drift)"
        )

    def _look_at_diversity(self, now: Evaluated) -> str | None:
        if self.sameness is None or now.diversity is None:
            return None
        if self.widest is None or now.diversity > self.widest.diversity:
            self.widest = now
        wide = self.widest
        if now.diversity >= self.sameness * wide.diversity:
            return None
        return (
            f"sameness: the diversity of a prompt's samples fell from {wide.diversity:.3f} at iteration {wide.iteration} to "
            f"{now.diversity:.3f} at {now.iteration}{_UNSEEN.format(now=now)} (evaluate.alarm_sameness)"
        )

    def _look_at_reward(self, now: Evaluated) -> str | None:
        if self.best is None or now.heldout > self.best.heldout:
            self.best, self.below = now, 0
            return None
        best = self.best
        fall, error = best.heldout - now.heldout, math.hypot(best.sem, now.sem)
        if fall <= self.sigmas * error:
            self.below = 0
            return None
        self.below += 1
        told = (
            f"the held-out reward fell from {best.heldout:.3f} at iteration {best.iteration} to {now.heldout:.3f} at "
            f"{now.iteration} (standard error of the difference {error:.3f})"
        )
        if now.train >= best.train:
            return (
                f"over-optimisation: {told}, while the training reward went from {best.train:.3f} to {now.train:.3f}; "
                "lower grpo.lr or raise grpo.kl_coef"
            )
        return f"collapse: {told}, and the training reward with it, from {best.train:.3f} to {now.train:.3f}; lower grpo.lr"

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` is used up."""
        return self.patience is not None and self.below >= self.patience
