"""Pre-training: Ray Data draws and captions portraits, Ray Train and DeepSpeed fit the prox to them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlproxi.algorithms.prepare import collection
from rlproxi.algorithms.pretrain import EMA, Matching, drop_captions, start_unet
from rlproxi.config import Config
from rlproxi.data import faces
from rlproxi.models.pipeline import TextToImage, load_unet
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.models.text import TextEncoder
from rlproxi.models.unet import build_unet
from rlproxi.proximal.matching import TimeTable

from . import checkpoints
from .engine import Engine
from .worker import enter_worker, train_on_ray


@dataclass
class PretrainSetup:
    """What a pre-training rank is told. ``text_folder`` holds tokenizer/ and text_encoder/."""

    config: Config
    run_dir: str
    text_folder: str
    scribe: Any
    data_start: int = 0  # the optimizer step at which the datasets begin

    @property
    def checkpoints(self) -> Path:
        return Path(self.run_dir) / "checkpoints" / "pretrain"


def portraits(config: Config, start: int, rank: int) -> ray.data.Dataset:
    """The portraits of one rank from optimizer step ``start`` on, in order: columns image, caption."""
    p, world = config.pretrain, config.resources.learner_workers
    share = p.batch_size // world
    source = collection(config.run.seed, "pretrain")

    def draw(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step, row = np.divmod(rows["id"] + start * share, share)
        index = step * p.batch_size + rank * share + row
        images, captions, _ = faces.batch(source, index, config.data.size, config.data.hand_fraction)
        return {"image": images, "caption": np.array(captions)}

    count = (p.steps - start) * share
    return ray.data.range(count, override_num_blocks=max(1, count // 512)).map_batches(draw, batch_size=None)


class Pretrainer:
    """One rank."""

    def __init__(self, setup: PretrainSetup):
        self.setup = setup
        self.config = config = setup.config
        self.rank, self.world, self.device = enter_worker(config.resources.threads)
        self.dtype = compute_dtype(config.model.precision, self.device)
        self.encoder = TextEncoder.from_pretrained(setup.text_folder)
        self.encoder.model.to(self.device)
        unet = load_unet(config.model.init) if config.model.init else start_unet(config)
        unet = unet.to(self.device)
        p, s = config.pretrain, config.sampler
        schedule = config.schedule.build()
        self.algorithm = Matching(p, schedule, TimeTable(schedule, p.candidates, s.name, s.start_time, s.grid),
                                  config.run.seed)
        share = p.batch_size // self.world
        micro = p.micro_batch_size or share
        self.ema = EMA(unet, p.ema)
        self.engine = Engine(unet, self.device, config.learner.zero_stage, micro, share // micro, p.lr,
                             (0.9, 0.99), 0.0, p.grad_clip)

    def run(self) -> None:
        p = self.config.pretrain
        start = self._restore()
        if self.rank == 0:
            self.setup.scribe.append.remote("resume", {"stage": "pretrain", "step": start})
        data = ray.train.get_dataset_shard(f"rank{self.rank}").iter_batches(
            batch_size=p.batch_size // self.world, prefetch_batches=4)
        since, images, window = time.time(), 0, []
        for step, batch in zip(range(start, p.steps), self._skip(data, start)):
            window.append(self._step(step, batch))
            images += p.batch_size
            if (step + 1) % p.log_every == 0 or step + 1 == p.steps:
                self._log(step + 1, window, images / (time.time() - since))
                since, images, window = time.time(), 0, []
            if (step + 1) % p.checkpoint_every == 0 or step + 1 == p.steps:
                self._checkpoint(step + 1)
        self._save_final()

    def _skip(self, data, start: int):
        """The dataset begins at the step that the driver knew of; a restart within the job may be further on."""
        ahead = start - self.setup.data_start
        for index, batch in enumerate(data):
            if index >= ahead:
                yield batch

    def _step(self, step: int, batch: dict) -> dict[str, float]:
        config = self.config
        images = torch.from_numpy(np.array(batch["image"])).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        captions = drop_captions(list(batch["caption"]), config.data.caption_dropout, config.run.seed, step, self.rank)
        text = self.encoder.encode(captions)
        with autocast(self.dtype, self.device):
            losses = self.algorithm.losses(self.engine.module, images, text, step, self.rank)
            metrics = self.engine.update(losses, self.algorithm.lr(step))
        with self.engine.gathered() as weights:
            self.ema.update(weights)
        return metrics

    def _log(self, step: int, window: list[dict[str, float]], images_per_second: float) -> None:
        if self.rank == 0:
            means = {key: float(np.mean([m[key] for m in window])) for key in window[0]}
            self.setup.scribe.append.remote("metrics", {"stage": "pretrain", "step": step, **means,
                                                        "images_per_second": images_per_second})

    def _checkpoint(self, step: int) -> None:
        root = self.setup.checkpoints
        scratch = checkpoints.begin(root, step) if self.rank == 0 else root / f".writing-{step:06d}"
        dist.barrier()
        self.engine.save(scratch)
        if self.rank == 0:
            save_file(self.ema.state_dict(), scratch / "ema.safetensors")
        dist.barrier()
        if self.rank == 0:
            checkpoints.finish(root, step, {"world": self.world})

    def _restore(self) -> int:
        warn = lambda message: self.setup.scribe.append.remote("warning", {"message": message})  # noqa: E731
        found = checkpoints.latest(self.setup.checkpoints, warn)
        if found is None:
            return 0
        folder, facts = found
        self.engine.load(folder)
        self.ema.load_state_dict(load_file(folder / "ema.safetensors"))
        return facts["step"]

    def _save_final(self) -> None:
        if self.rank == 0:
            unet = build_unet(self.config) if not self.config.model.init else load_unet(self.config.model.init)
            buffers = dict(self.engine.module.module.named_buffers())
            unet.load_state_dict({**buffers, **self.ema.values}, strict=False)
            TextToImage(unet, self.encoder, self.config.schedule, self.config.sampler).save_pretrained(
                Path(self.setup.run_dir) / "models" / "pretrained")
        dist.barrier()


def _loop(settings: dict) -> None:
    pretrainer = Pretrainer(settings["setup"])
    pretrainer.run()
    pretrainer.engine.close()


def pretrain(setup: PretrainSetup) -> None:
    """Runs pre-training to its end; blocks.

    Raises ConfigError where the last checkpoint was written by another number of ranks.
    """
    checkpoints.require_world(setup.checkpoints, setup.config.resources.learner_workers)
    found = checkpoints.latest(setup.checkpoints, warn=lambda message: None)
    setup.data_start = found[1]["step"] if found else 0
    datasets = {f"rank{rank}": portraits(setup.config, setup.data_start, rank)
                for rank in range(setup.config.resources.learner_workers)}
    for rank, dataset in datasets.items():
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        # Drawn before training begins: portraits are small (3 kB) and quick (0.5 ms), while a Data executor that
        # streams beside each rank held its interpreter lock and took three quarters of its speed.
        datasets[rank] = dataset.materialize()
    train_on_ray(_loop, {"setup": setup}, setup.config, setup.run_dir, "pretrain", datasets)
