"""Sampling of whole groups, the work of a rollout actor without the actor.

One forward path serves rollout, replay and evaluation. Noise is named by (run seed, purpose, step,
prompt, sample), so which actor samples a group, and when, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.loading import Config
from ..models.autoencoder import Autoencoder
from ..models.backbone import ProximalNetwork
from ..models.folders import ModelFolder
from ..models.loading import load_autoencoder, load_encoder, trainable, training_form
from ..models.pipeline import TextToImage, to_uint8
from ..models.precision import compute_dtype
from ..models.text import TextEncoder
from ..models.text_stacks import CheckpointText
from ..proximal.samplers import AFTER
from ..seeds import NamedNoise
from .requests import SampleRequest


def flatten(weights: Mapping[str, Tensor]) -> np.ndarray:
    """Parameters in their order as one float32 array: the form in which weights travel."""
    return torch.cat([p.detach().float().reshape(-1).cpu() for p in weights.values()]).numpy()


@torch.no_grad()
def unflatten(flat: np.ndarray, weights: Mapping[str, Tensor]) -> None:
    """Copy a flat array into parameters. Raises ValueError where the sizes differ."""
    expected = sum(p.numel() for p in weights.values())
    if flat.size != expected:
        raise ValueError(f"weights hold {flat.size} numbers where the model trains {expected}")
    parts = torch.from_numpy(np.array(flat)).split([p.numel() for p in weights.values()])
    for p, part in zip(weights.values(), parts, strict=True):
        p.copy_(part.view_as(p))


class GroupSampler:
    """Samples requests with one set of weights, by the config's schedule, sampler and precision.

    Args:
        denoiser: in the form in which it is trained (``loading.training_form``); ``trained`` are its parameters that
            change from version to version. origin: the model folder it came from.
    """

    def __init__(
        self,
        config: Config,
        denoiser: ProximalNetwork,
        text: TextEncoder | CheckpointText,
        vae: Autoencoder | None = None,
        device: str | torch.device = "cpu",
        origin: Path | None = None,
    ):
        self.config = config
        self.trained = trainable(denoiser)
        self.pipeline = TextToImage(
            denoiser.requires_grad_(False), text, config.schedule, config.sampler, config.model.precision, vae, origin
        ).to(device)

    @classmethod
    def from_pretrained(cls, config: Config, folder: str | Path, device: str | torch.device = "cpu") -> GroupSampler:
        """Load a model folder in the form in which the config trains it."""
        folder = ModelFolder.find(folder).path
        dtype = compute_dtype(config.model.precision, device)
        denoiser, text = training_form(folder, config, "rl", dtype), load_encoder(folder, dtype)
        return cls(config, denoiser, text, load_autoencoder(folder), device, folder)

    def take(self, flat: np.ndarray) -> None:
        """Take new weights, as ``flatten`` made them of the same parameters."""
        unflatten(flat, self.trained)

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sample a request; return (images uint8 [P*G, H, W, 3], chain).

        The chain holds z, z_next and prox, each float32 [K, P*G, C, H, W] for the K positions of ``request.window``; no
        entry where there is none. With ``request.keep_last`` it holds z_last [P*G, C, H, W].

        Where a sample is NaN or Inf, its image is grey, its chain is zeros, and the chain holds ``finite`` [P*G] bool.
        """
        names = request.names(self.config.run.seed)
        starts = [(*name[:4], 0) for name in names] if request.same_noise else None
        text = self.pipeline.text.groups(request.prompts, request.group_size)
        # A score sampler's noise comes after the prox: it is the policy's choice, the first step's too.
        named = NamedNoise(names, starts, first=self.config.sampler.name not in AFTER)
        keep = bool(request.window) or request.keep_last
        run = self.pipeline.run(text, named, request.num_steps, request.guidance_scale, keep)
        chain = {}
        if request.window:

            def pick(values: Sequence[Tensor], shift: int = 0) -> np.ndarray:
                return torch.stack([values[i + shift] for i in request.window]).float().cpu().numpy()

            chain = {"z": pick(run.z), "z_next": pick(run.z, 1), "prox": pick(run.prox)}
        if request.keep_last:
            chain["z_last"] = run.z[-1].float().cpu().numpy()
        return self._without_broken(self.pipeline.pixels(run.x), chain)

    def _without_broken(self, pixels: Tensor, chain: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        steps = [value[None] if key == "z_last" else value for key, value in chain.items()]  # views [K, P*G, ...]
        whole = [np.isfinite(value).all((0, *range(2, value.ndim))) for value in steps]
        finite = np.logical_and.reduce([torch.isfinite(pixels).flatten(1).all(1).cpu().numpy(), *whole])
        if finite.all():
            return to_uint8(pixels), chain
        for value in steps:
            value[:, ~finite] = 0
        images = to_uint8(torch.where(torch.from_numpy(finite).to(pixels.device)[:, None, None, None], pixels, 0.0))
        return images, {**chain, "finite": finite}
