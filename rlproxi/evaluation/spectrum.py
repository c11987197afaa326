"""The spectrum of images along rows and columns, beside that of real ones: what shows a grid.

Networks that work on patches, or that are trained against a reward, may lay a grid over their images. A grid of period
p pixels is a peak at frequency 1/p of an image's profiles: of its mean over columns, [H], and over rows, [W]. With F
the Fourier coefficient of a profile at 1/p, less the profile's mean, there are two figures for each direction and
period:

ratio    mean |F|^2 of the images over mean |F|^2 of the data: 1 is like the data, above it is more structure of that
         period, below it is blur
common   |mean F of the images - mean F of the data|^2 over mean |F|^2 of the data: what all images have at the same
         place. 0 is like the data; of n real images it is about 1/n. A network's grid does not move, so it stands out
         here over the data's own edges, which do.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .images import check

#: In pixels. A period that does not divide the side is measured at its own frequency all the same.
PERIODS = (2, 3, 4, 5, 6, 7, 8)
#: Direction -> the axis of [B, H, W, 3] over which the profile is a mean. Rows: the profile runs down the rows.
DIRECTIONS = {"rows": 2, "columns": 1}


def coefficients(images: np.ndarray) -> np.ndarray:
    """Fourier coefficients of the profiles, complex [B, 2, 7, 3], of uint8 [B, H, W, 3]: direction, period, colour."""
    pixels, found = check(images).astype(np.float32) / 255, []
    for axis in DIRECTIONS.values():
        profile = pixels.mean(axis, dtype=np.float64)  # [B, side, 3]
        profile -= profile.mean(1, keepdims=True)
        side = profile.shape[1]
        waves = np.exp(-2j * np.pi * np.arange(side) / np.array(PERIODS)[:, None]) / side
        found.append(np.einsum("ps,bsc->bpc", waves, profile))
    return np.stack(found, 1)


class DataSpectrum:
    """The spectrum of real images, kept as means: what others are compared with."""

    def __init__(self) -> None:
        self.images = 0
        self._sum = np.zeros((len(DIRECTIONS), len(PERIODS), 3), complex)
        self._power = np.zeros((len(DIRECTIONS), len(PERIODS)))

    def add(self, images: np.ndarray) -> None:
        """Take more real images, uint8 [B, H, W, 3]."""
        found = coefficients(images)
        self.images += len(images)
        self._sum += found.sum(0)
        self._power += (np.abs(found) ** 2).mean(-1).sum(0)

    def seen(self, batches: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """The same batches, taken on their way."""
        for batch in batches:
            self.add(batch)
            yield batch

    def compare(self, images: np.ndarray) -> dict:
        """Return the spectrum of images uint8 [B, H, W, 3].

        {"rows": {"2": ratio, ..., "8": ratio}, "columns": ..., "worst": the largest of these ratios, "common": {"rows":
        {"2": common, ...}, "columns": ...}, "images": B}.
        """
        found = coefficients(images)
        # A direction in which the data have nothing at all (one colour) would divide by 0.
        data = np.maximum(self._power / self.images, 1e-12)
        ratio = (np.abs(found) ** 2).mean((0, -1)) / data
        common = (np.abs(found.mean(0) - self._sum / self.images) ** 2).mean(-1) / data

        def named(values: np.ndarray) -> dict:
            return {
                name: {str(p): float(v) for p, v in zip(PERIODS, row, strict=True)}
                for name, row in zip(DIRECTIONS, values, strict=True)
            }

        return {**named(ratio), "worst": float(ratio.max()), "common": named(common), "images": len(images)}
