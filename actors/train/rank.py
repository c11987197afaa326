"""A rank: one process of a Ray Train job, and the training loop that all stages share."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlproxi.algorithms.base import Algorithm, AlgorithmStopped
from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.guards.updates import GoBack, UpdateGuard
from rlproxi.algorithms.pretrain import Matching
from rlproxi.config.loading import Config
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.rewards.combine import mean_present
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry import timeline
from rlproxi.telemetry.timeline import Diary

from . import rollback
from .engine import Engine
from .saving import Checkpointer, RankPlace

#: Seconds between the lines that a stage without a conductor writes into the timeline.
_TIMELINE_EVERY = 10.0


def place_on_ray() -> RankPlace:
    """This process's place in its Ray Train job."""
    context = ray.train.get_context()
    return RankPlace(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


class Rank(ABC):
    """One rank of the stage pretrain or rl: its place, its arithmetic, its loop, its checkpoints.

    A subclass says where batches come from and who learns of their updates. It calls ``build`` at the end of its
    ``__init__``. ``run_log`` is the run-log actor.
    """

    #: Set by ``build``. Engines: one for each network that is trained, the first the one that is evaluated and saved.
    algorithm: Algorithm | Matching
    engines: dict[str, Engine]
    ema: EMA | None = None  # an average of the first network's weights

    def __init__(
        self, config: Config, run_dir: str | Path, stage: str, run_log: Any, place: RankPlace, checkpoint_every: int
    ):
        # Results depend on the thread count, so it is the config's and not the machine's.
        torch.set_num_threads(config.resources.threads)
        self.config, self.run_dir, self.stage, self.run_log = config, Path(run_dir), stage, run_log
        self.rank, self.world, self.device = place.rank, place.world, place.device
        self.checkpoint_every = checkpoint_every
        self.dtype = compute_dtype(config.model.precision, self.device)
        self.diary, self.timeline_written = Diary(), time.time()
        root = RunDirectory(run_dir).checkpoints(stage)
        self.checkpointer = Checkpointer(root, config, stage, place, checkpoint_every, run_log)
        self.guard = UpdateGuard(config.guards, f"{stage}.lr", rollback.count(root))
        self.unlogged = 0  # skipped updates that no metrics record has counted yet
        self.stopped = False
        self.leaving = False  # stopped from outside: the trained weights are saved, for a resume
        self.earliest = 0  # the first step that there are data for in this process

    @abstractmethod
    def build(self) -> None:
        """Makes the networks, their engines and the algorithm as training starts from them; also after a rollback."""

    @abstractmethod
    def next_batch(self, step: int) -> Any | None:
        """The batch that ``algorithm.updates`` takes; None ends training."""

    def save_own(self, folder: Path) -> None:
        """Rank 0 writes what is neither weights nor optimizer into ``folder``. No collective: it may raise OSError."""
        if self.ema is not None:
            save_file(self.ema.state_dict(), folder / "ema.safetensors")

    def load_own(self, folder: Path) -> None:
        """Every rank reads what ``save_own`` wrote."""
        if self.ema is not None:
            self.ema.load_state_dict(load_file(folder / "ema.safetensors"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs a metrics record of this stage, from rank 0. Waits until it is written: a checkpoint may follow."""
        if self.rank == 0:
            ray.get(self.run_log.append.remote("metrics", {"stage": self.stage, "step": step, **metrics}))

    def warn(self, message: str) -> None:
        """A warning in the run log and on the driver's stderr; from rank 0 only."""
        if self.rank == 0:
            self.run_log.announce.remote("warning", message)

    @property
    def engine(self) -> Engine:
        """The engine of the network that is evaluated and saved."""
        return next(iter(self.engines.values()))

    def close(self) -> None:
        """Frees the engines; the object is of no use afterwards."""
        for engine in self.engines.values():
            engine.close()

    def checkpoint(self, step: int) -> None:
        """Writes a checkpoint; a collective. After too many failures in a row training stops, with a reason."""
        self.or_stop(lambda: self.checkpointer.write(step, self.engines, self.save_own))

    def restore(self) -> int:
        """Loads the newest usable checkpoint; returns the steps it has behind it, 0 without one. A collective."""
        return self.checkpointer.restore(self.engines, self.load_own, self.algorithm.steps)

    # -- the one training loop --------------------------------------------------------------

    def run(self) -> None:
        """Trains from the newest checkpoint, or the start, to the last step; goes back where the guard says so."""
        start: int | None = self.restore()
        while start is not None:
            self.guard.begun(at_start=start == 0)
            start = self._train_from(start)
        if not self.stopped:
            self.finish()

    def _train_from(self, start: int) -> int | None:
        """Trains to the end (None), or to a rollback: the earlier step to go on from."""
        self.begin(start)
        due = False
        for step in range(start, self.algorithm.steps):
            with self._span("wait"):
                batch = self.next_batch(step)
            if batch is None:
                if self.leaving and step > start:
                    self.checkpoint(step)
                break
            metrics: dict[str, float] = {}
            try:
                with self._span("train"):
                    trained = self.or_stop(partial(self._update, step, batch, metrics))
            except GoBack as error:
                return self._go_back(error)
            if not (trained and self.or_stop(partial(self.updated, step, batch, metrics))):
                break
            # First: whoever dies between the two, no step that a checkpoint has behind it is missing in the log.
            self.done(step, batch, metrics)
            last = step + 1 == self.algorithm.steps
            due = due or (step + 1) % self.checkpoint_every == 0
            if last or (due and self.guard.steady):  # amid skipped updates the weights may be what is wrong
                with self._span("checkpoint"):
                    self.checkpoint(step + 1)
                due = False
                self.guard.begun(at_start=False)
        return None

    def _span(self, phase: str) -> AbstractContextManager[None]:
        return self.diary.span("learner", self.rank, phase)

    def _update(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
        """Makes the batch's updates; adds the mean of each metric over them (the maximum where its name says max).

        Names of metrics begin with the network's, but for the first network.
        """
        begun = time.time()
        first = next(iter(self.engines))
        seen: dict[str, list[float]] = {}
        if refused := self.refused(batch):
            self._judge(step, first, refused)
        for update in () if refused else self.algorithm.updates(batch):
            engine, lr = self.engines[update.network], update.lr * self.guard.lr_scale
            with autocast(self.dtype, self.device):
                done = engine.update(update.losses, lr, self.guard.refuse)
            for key, value in done.metrics.items():
                seen.setdefault(key if update.network == first else f"{update.network}/{key}", []).append(value)
            self._judge(step, update.network, done.skipped)
        for key, values in seen.items():
            metrics[key] = float(max(values)) if "max" in key else mean_present(np.array(values))
        metrics |= {"skipped_updates": float(self.unlogged), "rollbacks": float(self.guard.rollbacks)}
        metrics["seconds/train"] = time.time() - begun
        self.unlogged = 0

    def _judge(self, step: int, network: str, skipped: str | None) -> None:
        """Tells the guard whether an update was made. Raises GoBack or AlgorithmStopped after too many skipped ones."""
        if skipped is None:
            return self.guard.made(network)
        self.unlogged += 1
        self.warn(f"{self.stage}: {self.guard.skipped(step + 1, network, skipped)}")

    def refused(self, batch: Any) -> str | None:
        """Why nothing of the batch can be trained on; None where it can be. Here always None."""
        return None

    def _go_back(self, error: GoBack) -> int | None:
        """Restores the last good checkpoint, or the start; returns its step, None where the run ends. A collective."""
        self.guard.went_back()
        if self.rank == 0:
            rollback.remember(self.checkpointer.root, self.guard.rollbacks)
            if error.spoilt:
                rollback.set_aside(self.checkpointer.root, self.warn)
        dist.barrier()
        start = self.restore()
        rate = f"{self.guard.lr_scale:g} of {self.guard.lr_key}"
        words = f"{self.stage}: {error}. Going back to step {start}, with {rate} from now on (guards.lr_factor)"
        if start < self.earliest:
            self.stopped = True
            self.stop(AlgorithmStopped(f"{words}; this process has no data from there on: resume the run (--resume)"))
            return None
        if start == 0:  # no checkpoint: the weights are those of the last update that was made
            self.close()
            self.build()
        self.warn(words)
        return start

    def or_stop(self, work: Callable[[], None]) -> bool:
        """Does ``work``; False where it failed as it would after a restart: the run stops with its message."""
        try:
            work()
            return True
        except (AlgorithmStopped, FloatingPointError) as error:
            self.stopped = True
            self.stop(error)
            return False

    def begin(self, start: int) -> None:  # noqa: B027
        """Is called before the first step, which is ``start``."""

    def stop(self, error: Exception) -> None:
        """Stops the run: training cannot go on."""
        if self.rank == 0:
            ray.get(self.run_log.stop.remote(f"{self.stage}: {error}"))

    def updated(self, step: int, batch: Any, metrics: dict[str, float]) -> None:  # noqa: B027
        """Is called after the updates of a step; may add to the metrics."""

    def done(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
        """Is called after a step, before its checkpoint. Here rank 0 writes the timeline now and then."""
        last = step + 1 == self.algorithm.steps
        if self.config.telemetry.timeline and (last or time.time() - self.timeline_written > _TIMELINE_EVERY):
            self.timeline_written, spans = time.time(), timeline.joined(self.diary.take())
            try:
                if self.rank == 0:
                    timeline.append(self.run_dir, self.stage, step + 1, spans)
            except OSError as error:  # training goes on without
                self.timeline_written = math.inf
                self.run_log.warn.remote(f"telemetry: the timeline cannot be written: {error}")

    def finish(self) -> None:  # noqa: B027
        """Is called after the last step."""
