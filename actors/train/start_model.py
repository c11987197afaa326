"""The model that a training stage starts from, and new models of its trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlproxi.config.loading import Config
from rlproxi.models.autoencoder import Autoencoder
from rlproxi.models.backbone import ProximalNetwork
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import load_autoencoder, load_encoder, trainable, training_form
from rlproxi.models.pipeline import TextToImage


class StartModel:
    """A model folder, or a name that ``ModelFolder.find`` knows, as a stage trains it; ``dtype`` is the forward's."""

    def __init__(self, folder: str, config: Config, stage: str, dtype: torch.dtype, device: torch.device):
        self.config, self.stage, self.dtype, self.device = config, stage, dtype, device
        self.folder = ModelFolder.find(folder)
        self.encoder = load_encoder(self.folder, dtype).to(device)

    def denoiser(self) -> ProximalNetwork:
        """A new copy of the denoiser as the stage trains it."""
        denoiser = training_form(self.folder, self.config, self.stage, self.dtype)
        torch.nn.Module.to(denoiser, self.device)  # in place
        return denoiser

    def autoencoder(self) -> Autoencoder | None:
        """A new copy of the autoencoder; None for a model of pixels."""
        vae = load_autoencoder(self.folder)
        return None if vae is None else vae.to(self.device)

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes a model folder: this model with ``weights``, its trained parameters by name, in their place."""
        # Loaded anew: the engine's is wrapped, perhaps sharded, and perhaps in another dtype.
        denoiser = training_form(self.folder, self.config, self.stage)
        with torch.no_grad():
            for key, p in trainable(denoiser).items():
                p.copy_(weights[key])
        schedule, sampler = self.config.schedule, self.config.sampler
        vae = load_autoencoder(self.folder)
        TextToImage(denoiser, self.encoder, schedule, sampler, vae=vae, origin=self.folder.path).save_pretrained(folder)
