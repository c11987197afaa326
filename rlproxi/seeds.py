"""Randomness by name: every number follows from a tuple such as (run seed, step, prompt, sample).

Whoever draws it, wherever and whenever, the name gives the same numbers. Generators live on the
CPU for that reason; what they draw is moved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def rng(*name: int) -> np.random.Generator:
    """A numpy generator named by non-negative integers."""
    return np.random.default_rng(_entropy(name))


def _entropy(name: tuple[int, ...]) -> tuple[int, ...]:
    """numpy pads short entropy with zeros, so that (1,) and (1, 0) would be one name; the length keeps them apart."""
    return (len(name), *name)


def seed_of(*name: int) -> int:
    """A 63-bit seed from a name, through numpy's SeedSequence hash."""
    return int(np.random.SeedSequence(_entropy(name)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*name: int) -> torch.Generator:
    """A torch CPU generator named by non-negative integers."""
    return torch.Generator().manual_seed(seed_of(*name))


class NamedNoise:
    """Noise for a batch whose rows have names of their own: row i depends on ``names[i]`` alone.

    ``start`` is x_N; an instance is the sampler's ``noise(k, like)``. With ``start_names``, x_N and, where ``first`` says so,
    the first step's noise come from those names: rows that share one share z_N, all that the policy does not choose.
    """

    def __init__(
        self, names: list[tuple[int, ...]], start_names: list[tuple[int, ...]] | None = None, first: bool = True
    ):
        self.steps = [generator(*name, 1) for name in names]
        self.starts = [generator(*name, 0) for name in (start_names or names)]
        self.shared_first = first and start_names is not None

    def start(self, shape: tuple[int, ...], device="cpu") -> Tensor:
        """x_N [B, *shape] float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.starts]).to(device)

    def __call__(self, k: int, like: Tensor) -> Tensor:
        generators, self.shared_first = (self.starts if self.shared_first else self.steps), False
        rows = [torch.randn(like.shape[1:], generator=g) for g in generators]
        return torch.stack(rows).to(like)
