"""What every Ray Train rank of ours is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from rlproxi.algorithms.base import AlgorithmStopped
from rlproxi.algorithms.guards.updates import GoBack, UpdateGuard
from rlproxi.config.loading import Config
from rlproxi.models.folders import find_model
from rlproxi.models.loading import load_autoencoder, load_encoder, trainable, training_form
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.rewards.combine import mean_present
from rlproxi.telemetry import timeline
from rlproxi.telemetry.timeline import Diary

from . import checkpoints, rollback
from .engine import Engine
from .saving import Saved

#: Seconds between the lines that a stage without a conductor writes into the timeline.
_TIMELINE_EVERY = 10.0


class Rank(Saved):
    """One process of a Ray Train group: its place, its arithmetic, its loop, its checkpoints.

    A subclass says where batches come from and who is told of them, and sets in ``build`` its ``algorithm`` (``steps``, and
    ``updates`` of a batch) and ``engines`` (one for each network that is trained, the first the one that is saved), and
    ``checkpoint_every``. Where it has a state beside the engines', it overrides ``save_own`` and ``load_own``.
    """

    algorithm: Any
    engines: dict[str, Engine]
    checkpoint_every: int
    stopped = False
    leaving = False  # stopped from outside: what is trained is saved, to be gone on with
    earliest = 0  #: the first step that there are data for in this process

    def __init__(self, config: Config, run_dir: str, model_folder: str, stage: str, scribe: Any):
        import ray.train
        import ray.train.torch

        # Results depend on the thread count, so it is the config's and not the machine's.
        torch.set_num_threads(config.resources.threads)
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.config, self.stage, self.scribe = config, stage, scribe
        self.run_dir = Path(run_dir)
        self.diary, self.told = Diary(), time.time()
        self.dtype = compute_dtype(config.model.precision, self.device)
        self.origin = find_model(model_folder)
        self.encoder = load_encoder(self.origin, self.dtype).to(self.device)
        self.root = checkpoints.root(run_dir, stage)
        self.guard = UpdateGuard(config.guards, f"{stage}.lr", rollback.count(self.root))
        self.unlogged = 0  # skipped updates that no metrics record has told of

    def build(self) -> None:
        """Makes the networks, their engines and the algorithm, as training starts from them; a rollback may make them anew."""
        raise NotImplementedError

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A metrics record of this stage; from rank 0 only, which waits until it is in the log: a checkpoint may follow."""
        if self.rank == 0:
            import ray

            ray.get(self.scribe.append.remote("metrics", {"stage": self.stage, "step": step, **metrics}))

    @property
    def engine(self) -> Engine:
        """That of the network that is evaluated and saved."""
        return next(iter(self.engines.values()))

    def close(self) -> None:
        """Frees the engines; the object is of no use afterwards."""
        for engine in self.engines.values():
            engine.close()

    # -- the one training loop --------------------------------------------------------------

    def run(self) -> None:
        """From the last checkpoint (or the start) to the last step; back to an earlier one where the guard says so."""
        start: int | None = self.restore()
        while start is not None:
            self.guard.begun(at_start=start == 0)
            start = self._train_from(start)
        if not self.stopped:
            self.finish()

    def _train_from(self, start: int) -> int | None:
        """Trains to the end (None), or until updates were given up so often that training is to go on from an earlier step."""
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
                    trained = self.or_stop(lambda: metrics.update(self._update(step, batch)))
            except GoBack as error:
                return self._go_back(error)
            if not (trained and self.or_stop(lambda: self.updated(step, batch, metrics))):
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

    def _span(self, phase: str) -> ContextManager[None]:
        return self.diary.span("learner", self.rank, phase)

    def _update(self, step: int, batch: Any) -> dict[str, float]:
        """The batch's updates, one after another; the mean of each metric over them (the maximum where its name says max).
        Those of the first network have their plain names, the others' the network's before it."""
        begun = time.time()
        first = next(iter(self.engines))
        seen: dict[str, list[float]] = {}
        refused = self.refused(batch)
        if refused:
            self._judge(step, first, refused)
        for update in () if refused else self.algorithm.updates(batch):
            with autocast(self.dtype, self.device):
                done = self.engines[update.network].update(
                    update.losses, update.lr * self.guard.lr_scale, self.guard.refuse
                )
            for key, value in done.metrics.items():
                seen.setdefault(key if update.network == first else f"{update.network}/{key}", []).append(value)
            self._judge(step, update.network, done.skipped)
        metrics = {key: float(max(values)) if "max" in key else mean_present(values) for key, values in seen.items()}
        metrics |= {"skipped_updates": float(self.unlogged), "rollbacks": float(self.guard.rollbacks)}
        self.unlogged = 0
        return {**metrics, "seconds/train": time.time() - begun}

    def _judge(self, step: int, network: str, skipped: str | None) -> None:
        """Tells the guard what became of an update; GoBack or AlgorithmStopped may come of it."""
        if skipped is None:
            return self.guard.made(network)
        self.unlogged += 1
        self.warn(f"{self.stage}: {self.guard.skipped(step + 1, network, skipped)}")

    def refused(self, batch: Any) -> str | None:
        """Why nothing of the batch can be trained on; None where it can."""
        return None

    def _go_back(self, error: GoBack) -> int | None:
        """To the last good checkpoint, or the start; returns its step, None where the run ends. Every rank comes here alike."""
        self.guard.went_back()
        if self.rank == 0:
            rollback.remember(self.root, self.guard.rollbacks)
            if error.spoilt:
                rollback.set_aside(self.root, self.warn)
        dist.barrier()
        start = self.restore()
        told = (
            f"{self.stage}: {error}. Going back to step {start}, with {self.guard.lr_scale:g} of "
            f"{self.guard.lr_key} from now on (guards.lr_factor)"
        )
        if start < self.earliest:
            self.stopped = True
            self.stop(AlgorithmStopped(f"{told}; its data are not at hand here: resume the run (--resume)"))
            return None
        if start == 0:  # no checkpoint: the weights are those of the last update that was made
            self.close()
            self.build()
        self.warn(told)
        return start

    def warn(self, message: str) -> None:
        """A warning in the run log and on the driver's stderr; from rank 0 only."""
        if self.rank == 0:
            self.scribe.say.remote("warning", message)

    def or_stop(self, work: Callable[[], None]) -> bool:
        """Does ``work``; False where it ended in what would happen again after a restart: the user is told instead."""
        try:
            work()
            return True
        except (AlgorithmStopped, FloatingPointError) as error:
            self.stopped = True
            self.stop(error)
            return False

    def begin(self, start: int) -> None:
        """Before the first step, which is ``start``."""

    def next_batch(self, step: int) -> Any | None:
        """What ``algorithm.updates`` takes; None ends training."""
        raise NotImplementedError

    def stop(self, error: Exception) -> None:
        """Tells the user that training cannot go on."""
        import ray

        if self.rank == 0:
            ray.get(self.scribe.stop.remote(f"{self.stage}: {error}"))

    def updated(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
        """After the updates; may add to the metrics."""

    def done(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
        """Before the checkpoint, if one is due. Here, without a conductor, rank 0 writes the timeline now and then."""
        last = step + 1 == self.algorithm.steps
        if self.config.telemetry.timeline and (last or time.time() - self.told > _TIMELINE_EVERY):
            self.told, spans = time.time(), timeline.joined(self.diary.take())
            try:
                if self.rank == 0:
                    timeline.append(self.run_dir, self.stage, step + 1, spans)
            except OSError as error:  # training goes on without
                self.told = math.inf
                self.scribe.append.remote("warning", {"message": f"telemetry: the timeline cannot be written: {error}"})

    def finish(self) -> None:
        """After the last step."""

    def load_denoiser(self) -> torch.nn.Module:
        """The starting model's denoiser as this stage trains it, on this rank's device."""
        return training_form(self.origin, self.config, self.stage, self.dtype).to(self.device)

    def save_model(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes ``models/<name>``: the starting model with these trained parameters; for rank 0."""
        # Loaded anew, because the engine's is wrapped, perhaps sharded, and perhaps in another dtype.
        denoiser = training_form(self.origin, self.config, self.stage)
        with torch.no_grad():
            for key, p in trainable(denoiser).items():
                p.copy_(weights[key])
        TextToImage(
            denoiser,
            self.encoder,
            self.config.schedule,
            self.config.sampler,
            vae=load_autoencoder(self.origin),
            origin=self.origin,
        ).save_pretrained(self.run_dir / "models" / name)
