"""The GRPO learner: Ray Train around DeepSpeed around rlproxi.algorithms.grpo."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from rlproxi.algorithms import grpo
from rlproxi.algorithms.rollout import Conditioner, SampleRequest, flatten, operator
from rlproxi.config import Config
from rlproxi.models.pipeline import TextToImage, load_unet
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.models.text import TextEncoder

from . import checkpoints
from .engine import Engine
from .worker import enter_worker, train_on_ray


@dataclass
class LearnerSetup:
    """What a learner rank is told."""

    config: Config
    run_dir: str
    model_folder: str
    conductor: Any
    store: Any
    scribe: Any


class Learner:
    """One rank."""

    def __init__(self, setup: LearnerSetup):
        self.setup = setup
        self.config = config = setup.config
        self.rank, self.world, self.device = enter_worker(config.resources.threads)
        self.dtype = compute_dtype(config.model.precision, self.device)
        self.algorithm = grpo.build(config)
        unet = load_unet(setup.model_folder).to(self.device)
        encoder = TextEncoder.from_pretrained(setup.model_folder)
        conditioner = Conditioner(encoder, self.device)
        guidance = config.sampler.guidance_scale
        g = config.grpo
        self.reference = None
        if g.kl_coef:
            self.reference = operator(copy.deepcopy(unet).requires_grad_(False), conditioner, guidance)
        self.conditioner = conditioner
        window = g.trained_steps or len(self.algorithm.actions)
        self.engine = Engine(
            unet, self.device, config.learner.zero_stage, g.groups_per_micro_batch * g.group_size,
            accumulation=g.micro_batches // g.updates_per_step // self.world * window,
            lr=g.lr, betas=g.betas, weight_decay=g.weight_decay, grad_clip=g.grad_clip)
        self.prox = operator(self.engine.module, conditioner, guidance)
        self.folder = Path(setup.run_dir) / "checkpoints" / "rl"

    def run(self) -> None:
        """From the last checkpoint (or the start) to the last iteration."""
        start = self._restore()
        self._publish(start)
        if self.rank == 0:
            ray.get(self.setup.conductor.begin.remote(start))
        dist.barrier()
        g = self.config.grpo
        for iteration in range(start, g.steps):
            batch = ray.get(self.setup.conductor.next_batch.remote(iteration))
            if batch is None:
                return
            try:
                metrics = self._iterate(iteration, batch, check=iteration == start)
            except (grpo.FirstRatioError, FloatingPointError) as error:
                # Would happen again after a restart: tell the user instead.
                ray.get(self.setup.conductor.stop.remote(str(error)))
                return
            begun = time.time()
            self._publish(iteration + 1)
            metrics["seconds/sync"] = time.time() - begun
            if (iteration + 1) % g.checkpoint_every == 0 or iteration + 1 == g.steps:
                self._checkpoint(iteration + 1)
            if self.rank == 0:
                ray.get(self.setup.conductor.commit.remote(iteration, metrics))
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
            self.conditioner.groups(request.prompts, request.group_size))

    def _check_first_ratio(self, iteration: int, micro: list[grpo.MicroBatch], window) -> None:
        """The largest |rho - 1| before any update, over the first update's micro-batches and trained steps."""
        with torch.no_grad(), autocast(self.dtype, self.device):
            worst = max(metrics["ratio/max_deviation"]
                        for _, metrics in self.algorithm.losses(self.prox, None, micro, window))
        worst = torch.tensor(worst, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if self.rank == 0:
            self.setup.scribe.append.remote("metrics", {"stage": "rl", "step": iteration,
                                                        "ratio/first_max_deviation": float(worst)})
        self.algorithm.check_first_ratio(float(worst))

    def _publish(self, version: int) -> None:
        with self.engine.gathered() as weights:
            flat = flatten(weights) if self.rank == 0 else None
        if flat is not None:
            ray.get(self.setup.store.publish.remote(version, flat))

    def _checkpoint(self, step: int) -> None:
        scratch = checkpoints.begin(self.folder, step) if self.rank == 0 else self.folder / f".writing-{step:06d}"
        dist.barrier()
        self.engine.save(scratch)
        dist.barrier()
        if self.rank == 0:
            checkpoints.finish(self.folder, step, {"world": self.world})

    def _restore(self) -> int:
        warn = lambda message: self.setup.scribe.append.remote("warning", {"message": message})  # noqa: E731
        found = checkpoints.latest(self.folder, warn)
        if found is None:
            return 0
        folder, facts = found
        self.engine.load(folder)
        return facts["step"]

    def _save_final(self) -> None:
        with self.engine.gathered() as weights:
            if self.rank == 0:
                unet = load_unet(self.setup.model_folder)
                unet.load_state_dict({name: p.detach().float().cpu() for name, p in weights.items()}, strict=False)
                TextToImage(unet, self.conditioner.encoder, self.config.schedule, self.config.sampler).save_pretrained(
                    Path(self.setup.run_dir) / "models" / "final")


def _loop(settings: dict) -> None:
    learner = Learner(settings["setup"])
    learner.run()
    learner.engine.close()


def train(setup: LearnerSetup) -> None:
    """Runs the learner to its end; blocks. Ray Train restarts it from the last checkpoint when a rank dies.

    Raises ConfigError where the last checkpoint was written by another number of ranks.
    """
    checkpoints.require_world(Path(setup.run_dir) / "checkpoints" / "rl", setup.config.resources.learner_workers)
    train_on_ray(_loop, {"setup": setup}, setup.config, setup.run_dir, "learner")
