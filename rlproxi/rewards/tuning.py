"""How many images a scorer should take at once: measured, not guessed."""

from __future__ import annotations

import time

import numpy as np
import torch

from .base import TorchScorer


def tune_micro_batch(scorer: TorchScorer, images: np.ndarray, prompts: list[str], repeats: int = 3) -> dict[int, float]:
    """Sets ``scorer.micro_batch`` to the smallest size within 5 % of the best throughput; returns size -> images/s.

    Tries 1, 2, 4, ... up to ``images`` uint8 [B, H, W, 3], a typical request, and stops where memory ends. On a GPU
    one image more or less a forward changes the rounding, so scores then depend on what was measured: runs that must
    repeat bit for bit set a number instead.

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


def _seconds(scorer: TorchScorer, images: np.ndarray, prompts: list[str]) -> float:
    begun = time.perf_counter()
    scorer.score(images, prompts)  # ends on the CPU, so a GPU has finished
    return time.perf_counter() - begun
