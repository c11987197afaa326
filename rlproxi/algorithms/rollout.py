"""Sampling whole groups: what a rollout actor does, without the actor.

One forward path serves rollout, replay and evaluation. Noise is named by (run seed, purpose, step,
prompt, sample), so which actor samples a group, and when, changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..models.pipeline import TextToImage, to_uint8
from ..models.text import TextEncoder
from ..models.unet import ProximalUNet
from ..seeds import NamedNoise
from .requests import PURPOSES, SampleRequest

def flatten(weights: dict[str, Tensor]) -> np.ndarray:
    """Parameters in their order as one float32 array: the form in which weights travel."""
    return torch.cat([p.detach().float().reshape(-1).cpu() for p in weights.values()]).numpy()


@torch.no_grad()
def unflatten(flat: np.ndarray, module: torch.nn.Module) -> None:
    """Copies a flat array into a module's parameters. Raises ValueError where the sizes differ."""
    expected = sum(p.numel() for p in module.parameters())
    if flat.size != expected:
        raise ValueError(f"weights hold {flat.size} numbers where the model has {expected} parameters")
    source, at = torch.from_numpy(np.array(flat)), 0
    for p in module.parameters():
        p.copy_(source[at : at + p.numel()].view_as(p))
        at += p.numel()


class GroupSampler:
    """Samples requests with one set of weights, by the config's schedule, sampler and precision."""

    def __init__(self, config: Config, unet: ProximalUNet, encoder: TextEncoder, device: str | torch.device = "cpu"):
        self.config = config
        self.pipeline = TextToImage(unet.requires_grad_(False), encoder, config.schedule, config.sampler,
                                    config.model.precision).to(device)

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(images uint8 [P*G, H, W, 3], chain). The chain holds z, z_next and prox, each float32
        [K, P*G, C, H, W] for the K positions of ``request.window`` (empty arrays are left out)."""
        c = self.config
        names = [(c.run.seed, PURPOSES[request.purpose], request.step, index, j)
                 for index in request.indices for j in range(request.group_size)]
        starts = [(*name[:4], 0) for name in names] if c.grpo.same_noise and request.purpose == "train" else None
        text = self.pipeline.text.groups(request.prompts, request.group_size)
        run = self.pipeline.run(text, NamedNoise(names, starts), request.num_steps, request.guidance_scale,
                                keep_chain=bool(request.window))
        chain = {}
        if request.window:
            pick = lambda values, shift=0: torch.stack(  # noqa: E731
                [values[i + shift] for i in request.window]).float().cpu().numpy()
            chain = {"z": pick(run.z), "z_next": pick(run.z, 1), "prox": pick(run.prox)}
        return to_uint8(run.x), chain
