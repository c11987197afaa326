"""The steps whose peaks a run's memory depends on: an update's losses and their backwards, a prox, decoding, encoding.

``*_peak`` functions are called inside ``memory_trace.no_memory``, with networks that are ``without_data``; the device
is the one that is planned for, 'cpu' or 'cuda'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ..algorithms.base import Algorithm, Batch, Parts, Update, build_algorithm
from ..algorithms.requests import SampleRequest
from ..config.loading import Config
from ..data import faces
from ..models.autoencoder import Autoencoder
from ..models.folders import latent_space
from ..models.precision import autocast
from ..models.text import TextConditioning, TextStates, operator
from ..proximal.operator import Denoiser, ProximalOperator
from ..rewards.gradients import RewardGradients
from .memory_parts import text_shape
from .memory_trace import traced, without_data

Losses = Iterator[tuple[Tensor, dict[str, float]]]


class Captions(TextConditioning):
    """Stands in for a text encoder: zeros of the shapes that the config gives, for any caption."""

    def __init__(self, config: Config, device: torch.device):
        self.shape, self.device = text_shape(config), device

    def encode(self, captions: Sequence[str]) -> TextStates:
        """As ``TextConditioning.encode``."""
        (length, width, pooled), rows = self.shape, len(captions)
        made = TextStates(torch.zeros(rows, length, width), torch.zeros(rows, pooled), torch.ones(rows, length))
        return made.to(self.device)

    def null_like(self, text: TextStates) -> TextStates:
        """As ``TextConditioning.null_like``."""
        return self.encode([""] * len(text))


def first_updates(
    config: Config,
    algorithm: Algorithm,
    networks: Mapping[str, nn.Module],
    reference: Denoiser | None = None,
    gradients: RewardGradients | None = None,
    reference_scope: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Update]:
    """The learner's first update of each network, on one micro-batch of zeros on the network's device.

    Args:
        networks: those that ``algorithm.networks`` names.
        reference, gradients, reference_scope: as in ``Parts``.
    """
    device = next(next(iter(networks.values())).parameters()).device
    channels, side = latent_space(config)
    shape = (channels, side, side)
    text, ours = Captions(config, device), dict(networks)
    algorithm.connect(Parts({**ours}, ours, reference, text, gradients, shape, device, reference_scope))
    g, kept = config.rl, len(algorithm.kept_steps(0))
    prompts = tuple(faces.portrait(0, i, 0.5).caption for i in range(g.groups))
    request = SampleRequest("train", 0, prompts, tuple(range(len(prompts))), g.group_size)
    z = torch.zeros(request.images, *shape, device=device)
    chain = {name: z.expand(kept, *z.shape) for name in ("z", "z_next", "prox")} | {"z_last": z}
    requests = [request] * g.updates_per_step
    batch = Batch(0, requests, 0, 1, np.zeros((len(prompts) * len(requests), g.group_size)), lambda j: chain)
    found: dict[str, Update] = {}
    for update in algorithm.updates(batch):
        found.setdefault(update.network, update)
    return found


def learner_losses(config: Config, network: nn.Module, rows: int) -> Losses:
    """The policy's losses of one micro-batch of ``rows`` samples, without a reference, where the network is."""
    one = config.with_rl(group_size=rows, groups_per_micro_batch=1)
    return first_updates(one, build_algorithm(one), {"policy": network})["policy"].losses


def one_loss(config: Config, network: nn.Module) -> Losses:
    """One prox of a micro-batch with a backward, for an algorithm that is not ``traceable``."""
    prox, z, text = inputs(config, network, config.rl.rows)
    yield prox(z, 0.5, 0.5, text).sum(), {}


def inputs(config: Config, network: nn.Module, rows: int) -> tuple[ProximalOperator, Tensor, TextStates]:
    """The prox, samples and captions of the config's shapes, all zeros."""
    channels, side = latent_space(config)
    device = next(network.parameters()).device
    captions = Captions(config, device)
    prox = operator(network, captions, config.sampler.guidance_scale)
    return prox, torch.zeros(rows, channels, side, side, device=device), captions.groups([""], rows)


def training_peak(losses: Losses, trained: Iterable[Tensor], dtype: torch.dtype, device: str) -> int:
    """Peak of all ``losses``, each with its backward before the next, gradients of the weights there already."""
    from torch.fx.experimental import _config as shapes

    for p in trained:
        p.grad = torch.zeros_like(p)
    # What a boolean mask picks, in a metric, is as large as what it picks from.
    patch = shapes.patch  # type: ignore[attr-defined]  # torch adds it when the module is imported
    with patch(meta_nonzero_assume_all_nonzero=True), traced(device) as live, autocast(dtype, "cpu"):
        for loss, _ in losses:
            loss.backward()
    return live.peak


def forward_peak(config: Config, network: nn.Module, rows: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of one prox of ``rows`` samples without gradient."""
    prox, z, text = inputs(config, network, rows)
    with torch.no_grad(), traced(device) as live, autocast(dtype, "cpu"):
        prox(z, 0.5, 0.5, text)
    return live.peak


def decoding_peak(vae: nn.Module | None, shape: tuple[int, int, int], rows: int, device: str) -> int:
    """Bytes of making uint8 images of ``rows`` samples [C, H, W]."""
    x = torch.zeros(rows, *shape)
    decode = Autoencoder(without_data(vae)).decode if vae is not None else lambda z: z
    with torch.no_grad(), traced(device) as live:
        ((decode(x) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return live.peak


def encoding_peak(vae: nn.Module, shape: tuple[int, int, int], rows: int, device: str) -> int:
    """Bytes of making latents [C, H, W] of ``rows`` images, the images included."""
    autoencoder = Autoencoder(without_data(vae))
    with torch.no_grad(), traced(device) as live:
        autoencoder.encode(torch.zeros(rows, 3, *(side * autoencoder.factor for side in shape[1:])))
    return live.peak
