"""How different the samples of one prompt are. Mode collapse lowers it, and a judge of single images misses that."""

from __future__ import annotations

import numpy as np

from .images import check

#: Cells along a side; images are averaged down to them before they are compared.
CELLS = 16
_CHUNK = 16  # images in float32 at a time


def area_average(images: np.ndarray, cells: int) -> np.ndarray:
    """Return means over equal areas, float32 [B, min(cells, H), min(cells, W), 3] in [0, 1], of uint8 [B, H, W, 3].

    A pixel that lies in two cells counts in each by its share, so any size will do. Raises ValueError for other dtypes
    or shapes.
    """
    images = check(images)
    rows, columns = (_shares(size, min(cells, size)) for size in images.shape[1:3])
    return np.concatenate([_averaged(images[i : i + _CHUNK], rows, columns) for i in range(0, len(images), _CHUNK)])


def _averaged(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    count, height, width, _ = images.shape
    lines = rows @ images.reshape(count, height, width * 3).astype(np.float32)
    return columns @ lines.reshape(count, len(rows), width, 3) / 255


def _shares(size: int, cells: int) -> np.ndarray:
    """[cells, size]: the share of each pixel in each cell's mean."""
    edges, pixel = np.linspace(0, size, cells + 1), np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.clip(overlap, 0, None) * cells / size).astype(np.float32)


def diversity(images: np.ndarray, samples: int | None = None) -> float:
    """Return the mean root-mean-square difference between two samples of a prompt, in [0, 1].

    0: all samples are the same. The difference is taken over pixels and colours after averaging to 16 x 16 cells (2 x 2
    pixels of a 32 x 32 image). So noise and fine textures, which reward hacking brings, do not count as variety, and
    images of any size share one scale. The mean over a prompt's pairs does not depend on their number, so groups of 4
    and of 16 can be compared. Independent pixels of standard deviation s give about sqrt(2) s after the averaging.

    Args:
        images: uint8 [P * S, H, W, 3], prompt-major.
        samples: S, at least 2. None makes one group of all images, whatever their prompts.

    Raises ValueError where the images are not whole groups of S.
    """
    cells = area_average(images, CELLS)
    samples = len(cells) if samples is None else samples
    if samples < 2 or len(cells) % samples:
        raise ValueError(f"diversity needs groups of 2 or more samples: {len(cells)} images are no groups of {samples}")
    groups = cells.reshape(len(cells) // samples, samples, -1)
    total = sum(_rms(groups[:, lag:] - groups[:, :-lag]).sum() for lag in range(1, samples))
    return float(total / (len(groups) * samples * (samples - 1) / 2))


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), -1, dtype=np.float64))
