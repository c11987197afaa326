"""Degraded portraits: what pictures on the web suffer from, with known strengths.

A quality is known for each of them, exp(-sum of strengths), 1 for an untouched portrait. So a preference can be
simulated, and a judge of quality can be checked, without a human.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeds import rng

#: What can happen to a portrait, in the order of the columns of ``draw_strengths``.
KINDS = ("light", "tilt", "shift", "blur", "noise")
#: How often each kind is chosen. Dull, tilted and off-centre portraits are the most common ones.
FREQUENCY = np.array([0.34, 0.24, 0.24, 0.09, 0.09])
#: At strength 1: contrast that is lost, brightness gained or lost (of 1), degrees, share of the width, pixels at
#: 32 x 32 (the standard deviation of the blur), standard deviation of the noise (of 1).
CONTRAST, BRIGHTNESS, ANGLE, SHIFT, BLUR, NOISE = 0.65, 0.2, 20.0, 0.15, 1.0, 0.06


def draw_strengths(draw: np.random.Generator, share: float) -> np.ndarray:
    """Draw the strengths of one portrait's degradations, signed, float32 [5]: all 0 with probability 1 - ``share``.

    Otherwise one to three kinds have a strength between 0.3 and 1. The sign is a direction; it changes no quality.
    """
    strengths = np.zeros(len(KINDS), np.float32)
    chosen = draw.choice(len(KINDS), size=int(draw.integers(1, 4)), replace=False, p=FREQUENCY)
    strengths[chosen] = draw.uniform(0.3, 1.0, len(chosen)) * draw.choice([-1, 1], len(chosen))
    return strengths if draw.random() < share else np.zeros_like(strengths)


def quality(strengths: np.ndarray) -> np.ndarray:
    """The quality of portraits degraded by ``strengths`` [B, 5]: exp(-sum of their sizes), in (0, 1], [B]."""
    return np.exp(-np.abs(strengths).sum(-1))


def degrade(images: np.ndarray, strengths: np.ndarray, draws: list[np.random.Generator]) -> np.ndarray:
    """Degrade images uint8 [B, H, W, 3] by ``strengths`` [B, 5]; the rest by each image's own of ``draws``.

    An image depends on its own strengths and draw alone. What a tilt or a shift uncovers has the colour of the border.
    """
    light, tilt, shift, blurred, noisy = torch.from_numpy(np.asarray(strengths, np.float32)).T
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    direction = torch.tensor([draw.uniform(0, 2 * np.pi) for draw in draws])
    noise = np.stack([draw.standard_normal(x.shape[1:], np.float32) for draw in draws])
    x = _moved(x, tilt * np.deg2rad(ANGLE), 2 * SHIFT * shift * torch.stack([direction.cos(), direction.sin()]))
    x = _blurred(x, BLUR * blurred.abs() * x.shape[-1] / 32)
    lost, gained = CONTRAST * light.abs(), BRIGHTNESS * light
    x = 0.5 + (1 - _each(lost)) * (x - 0.5) + _each(gained)
    x = x + NOISE * _each(noisy.abs()) * torch.from_numpy(noise)
    return (x.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def degraded(images: np.ndarray, seed: int, indices: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Degrade a ``share`` of the portraits ``indices`` of collection ``seed``; return (images, strengths [B, 5])."""
    draws = [rng(seed, int(index), len(KINDS)) for index in indices]
    strengths = np.stack([draw_strengths(draw, share) for draw in draws])
    some = np.flatnonzero(strengths.any(1))
    images = images.copy()
    if len(some):
        images[some] = degrade(images[some], strengths[some], [draws[i] for i in some])
    return images, strengths


def _each(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def _moved(x: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """x [B, C, H, W] turned by ``angle`` [B] in radians and moved by ``shift`` [2, B] in half widths."""
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(_each((angle == 0) & (shift == 0).all(0)), x, moved)


def _blurred(x: Tensor, width: Tensor) -> Tensor:
    """x blurred by Gaussians of standard deviation ``width`` [B] pixels, from seven taps; 0 leaves it as it is.

    Written as sums of shifted images, so that an image's result does not depend on how many there are.
    """
    taps = torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (taps[:, None] / width.clamp(min=1e-3)) ** 2)
    kernel = kernel / kernel.sum(0)
    for dim in (2, 3):
        padded = F.pad(x, (0, 0, 3, 3) if dim == 2 else (3, 3, 0, 0), mode="replicate")
        size = x.shape[dim]
        x = sum((_each(weight) * padded.narrow(dim, i, size) for i, weight in enumerate(kernel)), torch.zeros_like(x))
    return x


def spoil(images: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Spoil images [B, 3, H, W] in [0, 1] as a sampler might; return (images, strengths [B] that add to the others).

    A fifth of them each get a faint grid (any period from 2 to 8 pixels, along rows, columns or both) and the ghost of
    another image. No policy has learnt to draw these from the data, but one that is trained against a reward that
    does not know them soon does.
    """
    count, size = len(images), images.shape[-1]

    def column(low: float, high: float, share: float) -> Tensor:
        values = draw.uniform(low, high, count) * (draw.random(count) < share)
        return torch.from_numpy(values.astype(np.float32))

    ghost = column(0.1, 0.5, 0.2)
    images = images + _each(ghost) * (images[torch.from_numpy(draw.permutation(count))] - images)
    amplitude = column(0.01, 0.12, 0.2)
    period, phase = draw.integers(2, 9, (2, count, 1)), draw.uniform(0, 2 * np.pi, (2, count, 1))
    # A period of 2 has a cosine alone: its sine is 0 at every pixel.
    waves = np.cos(2 * np.pi * np.arange(size) / period + np.where(period == 2, 0, phase)).astype(np.float32)
    waves *= (draw.integers(1, 4, (1, count, 1)) & np.array([1, 2])[:, None, None]) > 0
    rows, columns = torch.from_numpy(waves)
    color = torch.from_numpy(draw.uniform(-1, 1, (count, 3, 1, 1)).astype(np.float32))
    color = color / color.abs().amax(1, keepdim=True)
    images = images + _each(amplitude) * color * (rows[:, None, :, None] + columns[:, None, None, :])
    return images.clamp(0, 1), 2 * ghost + 10 * amplitude
