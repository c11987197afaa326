"""How many images a scorer should take at once: measured, not guessed."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from .base import Scorer


@runtime_checkable
class MicroBatched(Scorer, Protocol):
    """A scorer that takes ``micro_batch`` images in one forward."""

    micro_batch: int


def tune_micro_batch(
    scorer: MicroBatched, images: np.ndarray, prompts: list[str], repeats: int = 3
) -> dict[int, float]:
    """Sets ``scorer.micro_batch`` to the smallest size within 5 % of the best throughput; returns size -> images/s.

    Tries 1, 2, 4, ... up to B, and stops at the first size that does not fit into memory. On a GPU the number of images
    in a forward changes the rounding, so scores then depend on the measurement: a run that must repeat bit for bit
    sets a number instead.

    Args:
        scorer: what is tuned.
        images: uint8 [B, H, W, 3], a typical request. prompts: B of them.
        repeats: measurements of each size, of which the fastest counts.

    Raises RuntimeError where not even one image fits.
    """
    sizes = sorted({min(2**k, len(images)) for k in range(len(images).bit_length() + 1)})
    rates: dict[int, float] = {}
    for size in sizes:
        scorer.micro_batch = size
        try:
            scorer.score(images[:size], prompts[:size])  # warm-up, and the memory test
            rates[size] = len(images) / min(_seconds(scorer, images, prompts) for _ in range(repeats))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if not rates:
                raise RuntimeError(
                    "not even one image fits into this GPU's memory: use precision=bfloat16, or give "
                    "the scorer a GPU of its own"
                ) from None
            break
    best = max(rates.values())
    scorer.micro_batch = next(size for size in sizes if rates.get(size, 0) >= 0.95 * best)
    return rates


def _seconds(scorer: Scorer, images: np.ndarray, prompts: list[str]) -> float:
    begun = time.perf_counter()
    scorer.score(images, prompts)  # ends on the CPU, so a GPU has finished
    return time.perf_counter() - begun
