"""The frame around every new network of ours: the closed-form prox of a Gaussian fitted to the data.

The network F only has to learn what the data have beyond that Gaussian; F = 0 is the Gaussian's exact prox.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..config.sections import LoRA
from ..proximal.operator import expand
from ..proximal.schedule import VPSchedule
from .text import TextStates


def sinusoid(x: Tensor, dim: int, max_period: float = 1000.0) -> Tensor:
    """[B] -> [B, dim] sines and cosines of x times geometric frequencies from 1 to ``max_period``."""
    half = dim // 2
    frequencies = torch.exp(torch.linspace(0.0, math.log(max_period), half, device=x.device))
    angles = x.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


def noise_features(t: Tensor, lam: Tensor) -> Tensor:
    """A network's input for t and lam: [B], [B] -> float32 [B, 128]. lam spans decades, so its logarithm is taken."""
    return torch.cat([sinusoid(t, 64), sinusoid((lam + 1e-6).log() / 8, 64)], 1)


class FittedGaussian(nn.Module):
    """The Gaussian N(mean, Sigma) fitted to the data, Sigma diagonal in principal colours times cosine transform.

    Buffers: ``mean`` [C, H, W]; ``variance`` [C, H, W], of each colour and frequency; ``colors`` [C, C], orthogonal.
    Starts as N(0, data_std^2 I).
    """

    mean: Tensor
    variance: Tensor
    colors: Tensor
    dct: Tensor

    def __init__(self, channels: int, size: int, data_std: float):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("variance", torch.full((channels, size, size), data_std**2))
        self.register_buffer("colors", torch.eye(channels))
        k = torch.arange(size, dtype=torch.float64)
        dct = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
        dct[0] /= math.sqrt(2)
        self.register_buffer("dct", dct.float(), persistent=False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Estimates mean, colours and variances from images [B, C, H, W].

        Variances are kept between 1e-4, so that the filter is invertible, and the mean variance of a pixel. With the
        true, very large ones of low frequencies the linear part would explain layout and colour from y alone, and the
        network would learn late to take them from the caption (docs/quickstart.md has the figures).
        """
        self.mean.copy_(images.mean(0))
        centered = images - self.mean
        pixels = centered.permute(1, 0, 2, 3).flatten(1)
        self.colors.copy_(torch.linalg.eigh(pixels @ pixels.T).eigenvectors.flip(1).T)
        variance = self.to_basis(centered).square().mean(0)
        self.variance.copy_(variance.clamp(min=1e-4, max=float(images.var())))

    def to_basis(self, x: Tensor) -> Tensor:
        """[B, C, H, W] pixels -> coefficients, an orthogonal map."""
        return self.dct @ torch.einsum("dc,bchw->bdhw", self.colors, x) @ self.dct.T

    def from_basis(self, x: Tensor) -> Tensor:
        """The inverse of ``to_basis``."""
        return torch.einsum("dc,bdhw->bchw", self.colors, self.dct.T @ x @ self.dct)


class Preconditioned(ModelMixin, ConfigMixin, ABC):  # type: ignore[misc]  # diffusers declares config_name in both
    """eps_theta(y, t, lam, text) for samples [B, C, H, W] of about unit spread; a subclass is the network F.

    The network is *preconditioned* with the closed form of a Gaussian p_0 = N(m, Sigma). In the basis where
    Sigma is diagonal, S its variances and v = alpha_bar S + 1 - alpha_bar,

        eps = sqrt(lam) (y - sqrt(alpha_bar) m) / (v + lam) + sqrt(v / (v + lam)) F(..., t, lam, text)

    so F = 0 is the exact prox of that Gaussian, and F's target has unit variance at every frequency and every
    (t, lam): the part of n2 that y does not determine. Where the network is trained for E[n2 | y, x_0] (``target``
    "expected"), F's factor is sqrt(lam / (1 - alpha_bar + lam)) sqrt(alpha_bar S / (v + lam)). It is 0 where a
    frequency carries nothing but noise: flat areas are clean from the first step. F sees y and the Gaussian's prox,
    both scaled to unit variance, so that a few large steps, which spread z far beyond the data, stay in its range.

    With ``target`` "clean", F is the clean image instead: x_0 = m + s F, s^2 the largest of S, and

        eps = sqrt(lam) (y - sqrt(alpha_bar) x_0) / (1 - alpha_bar + lam)

    which is E[n2 | y, x_0]. F sees the Gaussian's estimate of x_0 in the place of its prox. The other two frames pass
    the noise of y on wherever F does not cancel it, and a network trained for a few minutes leaves grain on flat areas.

    Sources: the closed form is ProxDM's (arXiv 2507.08956); scaling by it is EDM's idea (Karras et al. 2022).

    A subclass calls ``precondition`` first in its constructor.
    """

    config: Any  # diffusers' frozen dict, whose keys can be read as attributes
    gaussian: FittedGaussian
    _supports_gradient_checkpointing = True
    #: Settings of the LoRA adapters, where there are any (``models.lora``).
    lora: LoRA | None = None
    #: Its subfolder inside a model folder.
    part = "unet"

    def precondition(self, channels: int, size: int, data_std: float, schedule: VPSchedule, target: str) -> None:
        """Sets up what surrounds F: the Gaussian N(0, data_std^2 I) of [channels, size, size], and F's ``target``."""
        self.schedule = schedule
        self.target = target
        self.gaussian = FittedGaussian(channels, size, data_std)
        self.gradient_checkpointing = False

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a sample."""
        channels, height, width = self.gaussian.mean.shape
        return channels, height, width

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """y [B, C, H, W] float32; t, lam [B] float32; text with B rows. Returns eps, float32 like y."""
        alpha_bar, noise = expand(self.schedule.alpha_bar(t), y), expand(lam, y)
        data = alpha_bar * self.gaussian.variance
        signal = data + 1 - alpha_bar
        if self.target == "clean":
            return self._noise_of_clean(y, alpha_bar, signal + noise, noise, (t, lam, text))
        share = noise / (1 - alpha_bar + noise).clamp(min=1e-8) * data if self.target == "expected" else signal
        return self.estimate_noise(y, alpha_bar, signal, noise, share, (t, lam, text))

    def estimate_noise(
        self, y: Tensor, alpha_bar: Tensor, signal: Tensor, noise: Tensor, share: Tensor, cond: tuple
    ) -> Tensor:
        """The unit noise n in y = sqrt(alpha_bar) m + a signal + sqrt(noise) n, float32 [B, C, H, W] like y.

        The prox has signal = v and noise = lam; the score model signal = alpha_bar S and noise = 1 - alpha_bar.

        Args:
            signal: variance of the signal [B, C, H, W], in the Gaussian's basis. alpha_bar, noise: [B, 1, 1, 1].
            share: divided by signal + noise, the variance of F's contribution. cond: (t, lam, text) for the network.
        """
        g = self.gaussian
        with torch.autocast(y.device.type, enabled=False):
            total = signal + noise
            linear = g.from_basis(noise.sqrt() / total * g.to_basis(y - alpha_bar.sqrt() * g.mean))
            scaled = y * total.mean((1, 2, 3), keepdim=True).rsqrt()
            x = torch.cat([scaled, y - noise.sqrt() * linear], 1)
        residual = self.network(x, *cond).float()
        with torch.autocast(y.device.type, enabled=False):
            return linear + g.from_basis((share / total).sqrt() * g.to_basis(residual))

    def _noise_of_clean(self, y: Tensor, alpha_bar: Tensor, total: Tensor, noise: Tensor, cond: tuple) -> Tensor:
        """As ``estimate_noise``, by way of x_0; ``total`` [B, C, H, W] is the variance of y in the Gaussian's basis."""
        g, alpha = self.gaussian, alpha_bar.sqrt()
        with torch.autocast(y.device.type, enabled=False):
            centered = y - alpha * g.mean
            fitted = g.from_basis(alpha * g.variance / total * g.to_basis(centered))
            x = torch.cat([y * total.mean((1, 2, 3), keepdim=True).rsqrt(), g.mean + fitted], 1)
        residual = self.network(x, *cond).float()
        with torch.autocast(y.device.type, enabled=False):
            scale = alpha * g.variance.max().sqrt()
            return noise.sqrt() / (1 - alpha_bar + noise).clamp(min=1e-8) * (centered - scale * residual)

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """F: the bare network, [B, 2 C, H, W] -> [B, C, H, W]."""
