"""Scaling advice: from what a run measured to the split of GPUs that balances its roles, and the step time to expect.

The model is small on purpose. An iteration is M micro-batches. A rollout actor takes a seconds for one, a scorer's
replica b seconds, the learner's ranks share c seconds of work, and every iteration ends with s seconds of
synchronisation. With n_r actors, n_w replicas and n_l ranks:

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

from rlproxi.config.loading import Config, load_config
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry.runlog import last_step, read, series

#: The most places of a role that are tried, and the most GPUs that advice is given for.
LIMIT = 64


@dataclass(frozen=True)
class Split:
    """How many of each: rollout actors, replicas of each scorer, learner ranks."""

    rollout: int
    reward: int
    learner: int

    def __iter__(self):
        return iter((self.rollout, self.reward, self.learner))


@dataclass(frozen=True)
class Measured:
    """What one iteration costs. rollout, reward: seconds of one actor or replica for one micro-batch; learner: seconds
    of all ranks together; sync: seconds at the end of the iteration. gpus: what one of each role takes, (rollout,
    reward, learner). split and step: what it was measured with, and the seconds it took."""

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
        """The step time to expect of another split, in seconds."""
        m, a, b = self.micro_batches, self.rollout, self.reward
        sampled, scored = math.ceil(m / split.rollout) * a, math.ceil(m / split.reward) * b
        learner = self.learner / split.learner + self.sync
        if self.overlapped if overlapped is None else overlapped:
            return max(sampled, scored, learner)
        return max(sampled + b, a + scored) + learner

    def used(self, split: Split) -> float:
        """The GPUs of a split; where no role uses one, its processes."""
        if not any(self.gpus):
            return float(sum(split))
        return sum(count * each for count, each in zip(split, self.gpus))

    def ranks(self) -> list[int]:
        """Numbers of learner ranks that give each an equal share of an iteration's micro-batches."""
        return [n for n in range(1, min(LIMIT, self.micro_batches) + 1) if self.micro_batches % (n * self.updates) == 0]


def measured(run_dir: str | os.PathLike, config: Config | None = None) -> Measured | None:
    """What the stage rl of a run directory measured: medians over its iterations, the first left out.

    None where there is nothing to balance: no iterations in the log, or an algorithm whose learner samples for itself.
    Raises FileNotFoundError or ConfigError where the directory has no config.yaml that can be read.
    """
    config = config or load_config(RunDirectory(run_dir).config)
    records = read(run_dir)
    found = {}
    for key in ("rollout", "reward", "train", "sync", "step"):
        values = [v for v in series(records, "rl", f"seconds/{key}")[1] if v == v]
        found[key] = median(values[1:] or values) if values else None
    if any(value is None for value in found.values()) or not last_step(records, "rl"):
        return None
    r, w, m = config.resources, config.rewards, config.rl.micro_batches
    scorers = [w.replicas_of(x) for x in w.train]
    replicas = min(x.least for x in scorers)
    # Waiting for a place counts as scoring in the log; more than all replicas for all of the step it cannot be.
    scoring = min(found["reward"], replicas * found["step"])
    return Measured(
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


def best(what: Measured, places: float, overlapped: bool | None = None) -> Split | None:
    """The fastest split that takes at most ``places`` GPUs (or processes, where none uses a GPU); None where none fits.

    Of equally fast ones the one that takes fewest. A role without a GPU beside roles with one is not what is short: its
    number stays.
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
    return min(
        fitting,
        key=lambda split: (round(what.seconds(split, overlapped), 9), what.used(split), tuple(split)),
        default=None,
    )


def describe(what: Measured, places: float | None = None) -> list[str]:
    """Lines for the user: what was measured, and the best splits of as many GPUs as the run had, and twice as many."""
    unit = "GPUs" if any(what.gpus) else "processes"
    had = what.used(what.split)
    told = [
        f"scaling    an iteration took {what.step:.2f} s on {_told(what.split)} ({had:g} {unit}): rollouts "
        f"{what.micro_batches} x {what.rollout:.2f} s, rewards {what.micro_batches} x {what.reward:.2f} s, learner "
        f"{what.learner:.2f} s in all, sync {what.sync:.2f} s"
    ]
    for number in [places] if places is not None else [had, 2 * had]:
        for overlapped in (False, True):
            split = best(what, number, overlapped)
            if split is None:
                told.append(f"scaling    {number:g} {unit}: too few for one of each role")
                break
            now = what.seconds(what.split, what.overlapped)
            then = what.seconds(split, overlapped)
            how = "max_staleness 1 or more" if overlapped else "max_staleness 0"
            told.append(
                f"scaling    {number:g} {unit}, {how}: {_told(split)}, {then:.2f} s an iteration "
                f"({now / then:.2f} x as fast as this split's {now:.2f} s)"
                if then
                else f"scaling    {number:g} {unit}, {how}: {_told(split)}"
            )
    return told


def _told(split: Split) -> str:
    def several(count: int, word: str) -> str:
        return f"{count} {word}{'s' * (count != 1)}"

    words = ("rollout actor", "reward replica", "learner rank")
    return ", ".join(several(count, word) for count, word in zip(split, words))


def of_run(run_dir: str | os.PathLike, places: float | None = None) -> list[str]:
    """``describe`` of a run directory, or one line that says why there is no advice."""
    what = measured(run_dir)
    if what is None:
        return ["scaling    no advice: the run has no iterations whose samples rollout actors drew and rewards scored"]
    return describe(what, places)
