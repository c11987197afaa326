"""Clean predictions: the estimate of x_0 in a proximal residual, and the noise levels that have one.

The prox's input at a *level* (t, lam) is an ordinary noisy sample,

    y = alpha x_0 + sigma n,    alpha = sqrt(alpha_bar(t)),    sigma = sqrt(1 - alpha_bar(t) + lam),

so one residual contains one estimate of x_0 (docs/method.md, section 1: the warm start, read backwards). Distillation
and diffused rewards are written for estimates of x_0, and this module makes them from proximal networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .matching import TimeTable
from .operator import Denoiser, expand
from .schedule import VPSchedule


@dataclass(frozen=True)
class Level:
    """One noise level for each sample: t, lam, alpha, sigma, all [B] and of one floating dtype."""

    t: Tensor
    lam: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, schedule: VPSchedule, t: Tensor, lam: Tensor) -> Level:
        """Return the level of t, lam [B], computed in float64, in t's dtype (at least float32)."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        exponent = schedule.integral(0.0, t.double())
        alpha = (-exponent / 2).exp()
        # 1 - alpha_bar as expm1: near t = 0 the subtraction would keep no digits.
        sigma = (lam.double() - torch.expm1(-exponent)).sqrt()
        return cls(t.to(dtype), lam.to(dtype), alpha.to(dtype), sigma.to(dtype))

    @property
    def kappa(self) -> Tensor:
        """sigma^2 / alpha [B], the factor from a score at this level to a displacement of x_0."""
        return self.sigma.square() / self.alpha

    @property
    def log_noise(self) -> Tensor:
        """ln(sigma / alpha) [B], the level as one number: with lam = 0 half the negative log signal-to-noise ratio."""
        return (self.sigma / self.alpha).log()

    def diffuse(self, x0: Tensor, n: Tensor) -> Tensor:
        """Return y = alpha x0 + sigma n. x0, n [B, ...]; differentiable in both."""
        return expand(self.alpha, x0) * x0 + expand(self.sigma, x0) * n

    def noise(self, y: Tensor, x0: Tensor) -> Tensor:
        """Return the n with which ``diffuse`` makes y [B, ...] from x0."""
        return (y - expand(self.alpha, y) * x0) / expand(self.sigma, y)

    def to(self, device: torch.device | str) -> Level:
        """Return the same level on another device."""
        return Level(*(part.to(device) for part in (self.t, self.lam, self.alpha, self.sigma)))


#: clean(y, level, cond) -> estimate of x_0, like y.
Clean = Callable[[Tensor, Level, Any], Tensor]


def clean_prediction(y: Tensor, eps: Tensor, level: Level) -> Tensor:
    """Return the estimate of x_0 in a proximal residual eps: (y - sigma^2 / sqrt(lam) eps) / alpha.

    Where eps is the conditional mean E[n_2 | y], as of L2-trained and warm-started networks, this is E[x_0 | y]
    exactly. After the L1 phase of proximal matching eps is a median, after its second phase a mode. The result is then
    equal to E[x_0 | y] only where mean and mode agree (Gaussians).

    Errors of eps come out times kappa / sqrt(lam). Arithmetic is float32, or float64 if y is. y, eps [B, ...]; lam > 0.
    """
    work = torch.promote_types(y.dtype, torch.float32)
    y, eps = y.to(work), eps.to(work)
    ratio = level.sigma.square() / level.lam.sqrt()
    return (y - expand(ratio, y) * eps) / expand(level.alpha, y)


def as_clean(denoiser: Denoiser) -> Clean:
    """Return ``clean_prediction`` of eps(y, t, lam, cond) as a function of (y, level, cond).

    For guidance pass ``ProximalOperator(...).residual``: guidance is linear in eps, so it is linear in x_0 too.
    """

    def clean(y: Tensor, level: Level, cond: Any = None) -> Tensor:
        return clean_prediction(y, denoiser(y, level.t, level.lam, cond), level)

    return clean


class Ladder:
    """The levels of a table of (t, lam, probability), from the least to the most noise.

    A proximal network has only been trained on these pairs, so distillation draws and descends on them and nowhere
    between. Levels come out as float32 on the CPU.
    """

    def __init__(self, times: TimeTable, schedule: VPSchedule):
        log_noise = Level.of(schedule, torch.from_numpy(times.t), torch.from_numpy(times.lam)).log_noise.numpy()
        order = np.argsort(log_noise, kind="stable")
        self.schedule = schedule
        self.t, self.lam, self.log_noise = times.t[order], times.lam[order], log_noise[order]
        self.cumulative = np.cumsum(times.probability[order]) / times.probability.sum()

    def draw(self, rng: np.random.Generator, batch: int, low: float = 0.02, high: float = 0.98) -> Level:
        """Draw ``batch`` independent levels by the table's probabilities, between two quantiles of the noise.

        A quantile u ~ U[low, high] is drawn and looked up. So an entry at the end loses the part of its mass that lies
        outside, and is missing only when all of it does.
        """
        index = np.searchsorted(self.cumulative, rng.uniform(low, high, batch), side="right")
        return self._at(index.clip(max=len(self.t) - 1))

    def below(self, level: Level, fraction: float) -> Level:
        """Return the entry ``fraction`` of the way in ln(sigma/alpha) from ``level`` down to the lowest, per sample.

        It is the nearest entry, but never one above ``level``; a level below all entries gets the lowest.
        """
        start = level.log_noise.detach().double().cpu().numpy()
        target = (1 - fraction) * start + fraction * self.log_noise[0]
        distance = np.abs(self.log_noise[None] - target[:, None])
        # The tolerance lets an entry that was rounded to float32 find itself.
        distance[:, 1:][self.log_noise[None, 1:] > start[:, None] + 1e-5] = np.inf
        return self._at(distance.argmin(1)).to(level.t.device)

    def _at(self, index: np.ndarray) -> Level:
        t, lam = (torch.from_numpy(column[index]).float() for column in (self.t, self.lam))
        return Level.of(self.schedule, t, lam)
