"""What every Ray Train rank of ours is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from rlproxi.config import Config
from rlproxi.models.loading import find_model, load_autoencoder, load_encoder, trainable, training_form
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.precision import compute_dtype

from . import checkpoints
from .engine import Engine


class Rank:
    """One process of a Ray Train group: its place, its arithmetic, its checkpoints.

    A subclass sets ``engine`` and, where its algorithm has a state beside the engine's, overrides
    ``save_own`` and ``load_own``.
    """

    engine: Engine

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
        self.dtype = compute_dtype(config.model.precision, self.device)
        self.origin = find_model(model_folder)
        self.encoder = load_encoder(self.origin, self.dtype).to(self.device)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A metrics record of this stage; from rank 0 only."""
        if self.rank == 0:
            self.scribe.append.remote("metrics", {"stage": self.stage, "step": step, **metrics})

    # -- checkpoints: collectives, called by every rank -------------------------------------

    def save_own(self, folder: Path) -> None:
        """Rank 0 writes what is neither weights nor optimizer into ``folder``."""

    def load_own(self, folder: Path) -> None:
        """Every rank reads what ``save_own`` wrote."""

    def checkpoint(self, step: int) -> None:
        """Writes the state after ``step`` steps, whole or not at all."""
        root = checkpoints.root(self.run_dir, self.stage)
        scratch = checkpoints.begin(root, step) if self.rank == 0 else checkpoints.scratch(root, step)
        dist.barrier()
        self.engine.save(scratch)
        if self.rank == 0:
            self.save_own(scratch)
        dist.barrier()
        if self.rank == 0:
            checkpoints.finish(root, step, {"world": self.world})

    def restore(self) -> int:
        """Loads the newest usable checkpoint; returns the steps it has behind it, 0 without one."""
        warn = lambda message: self.scribe.append.remote("warning", {"message": message})  # noqa: E731
        found = checkpoints.latest(checkpoints.root(self.run_dir, self.stage), warn)
        if found is None:
            return 0
        folder, facts = found
        self.engine.load(folder)
        self.load_own(folder)
        return facts["step"]

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
