"""What every Ray Train rank of ours is."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Callable, ContextManager, Mapping

import numpy as np
import torch
from torch import Tensor

from rlproxi.algorithms.base import AlgorithmStopped
from rlproxi.config import Config
from rlproxi.models.folders import find_model
from rlproxi.models.loading import load_autoencoder, load_encoder, trainable, training_form
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.telemetry import timeline
from rlproxi.telemetry.timeline import Diary

from .engine import Engine
from .saving import Saved

#: Seconds between the lines that a stage without a conductor writes into the timeline.
_TIMELINE_EVERY = 10.0


class Rank(Saved):
    """One process of a Ray Train group: its place, its arithmetic, its loop, its checkpoints.

    A subclass says where batches come from and who is told of them, and sets ``algorithm`` (``steps``, and ``updates`` of a
    batch), ``engines`` (one for each network that is trained, the first the one that is saved) and ``checkpoint_every``.
    Where it has a state beside the engines', it overrides ``save_own`` and ``load_own``.
    """

    algorithm: Any
    engines: dict[str, Engine]
    checkpoint_every: int
    stopped = False
    leaving = False  # stopped from outside: what is trained is saved, to be gone on with

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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A metrics record of this stage; from rank 0 only."""
        if self.rank == 0:
            self.scribe.append.remote("metrics", {"stage": self.stage, "step": step, **metrics})

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
        """From the last checkpoint (or the start) to the last step."""
        start = self.restore()
        self.begin(start)
        for step in range(start, self.algorithm.steps):
            with self._span("wait"):
                batch = self.next_batch(step)
            if batch is None:
                if self.leaving and step > start:
                    self.checkpoint(step)
                break
            metrics: dict[str, float] = {}
            with self._span("train"):
                trained = self.or_stop(lambda: metrics.update(self._update(batch)))
            if not trained:
                break
            self.updated(step, batch, metrics)
            if (step + 1) % self.checkpoint_every == 0 or step + 1 == self.algorithm.steps:
                with self._span("checkpoint"):
                    self.checkpoint(step + 1)
            self.done(step, batch, metrics)
        if not self.stopped:
            self.finish()

    def _span(self, phase: str) -> ContextManager[None]:
        return self.diary.span("learner", self.rank, phase)

    def _update(self, batch: Any) -> dict[str, float]:
        """The batch's updates, one after another; the mean of each metric over them (the maximum where its name says max).
        Those of the first network have their plain names, the others' the network's before it."""
        begun = time.time()
        first = next(iter(self.engines))
        seen: dict[str, list[float]] = {}
        for update in self.algorithm.updates(batch):
            with autocast(self.dtype, self.device):
                done = self.engines[update.network].update(update.losses, update.lr)
            for key, value in done.items():
                seen.setdefault(key if update.network == first else f"{update.network}/{key}", []).append(value)
        means = {key: float(max(values) if "max" in key else np.mean(values)) for key, values in seen.items()}
        return {**means, "seconds/train": time.time() - begun}

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
        raise error

    def updated(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
        """After the updates and before the checkpoint; may add to the metrics."""

    def done(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
        """After the checkpoint, if one was due. Here, without a conductor, rank 0 writes the timeline now and then."""
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
        TextToImage(denoiser, self.encoder, self.config.schedule, self.config.sampler, vae=load_autoencoder(self.origin),
                    origin=self.origin).save_pretrained(self.run_dir / "models" / name)
