"""Scaling advice: which split of GPUs balances the roles of a run, from what the run measured.

The model is small on purpose. An iteration is M micro-batches. A rollout actor takes a seconds for one, a scorer's
replica b seconds, the learner's ranks share c seconds of work, and every iteration ends with s seconds of
synchronisation. With n_r actors, n_w replicas and n_l ranks, an iteration takes, in seconds:

    rollouts  R = ceil(M / n_r) a        rewards  W = ceil(M / n_w) b        learner  L = c / n_l + s
    synchronous (max_staleness 0)        max(R + b, a + W) + L
    overlapped                           max(R, W, L)

The first is a two-stage pipeline, exact for one actor and one replica, then the learner; the second is limited by its
slowest role. For many micro-batches and cheap rewards the best split of N GPUs has n_r : n_l = sqrt(Ma) : sqrt(c) where
roles wait for each other, and Ma : c where they overlap; here whole actors and ranks are counted instead.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import NamedTuple

from rlproxi.config.loading import Config, load_config
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry.runlog import last_step, read, series

#: The most places of a role that are tried, and the most GPUs that advice is given for.
LIMIT = 64


class Split(NamedTuple):
    """The number of rollout actors, of replicas of each scorer, and of learner ranks."""

    rollout: int
    reward: int
    learner: int


@dataclass(frozen=True)
class IterationCosts:
    """What one iteration costs, in seconds.

    rollout, reward: of one actor or replica for one micro-batch. learner: of all ranks together. sync: at the end of
    the iteration. split, step: what it was measured with, and how long it took. gpus: what one of each role takes,
    (rollout, reward, learner). overlapped: max_staleness > 0. updates: optimizer steps of an iteration.
    """

    micro_batches: int
    rollout: float
    reward: float
    learner: float
    sync: float
    step: float
    split: Split
    gpus: tuple[float, float, float]
    overlapped: bool
    updates: int = 1

    def seconds(self, split: Split, overlapped: bool | None = None) -> float:
        """Return the step time to expect of another split, in seconds. ``overlapped`` None: as measured."""
        m, a, b = self.micro_batches, self.rollout, self.reward
        sampled, scored = math.ceil(m / split.rollout) * a, math.ceil(m / split.reward) * b
        learner = self.learner / split.learner + self.sync
        if self.overlapped if overlapped is None else overlapped:
            return max(sampled, scored, learner)
        return max(sampled + b, a + scored) + learner

    def used(self, split: Split) -> float:
        """Return the GPUs of a split; where no role uses one, its processes."""
        if not any(self.gpus):
            return float(sum(split))
        return sum(count * each for count, each in zip(split, self.gpus, strict=True))

    def ranks(self) -> list[int]:
        """Return the numbers of learner ranks that give each rank an equal share of an iteration's micro-batches."""
        return [n for n in range(1, min(LIMIT, self.micro_batches) + 1) if self.micro_batches % (n * self.updates) == 0]


def measured(run_dir: str | os.PathLike, config: Config | None = None) -> IterationCosts | None:
    """Return what the stage rl of a run directory measured: medians over its iterations, without the first.

    None where there is nothing to balance: no iterations in the log, or an algorithm whose learner samples for itself.
    Raises FileNotFoundError or ConfigError where the directory has no config.yaml that can be read.
    """
    config = config or load_config(RunDirectory(run_dir).config)
    records = read(run_dir)
    found: dict[str, float] = {}
    for key in ("rollout", "reward", "train", "sync", "step"):
        values = [v for v in series(records, "rl", f"seconds/{key}")[1] if v == v]
        if not values:
            return None
        found[key] = median(values[1:] or values)
    if not last_step(records, "rl"):
        return None
    r, w, m = config.resources, config.rewards, config.rl.micro_batches
    scorers = [w.replicas_of(x) for x in w.train]
    replicas = min(x.least for x in scorers)
    # In the log, waiting for a free replica counts as scoring. The bound: all replicas score during all of the step.
    scoring = min(found["reward"], replicas * found["step"])
    return IterationCosts(
        micro_batches=m,
        rollout=min(found["rollout"], r.rollout_actors * found["step"]) / m,
        reward=scoring / m,
        learner=found["train"] * r.learner_workers,
        sync=found["sync"],
        step=found["step"],
        split=Split(r.rollout_actors, replicas, r.learner_workers),
        gpus=(r.rollout_gpus, sum(x.gpus for x in scorers), r.learner_gpus),
        overlapped=config.rl.max_staleness > 0,
        updates=config.rl.updates_per_step,
    )


def best(what: IterationCosts, places: float, overlapped: bool | None = None) -> Split | None:
    """Return the fastest split of at most ``places`` GPUs (processes, where no role uses a GPU); None where none fits.

    Of equally fast splits it is the smallest. A role without a GPU beside roles with one keeps its number: only GPUs
    are scarce.
    """
    free = not any(what.gpus)

    def counts(role: int, now: int, most: int) -> list[int]:
        each = 1.0 if free else what.gpus[role]
        return [now] if not each else list(range(1, min(most, LIMIT, int(places / each + 1e-9)) + 1))

    m = what.micro_batches
    learner = [n for n in what.ranks() if n in counts(2, what.split.learner, m)]
    tried = product(counts(0, what.split.rollout, m), counts(1, what.split.reward, m), learner)
    splits = (Split(*each) for each in tried)
    fitting = [split for split in splits if what.used(split) <= places + 1e-9]
    ordered = sorted((round(what.seconds(split, overlapped), 9), what.used(split), split) for split in fitting)
    return ordered[0][-1] if ordered else None


def describe(what: IterationCosts, places: float | None = None) -> list[str]:
    """Return lines for the user: what was measured, and the best splits of the run's GPUs and of twice as many."""
    unit = "GPUs" if any(what.gpus) else "processes"
    had, now = what.used(what.split), what.seconds(what.split)
    lines = [
        f"scaling    an iteration took {what.step:.2f} s on {_describe(what.split)} ({had:g} {unit}): rollouts "
        f"{what.micro_batches} x {what.rollout:.2f} s, rewards {what.micro_batches} x {what.reward:.2f} s, learner "
        f"{what.learner:.2f} s in all, sync {what.sync:.2f} s"
    ]
    for number in [places] if places is not None else [had, 2 * had]:
        for overlapped in (False, True):
            split = best(what, number, overlapped)
            if split is None:
                lines.append(f"scaling    {number:g} {unit}: too few for one of each role")
                break
            then = what.seconds(split, overlapped)
            how = "max_staleness 1 or more" if overlapped else "max_staleness 0"
            gain = f"{now / then:.2f} x as fast as this split's {now:.2f} s" if then else "nothing to gain"
            lines.append(f"scaling    {number:g} {unit}, {how}: {_describe(split)}, {then:.2f} s an iteration ({gain})")
    return lines


def _describe(split: Split) -> str:
    named = zip(split, ("rollout actor", "reward replica", "learner rank"), strict=True)
    return ", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in named)


def advise(run_dir: str | os.PathLike, places: float | None = None) -> list[str]:
    """Return ``describe``'s lines for a run directory, or one line that says why there is no advice."""
    what = measured(run_dir)
    if what is None:
        return ["scaling    no advice: the run has no iterations whose samples rollout actors drew and rewards scored"]
    return describe(what, places)
