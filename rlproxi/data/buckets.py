"""Aspect-ratio buckets: a few sizes of about equal area, and images that are fitted to the nearest one.

The original size of an image and the corner of its crop are kept for SDXL's micro-conditioning (arXiv 2307.01952,
section 2.2).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..seeds import Purpose, rng

Size = tuple[int, int]  #: (height, width) in pixels

#: Buckets lie between 1:2 and 2:1.
LONGEST = 2


def bucket_step(size: int, factor: int = 1) -> int:
    """The number that divides the sides of buckets, in pixels: 64 for sizes from 512 on, else 8 latents (or pixels)."""
    return 64 if size >= 512 else min(64, 8 * factor)


def bucket_sizes(size: int, step: int) -> list[Size]:
    """Buckets of at most size x size pixels, from 1:2 to 2:1, the narrowest first; sides are multiples of ``step``.

    For each height it is the widest that fits; of those with one aspect ratio the largest.
    """
    if step < 1 or size < step:
        remedy = "raise it, or set data.buckets=false"
        raise ValueError(f"data.size {size} is smaller than {step}, the step of its buckets: {remedy}")
    best: dict[float, Size] = {}
    for short in range(step, size + 1, step):
        long = min(size**2 // short, LONGEST * short) // step * step
        for height, width in ((short, long), (long, short)):
            ratio = width / height
            if ratio not in best or height * width > math.prod(best[ratio]):
                best[ratio] = (height, width)
    return [best[ratio] for ratio in sorted(best)]


@dataclass(frozen=True)
class Fit:
    """The resizing and cropping of images to a few sizes."""

    sizes: tuple[Size, ...]  # one for square crops
    crop: str = "center"  # or "random": drawn by (seed, key), so that it is the same in every process
    seed: int = 0

    def nearest(self, height: int, width: int) -> Size:
        """The bucket whose aspect ratio is closest in the logarithm: it loses the least of the image."""
        ratio = math.log(width / height)
        return min(self.sizes, key=lambda s: (abs(math.log(s[1] / s[0]) - ratio), -math.prod(s), s))

    def __call__(self, image: np.ndarray, key: str) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """uint8 [H, W, 3] -> (uint8 [h, w, 3] of a bucket, (H, W, top, left)).

        The image is resized (Lanczos, with antialiasing) until it just covers the bucket, then cropped; top and left
        are the crop's corner in pixels of the resized image, as SDXL counts them.
        """
        full = image.shape[:2]
        size = self.nearest(*full)
        scale = max(size[0] / full[0], size[1] / full[1])
        covering = [max(s, round(f * scale)) for s, f in zip(size, full, strict=True)]
        resized = Image.fromarray(image).resize((covering[1], covering[0]), Image.Resampling.LANCZOS)
        top, left = self._corner([c - s for c, s in zip(covering, size, strict=True)], key)
        pixels = np.asarray(resized)[top : top + size[0], left : left + size[1]]
        return pixels.copy(), (*full, top, left)

    def _corner(self, spare: list[int], key: str) -> list[int]:
        if self.crop == "center":
            return [s // 2 for s in spare]
        name = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        return [int(x) for x in rng(self.seed, Purpose.CROP, name).integers(0, np.array(spare) + 1)]


def build_fit(size: int, buckets: bool, crop: str, seed: int, factor: int = 1, multiple: int = 1) -> Fit:
    """The Fit of a config's values.

    ``factor``: pixels of a latent's side; 1 without an autoencoder. ``multiple`` divides the sides, in pixels.
    """
    sizes = bucket_sizes(size, math.lcm(bucket_step(size, factor), multiple)) if buckets else [(size, size)]
    return Fit(tuple(sizes), crop, seed)
