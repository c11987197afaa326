"""A small text-conditional U-Net for the proximal residual, saved as a diffusers model folder.

Made for CPUs: pixel-unshuffle stem, widths that are multiples of 32, plain matmul attention,
channels_last. Conditioned on t *and* lam, on a pooled text vector (through the time embedding)
and on the text encoder's states (through cross-attention).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..config import Config
from ..proximal.operator import expand
from ..proximal.schedule import VPSchedule
from ..seeds import seed_of
from .text import TextStates


def sinusoid(x: Tensor, dim: int, max_period: float = 1000.0) -> Tensor:
    """[B] -> [B, dim] sines and cosines of x times geometric frequencies from 1 to ``max_period``."""
    half = dim // 2
    frequencies = torch.exp(torch.linspace(0.0, math.log(max_period), half, device=x.device))
    angles = x.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


class ResBlock(nn.Module):
    """norm, SiLU, conv twice, with a scale and shift from the time embedding between."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(emb, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return x + h


class TextAttention(nn.Module):
    """Self-attention over the pixels and the text states together, one softmax for both.

    Joint keys cost one attention where separate self- and cross-attention cost two. Plain
    matmuls: at these sizes the fused kernel's backward is slower on a CPU.
    """

    def __init__(self, channels: int, text_dim: int, head_dim: int = 32):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.text_kv = nn.Linear(text_dim, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, H, W]; text [B, L, D]; mask [B, L], 1 where there is a token."""
        b, c, h, w = x.shape
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(pixels).chunk(3, -1)
        text_k, text_v = self.text_kv(text).chunk(2, -1)
        split = lambda y: y.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)  # noqa: E731
        q, k, v = split(q), split(torch.cat([text_k, k], 1)), split(torch.cat([text_v, v], 1))
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-1, -2)
        bias = torch.zeros(b, 1, 1, k.shape[2], dtype=scores.dtype, device=x.device)
        bias[..., : text.shape[1]] = (1 - mask.to(scores.dtype))[:, None, None] * -1e4
        y = ((scores + bias).float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(y).reshape(b, h, w, c).permute(0, 3, 1, 2)


class Gaussian(nn.Module):
    """The Gaussian N(mean, Sigma) fitted to the data, Sigma diagonal in a fixed basis: principal colours times
    the discrete cosine transform. Its prox is known in closed form, a Wiener filter.

    Buffers: ``mean`` [C, H, W]; ``variance`` [C, H, W], of each colour and frequency; ``colors`` [C, C], orthogonal.
    Starts as N(0, data_std^2 I).
    """

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

        Variances are kept between 1e-4 and the mean variance of a pixel. The lower bound keeps the filter
        invertible. The upper one matters more: with the true, very large variances of the lowest frequencies the
        linear part explains layout and colour from y alone and the network learns much later to take them from the
        caption (docs/quickstart.md has the figures).
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


class ProximalUNet(ModelMixin, ConfigMixin):
    """eps_theta(y, t, lam, text) for images [B, C, H, W] in about [-1, 1].

    The network is *preconditioned* with the closed form of a Gaussian p_0 = N(m, Sigma). In the basis where
    Sigma is diagonal, S its variances and v = alpha_bar S + 1 - alpha_bar,

        eps = sqrt(lam) (y - sqrt(alpha_bar) m) / (v + lam) + sqrt(v / (v + lam)) F(..., t, lam, text)

    so F = 0 is the exact prox of that Gaussian, and F's target has unit variance at every frequency and every
    (t, lam). Where a frequency carries nothing but noise, F has no say: flat areas are clean from the first
    step. F sees y and the Gaussian's prox, both scaled to unit variance by lam as well as t, so a few large
    steps, which spread z far beyond the data, do not leave its range. (The closed form is ProxDM's; scaling
    by it is EDM's idea, Karras et al. 2022.)

    Args:
        sample_size: H = W. in_channels: C. patch: pixel-unshuffle factor of the stem.
        channels: width of each level; each further level halves the resolution.
        blocks: residual blocks at each level, down and again up; skips are added. attention: at which levels.
        text_dim, pooled_dim: widths of the text states and of the pooled text vector.
        data_std: standard deviation of p_0 before ``gaussian.fit``.
        beta_min, beta_max: the VP schedule, for alpha_bar in the preconditioning.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, sample_size: int = 32, in_channels: int = 3, patch: int = 4,
                 channels: tuple[int, ...] = (128, 256), blocks: tuple[int, ...] = (1, 0),
                 attention: tuple[bool, ...] = (True, False), text_dim: int = 64, pooled_dim: int = 64,
                 data_std: float = 0.6, beta_min: float = 0.1, beta_max: float = 20.0):
        super().__init__()
        stem = in_channels * patch * patch
        emb = 2 * channels[-1]
        self.schedule = VPSchedule(beta_min, beta_max)
        self.gaussian = Gaussian(in_channels, sample_size, data_std)
        self.embed_noise = nn.Sequential(nn.Linear(128, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_text = nn.Sequential(nn.Linear(pooled_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.stem = nn.Conv2d(2 * stem, channels[0], 3, padding=1)

        def attend(level: int) -> nn.Module:
            return TextAttention(channels[level], text_dim) if attention[level] else nn.Identity()

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, c in enumerate(channels):
            if level:
                self.shrink.append(nn.Conv2d(channels[level - 1], c, 3, stride=2, padding=1))
            for _ in range(blocks[level]):
                self.down.append(nn.ModuleList([ResBlock(c, emb), attend(level)]))
        self.middle = nn.ModuleList([ResBlock(channels[-1], emb), TextAttention(channels[-1], text_dim)])
        for level in reversed(range(len(channels))):
            for _ in range(blocks[level]):
                self.up.append(nn.ModuleList([ResBlock(channels[level], emb), attend(level)]))
            if level:
                self.grow.append(nn.Conv2d(channels[level], channels[level - 1], 1))
        width = channels[0]
        self.norm = nn.GroupNorm(8, width)
        self.head = nn.Conv2d(width, stem, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """y [B, C, H, W] float32; t, lam [B] float32; text with B rows. Returns eps, float32 like y."""
        alpha_bar = expand(self.schedule.alpha_bar(t), y)
        signal = alpha_bar * self.gaussian.variance + 1 - alpha_bar
        return self.estimate_noise(y, alpha_bar, signal, expand(lam, y), t, lam, text)

    def estimate_noise(self, y: Tensor, alpha_bar: Tensor, signal: Tensor, noise: Tensor, t: Tensor, lam: Tensor,
                       text: TextStates) -> Tensor:
        """The unit noise n in y = sqrt(alpha_bar) m + a signal of variance ``signal`` [B, C, H, W] (in the
        Gaussian's basis) + sqrt(noise) n; ``alpha_bar``, ``noise`` [B, 1, 1, 1].

        The prox has signal = v and noise = lam; the score model signal = alpha_bar S and noise = 1 - alpha_bar.
        """
        g = self.gaussian
        with torch.autocast(y.device.type, enabled=False):
            total = signal + noise
            linear = g.from_basis(noise.sqrt() / total * g.to_basis(y - alpha_bar.sqrt() * g.mean))
            scaled = y * total.mean((1, 2, 3), keepdim=True).rsqrt()
            x = torch.cat([scaled, y - noise.sqrt() * linear], 1)
        residual = self.network(x, t, lam, text).float()
        with torch.autocast(y.device.type, enabled=False):
            return linear + g.from_basis((signal / total).sqrt() * g.to_basis(residual))

    def network(self, x: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """F: the bare network, [B, 2 C, H, W] -> [B, C, H, W]."""
        noise = torch.cat([sinusoid(t, 64), sinusoid((lam + 1e-6).log() / 8, 64)], 1)
        emb = F.silu(self.embed_noise(noise) + self.embed_text(text.pooled))
        h = F.pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        h = self.stem(h)
        skips = []
        down, shrink = iter(self.down), iter(self.shrink)
        for level, count in enumerate(self.config.blocks):
            if level:
                h = next(shrink)(h)
            for _ in range(count):
                block, attend = next(down)
                h = self._attend(attend, block(h, emb), text)
                skips.append(h)
        h = self._attend(self.middle[1], self.middle[0](h, emb), text)
        up, grow = iter(self.up), iter(self.grow)
        for level in reversed(range(len(self.config.blocks))):
            for _ in range(self.config.blocks[level]):
                block, attend = next(up)
                h = self._attend(attend, block(h + skips.pop(), emb), text)
            if level:
                h = F.interpolate(next(grow)(h), scale_factor=2.0, mode="nearest")
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config.patch)

    @staticmethod
    def _attend(attend: nn.Module, h: Tensor, text: TextStates) -> Tensor:
        return h if isinstance(attend, nn.Identity) else attend(h, text.states, text.mask)


def build_unet(config: Config) -> ProximalUNet:
    """A new network as the config describes it; the run's seed names its initial weights."""
    m = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.run.seed, 0x0DE7))
        return ProximalUNet(sample_size=config.data.size, patch=m.patch, channels=tuple(m.channels),
                            blocks=tuple(m.blocks), attention=tuple(m.attention), text_dim=m.text_dim,
                            pooled_dim=m.text_dim, data_std=m.data_std,
                            beta_min=config.schedule.beta_min, beta_max=config.schedule.beta_max)
