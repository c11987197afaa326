"""A small text-conditional U-Net for the proximal residual.

Made for CPUs: pixel-unshuffle stem, widths that are multiples of 32, plain matmul attention, channels_last.
Conditioned on t and lam, on a pooled text vector (through the time embedding) and on the text states (by attention).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..proximal.schedule import VPSchedule
from .preconditioning import Preconditioned, noise_features
from .text import TextStates


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    """Makes the layer's output 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)


class ResBlock(nn.Module):
    """norm, SiLU, conv twice, with a scale and shift from the time embedding between."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(emb, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        _zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> like x."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return x + h


class TextAttention(nn.Module):
    """Attention from the pixels to the pixels and the text states together, one softmax for both.

    Plain matmuls: at these sizes the fused kernel's backward is slower on a CPU.
    """

    def __init__(self, channels: int, text_dim: int, head_dim: int = 32):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.text_kv = nn.Linear(text_dim, 2 * channels)
        self.out = nn.Linear(channels, channels)
        _zero(self.out)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, H, W]; text [B, L, D]; mask [B, L], 1 where there is a token. Returns like x."""
        b, c, h, w = x.shape
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(pixels).chunk(3, -1)
        text_k, text_v = self.text_kv(text).chunk(2, -1)

        def split(y: Tensor) -> Tensor:
            return y.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)

        q, k, v = split(q), split(torch.cat([text_k, k], 1)), split(torch.cat([text_v, v], 1))
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-1, -2)
        bias = torch.zeros(b, 1, 1, k.shape[2], dtype=scores.dtype, device=x.device)
        bias[..., : text.shape[1]] = (1 - mask.to(scores.dtype))[:, None, None] * -1e4
        y = ((scores + bias).float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(y).reshape(b, h, w, c).permute(0, 3, 1, 2)


class Subpixels(nn.Module):
    """Features of patches -> features of pixels: [B, c_in, H, W] -> [B, c_out, patch H, patch W].

    A 3x3 convolution and a pixel shuffle, whose kernels for the pixels of a patch have equal sums and equal biases. So
    features that do not vary from patch to patch give pixels that do not vary either: a grid takes more than a bias.
    """

    def __init__(self, c_in: int, c_out: int, patch: int):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(c_out * patch**2, c_in, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, patch H, patch W]."""
        count = self.patch**2
        sums = self.weight.sum((2, 3)).unflatten(0, (-1, count))  # [c_out, patch^2, c_in]
        off = (sums - sums.mean(1, keepdim=True)).flatten(0, 1)
        weight, bias = self.weight - off[:, :, None, None] / 9, self.bias.expand(-1, count).flatten()
        return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), self.patch)


class ProximalUNet(Preconditioned):
    """eps_theta(y, t, lam, text) for images [B, C, H, W] in about [-1, 1].

    Args:
        sample_size: H = W. in_channels: C. patch: pixel-unshuffle factor of the stem.
        channels: width of each level; each further level halves the resolution.
        blocks: residual blocks at each level, down and again up; skips are added. attention: at which levels.
        text_dim, pooled_dim: widths of the text states and of the pooled text vector.
        refine: channels at full resolution behind the patches, where two 3x3 convolutions finish the image from them
            and from the input; 0: the last convolution of patches is the output.
        data_std: standard deviation of p_0 before ``gaussian.fit``.
        beta_min, beta_max: the VP schedule, for alpha_bar in the preconditioning.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        patch: int = 4,
        channels: tuple[int, ...] = (128, 256),
        blocks: tuple[int, ...] = (1, 0),
        attention: tuple[bool, ...] = (True, False),
        text_dim: int = 64,
        pooled_dim: int = 64,
        data_std: float = 0.6,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        target: str = "noise",
        refine: int = 0,
    ):
        super().__init__()
        self.precondition(in_channels, sample_size, data_std, VPSchedule(beta_min, beta_max), target)
        stem = in_channels * patch * patch
        emb = 2 * channels[-1]
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
        if refine:
            self.subpixels = Subpixels(width, refine, patch)
            self.finish = nn.Conv2d(refine + 2 * in_channels, refine, 3, padding=1)
        self.head = nn.Conv2d(refine or width, in_channels if refine else stem, 3, padding=1)
        _zero(self.head)

    def network(self, x: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """F: the bare network, [B, 2 C, H, W] -> [B, C, H, W]."""
        emb = F.silu(self.embed_noise(noise_features(t, lam)) + self.embed_text(text.pooled))
        h = self.stem(F.pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last))
        skips = []
        down, shrink = iter(self.down), iter(self.shrink)
        for level, count in enumerate(self.config.blocks):
            if level:
                h = next(shrink)(h)
            for _ in range(count):
                h = self._block(next(down), h, emb, text)
                skips.append(h)
        h = self._block(self.middle, h, emb, text)
        up, grow = iter(self.up), iter(self.grow)
        for level in reversed(range(len(self.config.blocks))):
            for _ in range(self.config.blocks[level]):
                h = self._block(next(up), h + skips.pop(), emb, text)
            if level:
                h = F.interpolate(next(grow)(h), scale_factor=2.0, mode="nearest")
        h = F.silu(self.norm(h))
        if not self.config.refine:
            return F.pixel_shuffle(self.head(h), self.config.patch)
        pixels = torch.cat([self.subpixels(h), x], 1).contiguous(memory_format=torch.channels_last)
        return self.head(F.silu(self.finish(pixels)))

    def _block(self, pair: Any, h: Tensor, emb: Tensor, text: TextStates) -> Tensor:
        """A residual block and the attention after it; ``pair`` is an nn.ModuleList of both."""
        block, attend = pair
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._whole_block, block, attend, h, emb, text)
        return self._whole_block(block, attend, h, emb, text)

    @staticmethod
    def _whole_block(block: nn.Module, attend: nn.Module, h: Tensor, emb: Tensor, text: TextStates) -> Tensor:
        h = block(h, emb)
        return h if isinstance(attend, nn.Identity) else attend(h, text.states, text.mask)
