"""The pre-trainer: a rank that fits the proximal operator to captioned images, which Ray Data reads."""

from __future__ import annotations

import time
from itertools import islice

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist

from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.pretrain import Matching, MatchingBatch, conditioning, drop_captions
from rlproxi.rewards.combine import mean_present
from rlproxi.run_directory import RunDirectory

from .datasets import batches
from .engine import Engine
from .rank import Rank, place_on_ray
from .setups import PretrainSetup
from .start_model import StartModel


class Pretrainer(Rank):
    """One rank of the stage pretrain. Reads its own dataset, and keeps an average of the weights."""

    ema: EMA  # pre-training always averages

    def __init__(self, setup: PretrainSetup):
        config = setup.config
        every = config.pretrain.checkpoint_every
        super().__init__(config, setup.run_dir, "pretrain", setup.log, place_on_ray(), every)
        self.model = StartModel(setup.model_folder, config, "pretrain", self.dtype, self.device)
        self.earliest = setup.data_start
        # The embedded portraits need no cache: an autoencoder turns their pixels into latents here.
        self.vae = None if setup.cache else self.model.autoencoder()
        folder = self.model.folder
        self.factor = folder.latents.factor if folder.has_vae else 1  # pixels of a latent's side
        self.since = time.time()
        self.window: list[dict[str, float]] = []  # metrics that are not logged yet
        self.build()

    def build(self) -> None:
        """Makes the network, its engine and its average; see ``Rank.build``."""
        config, p, denoiser = self.config, self.config.pretrain, self.model.denoiser()
        self.algorithm = Matching(config)
        share, stage = p.batch_size // self.world, config.learner.zero_stage
        losses = share // (p.micro_batch_size or share)
        self.ema = EMA(denoiser, p.ema)
        engine = Engine(denoiser, self.device, stage, losses, (0.9, 0.99), 0.0, p.grad_clip, self.dtype)
        self.engines = {"policy": engine}

    def begin(self, start: int) -> None:
        """Opens the data at step ``start``. Raises RuntimeError where they begin later."""
        if start < self.earliest:
            begin = f"the newest usable checkpoint is of step {start}, the job's data begin at step {self.earliest}"
            raise RuntimeError(f"{begin}: resume the run (--resume {self.run_dir})")
        # After a rollback: what was not logged yet did not happen, but was skipped all the same.
        self.unlogged += int(self._skipped())
        self.since, self.window = time.time(), []
        if self.rank == 0:
            self.run_log.append.remote("resume", {"stage": self.stage, "step": start})
        data = batches(ray.train.get_dataset_shard(f"rank{self.rank}"), self.config.pretrain.batch_size // self.world)
        # The dataset begins at the step that the driver knew of; a restart within the job may be further on.
        self.data = islice(data, start - self.earliest, None)

    def next_batch(self, step: int) -> MatchingBatch | None:
        """The batch of ``step``; None where the data or the run end."""
        found = None if self.stopped else next(self.data, None)
        if found is None:
            return None
        config, x0 = self.config, self._samples(found)
        captions = drop_captions(list(found["caption"]), config.data.caption_dropout, config.run.seed, step, self.rank)
        height, width = (side * self.factor for side in x0.shape[-2:])
        text = conditioning(self.model.encoder, found, captions, (height, width), self.device)
        return MatchingBatch(step, x0, text, self.rank, self.engine.module)

    def updated(self, step: int, batch: MatchingBatch, metrics: dict[str, float]) -> None:
        """Updates the average; logs the mean metrics every ``pretrain.log_every`` steps."""
        with self.engine.gathered() as weights:
            self.ema.update(weights)
        p = self.config.pretrain
        self.window.append(metrics)
        if (step + 1) % p.log_every == 0 or step + 1 == p.steps:
            found = {key: mean_present(np.array([m.get(key, np.nan) for m in self.window])) for key in metrics}
            found |= {"skipped_updates": self._skipped(), "rollbacks": metrics["rollbacks"]}
            found["images_per_second"] = len(self.window) * p.batch_size / (time.time() - self.since)
            del found["seconds/train"]
            self.log(step + 1, found)
            self.since, self.window = time.time(), []

    def finish(self) -> None:
        """Writes models/pretrained."""
        if self.rank == 0:
            self.model.save(self.ema.values, RunDirectory(self.run_dir).pretrained)
        dist.barrier()

    def _skipped(self) -> float:
        return sum(m["skipped_updates"] for m in self.window)

    def _samples(self, batch: dict) -> torch.Tensor:
        """x_0 [B, C, H, W] float32: latents, or pixels in [-1, 1]."""
        if "latents" in batch:
            return torch.from_numpy(np.array(batch["latents"])).to(self.device).float()
        pixels = torch.from_numpy(np.array(batch["image"])).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels if self.vae is None else self.vae.encode(pixels)
