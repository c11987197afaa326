"""The learner: a rank of the stage rl, which trains the algorithm that the config names."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from rlproxi.algorithms.base import Algorithm, Batch, Parts, build_algorithm
from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.guards import sampler_limit as limit
from rlproxi.algorithms.guards.training import TrainingWarnings
from rlproxi.algorithms.rollout import flatten
from rlproxi.models.lora import adapters_off, without_adapters
from rlproxi.models.precision import autocast
from rlproxi.rewards.gradients import RewardGradients
from rlproxi.run_directory import RunDirectory

from ..rl.messages import Answer, Ended, Leave, Lost, Ready, Stopped, Trained
from ..rl.stops import RoleLost
from .engine import Engine
from .rank import Rank, place_on_ray
from .setups import LearnerSetup
from .start_model import StartModel


class LearnerRank(Rank):
    """One rank of the stage rl. Asks the conductor for batches and publishes the weights that it trains."""

    algorithm: Algorithm

    def __init__(self, setup: LearnerSetup, conductor: Any, store: Any):
        config = setup.config
        super().__init__(config, setup.run_dir, "rl", setup.log, place_on_ray(), config.rl.checkpoint_every)
        self.model = StartModel(setup.model_folder, config, "rl", self.dtype, self.device)
        self.conductor, self.store = conductor, store
        self.checked = False
        self.attempt = 0  # the number that the conductor gave this learner; rank 0 knows it
        self.build()
        self.watch = TrainingWarnings(config.guards, self.algorithm)

    def build(self) -> None:
        """Makes the networks, their engines and the algorithm; see ``Rank.build``."""
        config = self.config
        self.algorithm = build_algorithm(config)
        denoiser = self.model.denoiser()
        networks = self.algorithm.networks(denoiser)
        reference = None
        if self.algorithm.needs_reference:
            # Without the engine, whose hooks would take a gradient to the input for a backward of its own.
            copied = None if config.model.lora else copy.deepcopy(denoiser).requires_grad_(False)
            reference = copied or without_adapters(denoiser, denoiser)
        scope = partial(adapters_off, denoiser) if config.model.lora else nullcontext
        s, stage = config.rl, config.learner.zero_stage
        self.ema = EMA(denoiser, s.ema) if s.ema else None
        options = s.betas, s.weight_decay, s.grad_clip, self.dtype, s.anchor
        losses = self.algorithm.losses_per_update(self.world)
        self.engines = {
            name: Engine(network, self.device, stage, count, *options)
            for (name, network), count in zip(networks.items(), losses.values(), strict=True)
        }
        wrapped = {name: engine.module for name, engine in self.engines.items()}
        gradients = None
        if self.algorithm.needs_gradients:
            normalize, vae = self.algorithm.normalize_gradients, self.model.autoencoder()
            gradients = RewardGradients.build(config.rewards.train, vae, normalize, self.device)
        encoder, shape = self.model.encoder, denoiser.sample_shape
        self.parts = Parts(wrapped, networks, reference, encoder, gradients, shape, self.device, scope)
        self.algorithm.connect(self.parts)

    # -- the loop's ends (see Rank.run) ----------------------------------------------------

    def begin(self, start: int) -> None:
        """Publishes the first weights and starts the conductor's loop."""
        self._publish(start)
        if self.rank == 0:
            self.attempt = ray.get(self.conductor.begin.remote(start))
        dist.barrier()

    def next_batch(self, iteration: int) -> Batch | None:
        """The batch of ``iteration``; None where training ends before it. Raises RoleLost to restart the learner."""
        answer: Answer = ray.get(self.conductor.next_batch.remote(iteration, self.rank, self.world))
        match answer:
            case Ready():
                batch = self._batch(iteration, answer)
                return batch if self._accepted(batch) else None
            case Ended():
                return None
            case Stopped():
                self.stopped = True
                return None
            case Leave():
                self.stopped = self.leaving = True
                return None
            case Lost(reason):
                raise RoleLost(reason)

    def _batch(self, iteration: int, ready: Ready) -> Batch:
        # Averaged weights sample what the learner's own would not.
        fresh = all(version == iteration for version in ready.versions) and (self.ema is None or iteration == 0)
        requests, chain = ready.requests(), lambda j: self._chain(ready.chains[j])
        return Batch(iteration, requests, self.rank, self.world, ready.rewards, chain, fresh, ready.refused)

    def refused(self, batch: Batch) -> str | None:
        """Why the conductor says that nothing of the batch can be trained on, or None."""
        return batch.refused

    def _accepted(self, batch: Batch) -> bool:
        """Whether sampler and algorithm, before this process's first update, are as they should be."""
        if self.checked or batch.refused:
            return True
        with torch.no_grad(), autocast(self.dtype, self.device):
            strayed = limit.check(self.config, self.parts, batch.requests[0].prompts[0])
            own = {limit.METRIC: strayed, **self.algorithm.check(batch)}
            found = {name: self._largest(value) for name, value in own.items()}
        self.log(batch.iteration, found)
        self.checked = True

        def accept() -> None:
            limit.accept(found[limit.METRIC], self.config)
            if batch.fresh:
                self.algorithm.accept(found)

        return self.or_stop(accept)

    def _largest(self, value: float) -> float:
        worst = torch.tensor(value, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    def _chain(self, reference: ray.ObjectRef) -> dict[str, Tensor]:
        # Copied, because arrays arrive read-only.
        return {key: torch.from_numpy(np.array(value)).to(self.device) for key, value in ray.get(reference).items()}

    def stop(self, error: Exception) -> None:
        """Stops the run through the conductor."""
        ray.get(self.conductor.stop.remote(str(error)))

    def updated(self, iteration: int, batch: Batch, metrics: dict[str, float]) -> None:
        """After the updates of an iteration: averages, and hands on what the rollout actors will need."""
        begun = time.time()
        with self._span("sync"):
            if self.ema is not None:
                with self.engine.gathered() as weights:
                    self.ema.update(weights)
            metrics.update(self.algorithm.metrics(batch))
            groups = sum(len(request.prompts) for request in batch.requests)
            for message in self.watch.see(iteration, metrics, groups, batch.fresh):  # may raise AlgorithmStopped
                self.warn(message)
            every = self.config.evaluate.every
            if self.algorithm.needs_rollouts or (every and (iteration + 1) % every == 0):
                with self.diary.span("weights", 0, "sync"):
                    metrics["bytes/weights"] = self._publish(iteration + 1)
        metrics["seconds/sync"] = time.time() - begun

    def done(self, iteration: int, batch: Batch, metrics: dict[str, float]) -> None:
        """Reports the iteration to the conductor, from rank 0."""
        spans = self.diary.take()  # on every rank, so that they do not pile up
        if self.rank == 0:
            trained = Trained(self.attempt, iteration, metrics, spans, time.time())
            ray.get(self.conductor.commit.remote(trained))

    def finish(self) -> None:
        """Writes models/final."""
        with self.engine.gathered() as weights:
            if self.rank == 0:
                trained = self.ema.values if self.ema is not None else weights
                self.model.save(trained, RunDirectory(self.run_dir).final)

    def _publish(self, version: int) -> int:
        """Publishes the trained (or averaged) weights; a collective. Returns their bytes on the first rank, else 0."""
        with self.engine.gathered() as weights:
            flat = flatten(self.ema.values if self.ema is not None else weights) if self.rank == 0 else None
        return 0 if flat is None else ray.get(self.store.publish.remote(version, flat))
