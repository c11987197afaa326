"""A 64-bit perceptual hash: similar for a picture and its resized, re-encoded or slightly retouched copies."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

#: Pixels of the side of the picture that is transformed.
_SIDE = 32


@lru_cache(maxsize=1)
def _basis() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cosines [F, 32], rows [64], columns [64]) of the 64 lowest frequencies without the mean."""
    count = 12  # the 64 lowest lie within a quarter circle of radius 9
    u, v = np.divmod(np.arange(count * count), count)
    order = np.lexsort((u, u * u + v * v))[1:65]
    x = np.arange(_SIDE)
    return np.cos(np.pi / (2 * _SIDE) * np.arange(count)[:, None] * (2 * x + 1)), u[order], v[order]


def phash(image: np.ndarray) -> int:
    """The hash, in [0, 2**64), of a picture, uint8 [H, W, 3].

    Each of the 64 lowest frequencies of the grey picture (DCT-II of 32 x 32 pixels, without the mean) gives one bit,
    set if it is above their median. A picture without any structure has hash 0. The idea is Zauner's (Implementation
    and benchmarking of perceptual image hash functions, 2010); the choice of frequencies is ours.
    """
    grey = Image.fromarray(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    cosines, rows, columns = _basis()
    waves = (cosines @ np.asarray(grey, np.float64) @ cosines.T)[rows, columns]
    waves = waves.round(3)  # a flat picture's rounding errors are no structure
    return int(np.packbits(waves > np.median(waves)).view(">u8")[0])


def distance(a: int, b: int) -> int:
    """The number of bits in which two hashes differ."""
    return (int(a) ^ int(b)).bit_count()
