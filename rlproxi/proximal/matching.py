"""Proximal matching: how the prox is learned (ProxDM, section 4).

The network sees y = x_t + sqrt(lam) n2 and is asked for n2. First an L1 phase, then
1 - exp(-m / zeta^2) with m the mean square error over the sample's dimensions: as zeta -> 0 its minimiser
goes from the conditional mean to the conditional mode, which is the prox.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .operator import expand
from .samplers import plan
from .schedule import VPSchedule


@dataclass(frozen=True)
class Draw:
    """One training draw: t, lam [B] float32 on the CPU."""

    t: Tensor
    lam: Tensor


def candidate_probabilities(candidates: list[int]) -> np.ndarray:
    """P(N) proportional to N^(1/3) over the step candidates (ProxDM, section 4.2)."""
    weights = np.asarray(candidates, dtype=np.float64) ** (1.0 / 3.0)
    return weights / weights.sum()


class TimeTable:
    """Every (t, lam) that the sampler will ask for, with its probability.

    N from the candidates, then one of its N steps uniformly, on the sampler's own grid. With
    start_time = 1 and the uniform grid this is ProxDM's t = floor(u/delta) delta, delta = 1/N.

    Raises ValueError for a candidate the sampler cannot take (``backward`` with gamma >= 2).
    """

    def __init__(
        self,
        schedule: VPSchedule,
        candidates: list[int],
        sampler: str = "hybrid",
        start_time: float = 1.0,
        spacing: str = "uniform",
    ):
        entries = [
            (step.t, step.lam, p / n)
            for n, p in zip(candidates, candidate_probabilities(candidates))
            for step in plan(schedule, sampler, n, start_time, spacing)
        ]
        self.t, self.lam, self.probability = (np.array(column) for column in zip(*entries))

    def draw(self, rng: np.random.Generator, batch: int) -> Draw:
        """``batch`` independent draws."""
        index = rng.choice(len(self.t), size=batch, p=self.probability)
        return Draw(torch.from_numpy(self.t[index]).float(), torch.from_numpy(self.lam[index]).float())


def corrupt(schedule: VPSchedule, x0: Tensor, t: Tensor, lam: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """y = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n1 + sqrt(lam) n2. All [B, ...]; t, lam [B]."""
    alpha_bar = expand(schedule.alpha_bar(t), x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * n1 + expand(lam, x0).sqrt() * n2


def expected_noise(schedule: VPSchedule, y: Tensor, x0: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """E[n2 | y, x0] = sqrt(lam) (y - sqrt(alpha_bar) x0) / (1 - alpha_bar + lam), shaped like y; t, lam [B].

    In the mean the same target as n2, without the part of it that n1 hides: of a Gaussian p_0 of variance s^2 y leaves a variance of
    lam alpha_bar s^2 / ((1 - alpha_bar + lam) total) open in it, total = alpha_bar s^2 + 1 - alpha_bar + lam, where it leaves
    1 - lam / total of n2. Its median and its mode are not those of n2. Derived; at t = 0 it is denoising score matching's target.
    """
    alpha_bar, lam = expand(schedule.alpha_bar(t), y), expand(lam, y)
    return lam.sqrt() * (y - alpha_bar.sqrt() * x0) / (1 - alpha_bar + lam)


def looks_for_mode(zeta: float | None) -> bool:
    """Whether ``matching_loss`` has its minimum at the mode: with a finite zeta."""
    return zeta is not None and math.isfinite(zeta)


def matching_target(
    expected: bool, zeta: float | None, schedule: VPSchedule, y: Tensor, x0: Tensor, t: Tensor, lam: Tensor, n2: Tensor
) -> Tensor:
    """What eps is compared with: n2, or ``expected_noise`` where that is asked for and the loss does not look for the mode."""
    return expected_noise(schedule, y, x0, t, lam) if expected and not looks_for_mode(zeta) else n2


def level_weight(schedule: VPSchedule, t: Tensor, lam: Tensor, power: float, zeta: float | None) -> Tensor:
    """[B]: what makes ``matching_loss`` of ``expected_noise`` that of a score model at y's whole noise. t, lam [B].

    y / sqrt(alpha_bar) is x0 with noise of variance level = (1 - alpha_bar + lam)/alpha_bar. A clean prediction D of it is off by
    sqrt(lam/(1 - alpha_bar + lam)) (x0 - D)/sqrt(level) as a prox, and by (x0 - D)/sqrt(level) as denoising score matching has it.
    The weight is the ratio, squared where the loss is (zeta infinite), times level^power; at t = 0 it is lam^power. Derived: with
    lam^power alone a few-step sampler's first steps, where captions are decided, count for a tenth of that.
    """
    alpha_bar = schedule.alpha_bar(t)
    noise = 1 - alpha_bar + lam
    return (noise / lam) ** (0.5 if zeta is None else 1.0) * (noise / alpha_bar) ** power


def matching_loss(eps: Tensor, n2: Tensor, zeta: float | None = None) -> Tensor:
    """Per-sample loss [B]: mean |eps - n2| where zeta is None, else 1 - exp(-m/zeta^2), and m where zeta is infinite.

    m is the mean over dimensions of (eps - n2)^2. Source: ProxDM, eq. (12) and its L1 warm-up; m is zeta^2 times the limit.
    """
    error = (eps - n2).flatten(1)
    if zeta is None:
        return error.abs().mean(1)
    if math.isinf(zeta):
        return error.square().mean(1)
    return -torch.expm1(-error.square().mean(1) / zeta**2)
