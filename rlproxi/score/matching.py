"""Denoising score matching in its eps form (Ho et al. 2020, L_simple; Song et al. 2021 for the VP SDE)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..proximal.matching import corrupt
from ..proximal.schedule import VPSchedule


def draw_times(rng: np.random.Generator, batch: int, t_min: float = 1e-3) -> Tensor:
    """t [B] float32, uniform on [t_min, 1]. At t = 0 there is no noise left to predict.

    Raises ValueError for t_min outside [0, 1).
    """
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min is {t_min}; it must lie in [0, 1)")
    return torch.from_numpy(rng.uniform(t_min, 1.0, size=batch)).float()


def perturb(schedule: VPSchedule, x0: Tensor, t: Tensor, n: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n. All [B, ...]; t [B]."""
    return corrupt(schedule, x0, t, torch.zeros_like(t), n, n)


def matching_loss(eps: Tensor, n: Tensor) -> Tensor:
    """Per-sample loss [B]: the mean over dimensions of (eps - n)^2."""
    return (eps - n).flatten(1).square().mean(1)
