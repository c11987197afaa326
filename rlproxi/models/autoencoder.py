"""Pixels to latents and back: the autoencoder of a published checkpoint, frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_files import load_network, read_json
from .precision import autocast


class Autoencoder:
    """diffusers' AutoencoderKL, between images in [-1, 1] and latents on the denoiser's scale.

    ``latents = (z - shift) * scale``, with shift and scale from config.json: shift_factor and scaling_factor, or, where
    a checkpoint has them, latents_mean and scaling_factor / latents_std of each channel.

    Gradients go through to the input; the weights have none. ``batch_size`` images go through at once.
    """

    def __init__(self, vae: Any, batch_size: int = 8):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        self.vae = vae.eval().requires_grad_(False)
        self.batch_size = batch_size
        config = vae.config
        self.latent_channels: int = config.latent_channels
        #: Pixels of a latent's side.
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        each = config.latents_mean is not None and config.latents_std is not None
        self._shift = _per_channel(config.latents_mean if each else [config.shift_factor or 0.0])
        self._scale = config.scaling_factor / _per_channel(config.latents_std if each else [1.0])

    @classmethod
    def from_pretrained(cls, folder: str | Path, batch_size: int = 8) -> Autoencoder:
        """Loads ``folder``/vae in float32.

        Raises FileNotFoundError naming what is missing, ValueError for another class or damaged weights.
        """
        from diffusers import AutoencoderKL

        folder = Path(folder) / "vae"
        config = read_json(folder / "config.json")
        if config.get("_class_name") != AutoencoderKL.__name__:
            raise ValueError(f"{folder} holds a {config.get('_class_name')}; expected an {AutoencoderKL.__name__}")
        vae = load_network(AutoencoderKL, folder, "diffusion_pytorch_model", torch_dtype=torch.float32)
        return cls(vae, batch_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``folder``/vae."""
        self.vae.save_pretrained(Path(folder) / "vae")

    def to(self, device: str | torch.device) -> Autoencoder:
        """Moves the weights."""
        self.vae.to(device)
        return self

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1] -> latents float32 [B, C, H/factor, W/factor], on the weights' device.

        Args:
            generator: draws from the posterior, noise for the whole batch at once; None takes the posterior's mode.

        Raises ValueError for another shape, or sides that are not multiples of ``factor``.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(x.shape)}: expected [B, 3, H, W]")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            sides = f"{x.shape[2]}x{x.shape[3]}"
            raise ValueError(f"images of {sides} pixels: crop or resize both sides to multiples of {self.factor}")
        moments = self._sliced(lambda part: self.vae.encode(part).latent_dist.parameters, x)
        posterior = DiagonalGaussianDistribution(moments)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return (z - self._shift.to(z.device)) * self._scale.to(z.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents float [B, C, h, w] -> images float32 [B, 3, h * factor, w * factor], about [-1, 1] and not clipped.

        Raises ValueError for another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected [B, {self.latent_channels}, h, w]")
        latents = latents.to(self.vae.device)
        z = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        return self._sliced(lambda part: self.vae.decode(part).sample, z)

    def _sliced(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``network`` on slices of the batch, in the weights' arithmetic whatever the caller's; float32."""
        x = x.to(self.vae.device, self.vae.dtype)
        with autocast(torch.float32, x.device):
            return torch.cat([network(part).float() for part in x.split(self.batch_size)])


def _per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
