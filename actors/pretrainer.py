"""Pre-training: Ray Data draws and captions portraits, Ray Train and DeepSpeed fit the prox to them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlproxi.algorithms.pretrain import EMA, Matching, conditioning, drop_captions
from rlproxi.models.autoencoder import latent_facts
from rlproxi.models.loading import load_autoencoder
from rlproxi.models.precision import autocast
from rlproxi.proximal.matching import TimeTable

from .engine import Engine
from .ingest import batches
from .rank import Rank
from .training import PretrainSetup


class Pretrainer(Rank):
    """One rank."""

    def __init__(self, setup: PretrainSetup):
        config = setup.config
        super().__init__(config, setup.run_dir, setup.model_folder, "pretrain", setup.scribe)
        self.data_start = setup.data_start
        # Pixels that a published autoencoder turns into latents here: the embedded portraits, which need no cache.
        self.vae = None if setup.cache else load_autoencoder(self.origin)
        if self.vae is not None:
            self.vae.to(self.device)
        self.factor = latent_facts(self.origin)[1] if (self.origin / "vae").is_dir() else 1
        denoiser = self.load_denoiser()
        p, s = config.pretrain, config.sampler
        schedule = config.schedule.build()
        self.algorithm = Matching(p, schedule, TimeTable(schedule, p.candidates, s.name, s.start_time, s.grid),
                                  config.run.seed)
        share = p.batch_size // self.world
        micro = p.micro_batch_size or share
        self.ema = EMA(denoiser, p.ema)
        self.engine = Engine(denoiser, self.device, config.learner.zero_stage, micro, share // micro, p.lr,
                             (0.9, 0.99), 0.0, p.grad_clip, self.dtype)

    def run(self) -> None:
        """From the last checkpoint (or the start) to the last step."""
        p = self.config.pretrain
        start = self.restore()
        if self.rank == 0:
            self.scribe.append.remote("resume", {"stage": self.stage, "step": start})
        data = batches(ray.train.get_dataset_shard(f"rank{self.rank}"), p.batch_size // self.world)
        since, images, window = time.time(), 0, []
        for step, batch in zip(range(start, p.steps), self._skip(data, start)):
            window.append(self._step(step, batch))
            images += p.batch_size
            if (step + 1) % p.log_every == 0 or step + 1 == p.steps:
                means = {key: float(np.mean([m[key] for m in window])) for key in window[0]}
                self.log(step + 1, {**means, "images_per_second": images / (time.time() - since)})
                since, images, window = time.time(), 0, []
            if (step + 1) % p.checkpoint_every == 0 or step + 1 == p.steps:
                self.checkpoint(step + 1)
        if self.rank == 0:
            self.save_model("pretrained", self.ema.values)
        dist.barrier()

    def _skip(self, data, start: int):
        """The dataset begins at the step that the driver knew of; a restart within the job may be further on."""
        ahead = start - self.data_start
        for index, batch in enumerate(data):
            if index >= ahead:
                yield batch

    def _step(self, step: int, batch: dict) -> dict[str, float]:
        config = self.config
        x0 = self._samples(batch)
        captions = drop_captions(list(batch["caption"]), config.data.caption_dropout, config.run.seed, step, self.rank)
        pixels = tuple(side * self.factor for side in x0.shape[-2:])
        text = conditioning(self.encoder, batch, captions, pixels, self.device)
        with autocast(self.dtype, self.device):
            losses = self.algorithm.losses(self.engine.module, x0, text, step, self.rank)
            metrics = self.engine.update(losses, self.algorithm.lr(step))
        with self.engine.gathered() as weights:
            self.ema.update(weights)
        return metrics

    def _samples(self, batch: dict) -> torch.Tensor:
        """x_0 [B, C, H, W] float32: latents, or pixels in [-1, 1]."""
        if "latents" in batch:
            return torch.from_numpy(np.array(batch["latents"])).to(self.device).float()
        pixels = torch.from_numpy(np.array(batch["image"])).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels if self.vae is None else self.vae.encode(pixels)

    def save_own(self, folder: Path) -> None:
        save_file(self.ema.state_dict(), folder / "ema.safetensors")

    def load_own(self, folder: Path) -> None:
        self.ema.load_state_dict(load_file(folder / "ema.safetensors"))
