"""The steps whose peaks a run's memory depends on: a loss and its backward, a prox, decoding, encoding.

``*_peak`` functions are called inside ``memory_trace.no_memory``, with networks that are ``without_data``; the device
is the one that is planned for, 'cpu' or 'cuda'.
"""

from __future__ import annotations

from typing import Iterable, Iterator

import torch
from torch import Tensor, nn

from .algorithms import grpo
from .config import Config
from .memory_parts import text_shape
from .memory_trace import traced, without_data
from .models.autoencoder import Autoencoder
from .models.loading import latent_space, parts_folder
from .models.precision import autocast
from .models.text import TextStates
from .proximal.operator import ProximalOperator


def learner_losses(config: Config, network: nn.Module, rows: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """The GRPO losses of one micro-batch of ``rows`` samples, all zeros, without a reference, where the network is."""
    prox, z, text = inputs(config, network, rows)
    algorithm = grpo.build(config)
    window = algorithm.window(0)
    chain, each = z.expand(len(window), *z.shape), z.new_zeros(rows)
    return algorithm.losses(prox, None, [grpo.MicroBatch(chain, chain, chain, each, each, text)], window)


def inputs(config: Config, network: nn.Module, rows: int) -> tuple[ProximalOperator, Tensor, TextStates]:
    """The prox, samples and captions of the shapes that the config asks for, all zeros."""
    channels, side = latent_space(config)
    length, width, pooled = text_shape(config, parts_folder(config))
    device = next(network.parameters()).device
    text = TextStates(torch.zeros(rows, length, width), torch.zeros(rows, pooled), torch.ones(rows, length)).to(device)
    prox = ProximalOperator(network, config.sampler.guidance_scale, lambda text: text, TextStates.join)
    return prox, torch.zeros(rows, channels, side, side, device=device), text


def training_peak(losses, trained: Iterable[nn.Parameter], dtype: torch.dtype, device: str) -> tuple[int, int]:
    """(bytes saved for the backward, peak) of one loss and its backward, gradients there already."""
    for p in trained:
        p.grad = torch.zeros_like(p)
    with traced(device) as live, autocast(dtype, "cpu"):
        loss, _ = next(losses)
        saved = live.now
        loss.backward()
    return saved, live.peak


def forward_peak(config: Config, network: nn.Module, rows: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of one prox of ``rows`` samples without gradient: the sampler's, and the reference's."""
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
