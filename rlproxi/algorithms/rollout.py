"""Sampling whole groups: what a rollout actor does, without the actor.

One forward path serves rollout, replay and evaluation. Noise is named by (run seed, purpose, step,
prompt, sample), so which actor samples a group, and when, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..models.pipeline import to_uint8
from ..models.precision import autocast, compute_dtype
from ..models.text import TextEncoder, TextStates
from ..models.unet import ProximalUNet
from ..proximal.operator import ProximalOperator
from ..proximal.samplers import Step, plan, sample
from ..seeds import NamedNoise

PURPOSES = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class SampleRequest:
    """A micro-batch of whole groups: the unit that is sampled, and replayed, in one shape.

    prompts [P] with the indices that name them; each gives ``group_size`` samples. ``num_steps`` and
    ``guidance_scale`` None: the config's. ``window``: the positions in the plan whose chain is kept.
    """

    purpose: str
    step: int
    prompts: tuple[str, ...]
    indices: tuple[int, ...]
    group_size: int
    window: tuple[int, ...] = ()
    num_steps: int | None = None
    guidance_scale: float | None = None

    @property
    def images(self) -> int:
        return len(self.prompts) * self.group_size


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


class Conditioner:
    """Captions -> TextStates in the network's batch order, with the null caption for guidance."""

    def __init__(self, encoder: TextEncoder, device: torch.device):
        encoder.model.to(device)
        self.encoder = encoder
        self.null = encoder.encode([""])

    def groups(self, prompts: tuple[str, ...], group_size: int) -> TextStates:
        """P prompts -> [P * group_size], each prompt's samples side by side."""
        return self.encoder.encode(list(prompts)).repeat(group_size)

    def null_like(self, text: TextStates) -> TextStates:
        return self.null.repeat(len(text))


def operator(denoiser, conditioner: Conditioner, guidance_scale: float) -> ProximalOperator:
    """The prox that rollout and learner share."""
    return ProximalOperator(denoiser, guidance_scale, conditioner.null_like, TextStates.join)


class GroupSampler:
    """Samples requests with one set of weights. Holds the network, the text encoder and the plan."""

    def __init__(self, config: Config, unet: ProximalUNet, encoder: TextEncoder, device: str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.unet = unet.to(self.device).eval().requires_grad_(False)
        self.conditioner = Conditioner(encoder, self.device)
        self.dtype = compute_dtype(config.model.precision, self.device)

    def plan(self, num_steps: int | None = None) -> list[Step]:
        s = self.config.sampler
        return plan(self.config.schedule.build(), s.name, num_steps or s.num_inference_steps, s.start_time, s.grid)

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(images uint8 [P*G, H, W, 3], chain). The chain holds z, z_next and prox, each float32
        [K, P*G, C, H, W] for the K positions of ``request.window`` (empty arrays are left out)."""
        c = self.config
        guidance = c.sampler.guidance_scale if request.guidance_scale is None else request.guidance_scale
        names = [(c.run.seed, PURPOSES[request.purpose], request.step, index, j)
                 for index in request.indices for j in range(request.group_size)]
        starts = [(*name[:4], 0) for name in names] if c.grpo.same_noise and request.purpose == "train" else None
        noise = NamedNoise(names, starts)
        x = noise.start((self.unet.config.in_channels, *[self.unet.config.sample_size] * 2), self.device)
        text = self.conditioner.groups(request.prompts, request.group_size)
        prox = operator(self.unet, self.conditioner, guidance)
        with autocast(self.dtype, self.device):
            run = sample(prox, self.plan(request.num_steps), x, text, noise, keep_chain=bool(request.window))
        chain = {}
        if request.window:
            pick = lambda values, shift=0: torch.stack(  # noqa: E731
                [values[i + shift] for i in request.window]).float().cpu().numpy()
            chain = {"z": pick(run.z), "z_next": pick(run.z, 1), "prox": pick(run.prox)}
        return to_uint8(run.x), chain


def split_request(request: SampleRequest, groups: int) -> list[SampleRequest]:
    """Cuts a request into pieces of at most ``groups`` groups."""
    return [replace(request, prompts=request.prompts[i : i + groups], indices=request.indices[i : i + groups])
            for i in range(0, len(request.prompts), groups)]
