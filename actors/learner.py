"""The GRPO learner: Ray Train around DeepSpeed around rlproxi.algorithms.grpo."""

from __future__ import annotations

import copy
import time

import numpy as np
import ray
import torch
import torch.distributed as dist

from rlproxi.algorithms import grpo
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.algorithms.rollout import flatten
from rlproxi.models.lora import without_adapters
from rlproxi.models.pipeline import operator
from rlproxi.models.precision import autocast

from .engine import Engine
from .rank import Rank
from .training import LearnerSetup


class Learner(Rank):
    """One rank."""

    def __init__(self, setup: LearnerSetup):
        config = setup.config
        super().__init__(config, setup.run_dir, setup.model_folder, "rl", setup.scribe)
        self.conductor, self.store = setup.conductor, setup.store
        self.algorithm = grpo.build(config)
        denoiser = self.load_denoiser()
        g = config.grpo
        guidance = config.sampler.guidance_scale
        copied = None
        if g.kl_coef and not config.model.lora:
            copied = copy.deepcopy(denoiser).requires_grad_(False)
        window = g.trained_steps or len(self.algorithm.actions)
        self.engine = Engine(
            denoiser, self.device, config.learner.zero_stage, g.groups_per_micro_batch * g.group_size,
            accumulation=g.micro_batches // g.updates_per_step // self.world * window,
            lr=g.lr, betas=g.betas, weight_decay=g.weight_decay, grad_clip=g.grad_clip, dtype=self.dtype)
        self.prox = operator(self.engine.module, self.encoder, guidance)
        self.reference = None
        if g.kl_coef:
            self.reference = operator(copied, self.encoder, guidance) if copied else without_adapters(self.prox, denoiser)

    def run(self) -> None:
        """From the last checkpoint (or the start) to the last iteration."""
        start = self.restore()
        self._publish(start)
        if self.rank == 0:
            ray.get(self.conductor.begin.remote(start))
        dist.barrier()
        g = self.config.grpo
        for iteration in range(start, g.steps):
            batch = ray.get(self.conductor.next_batch.remote(iteration))
            if batch is None:
                return
            if not batch:
                break  # finished before its time
            try:
                metrics = self._iterate(iteration, batch, check=iteration == start)
            except (grpo.FirstRatioError, FloatingPointError) as error:
                # Would happen again after a restart: tell the user instead.
                ray.get(self.conductor.stop.remote(str(error)))
                return
            begun = time.time()
            metrics["bytes/weights"] = self._publish(iteration + 1)
            metrics["seconds/sync"] = time.time() - begun
            if (iteration + 1) % g.checkpoint_every == 0 or iteration + 1 == g.steps:
                self.checkpoint(iteration + 1)
            if self.rank == 0:
                ray.get(self.conductor.commit.remote(iteration, metrics))
        self._save_final()

    def _iterate(self, iteration: int, batch: dict, check: bool) -> dict[str, float]:
        g = self.config.grpo
        begun = time.time()
        window = self.algorithm.window(iteration)
        advantages = grpo.advantages(batch["rewards"], g.advantage_std)
        metrics: dict[str, list[float]] = {}
        for update in range(g.updates_per_step):
            mine = grpo.share(len(batch["requests"]), g.updates_per_step, self.world, update, self.rank)
            micro = [self._micro_batch(batch, j, advantages) for j in mine]
            if check and update == 0:
                self._check_first_ratio(iteration, micro, window)
            with autocast(self.dtype, self.device):
                losses = self.algorithm.losses(self.prox, self.reference, micro, window)
                done = self.engine.update(losses, self.algorithm.lr(iteration))
            for key, value in done.items():
                metrics.setdefault(key, []).append(value)
        result = {key: float(max(values) if "max" in key else np.mean(values)) for key, values in metrics.items()}
        return {**result, **advantages.stats, "seconds/train": time.time() - begun}

    def _micro_batch(self, batch: dict, j: int, advantages: grpo.Advantages) -> grpo.MicroBatch:
        request: SampleRequest = batch["requests"][j]
        chain = ray.get(batch["chains"][j])
        groups = len(request.prompts)
        rows = slice(j * groups, (j + 1) * groups)
        tensor = lambda x: torch.from_numpy(np.array(x)).to(self.device)  # noqa: E731  (arrays arrive read-only)
        return grpo.MicroBatch(
            tensor(chain["z"]), tensor(chain["z_next"]), tensor(chain["prox"]),
            tensor(advantages.values[rows].reshape(-1)), tensor(advantages.weight[rows].reshape(-1)),
            self.encoder.groups(request.prompts, request.group_size))

    def _check_first_ratio(self, iteration: int, micro: list[grpo.MicroBatch], window) -> None:
        """The largest |rho - 1| before any update, over the first update's micro-batches and trained steps."""
        with torch.no_grad(), autocast(self.dtype, self.device):
            worst = max(metrics["ratio/max_deviation"]
                        for _, metrics in self.algorithm.losses(self.prox, None, micro, window))
        worst = torch.tensor(worst, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        self.log(iteration, {"ratio/first_max_deviation": float(worst)})
        self.algorithm.check_first_ratio(float(worst))

    def _publish(self, version: int) -> int:
        """Hands on what is trained; returns its bytes (0 on every rank but the first, which sends them)."""
        with self.engine.gathered() as weights:
            flat = flatten(weights) if self.rank == 0 else None
        return 0 if flat is None else ray.get(self.store.publish.remote(version, flat))

    def _save_final(self) -> None:
        with self.engine.gathered() as weights:
            if self.rank == 0:
                self.save_model("final", weights)
