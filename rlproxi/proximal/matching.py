"""Proximal matching: the loss that trains the prox (ProxDM, section 4).

The network gets y = x_t + sqrt(lam) n2 and predicts n2. Training begins with an L1 phase. Then the loss is
1 - exp(-m / zeta^2), where m is the mean square error over the sample's dimensions and zeta a width without unit. As
zeta -> 0 the minimiser goes from the conditional mean to the conditional mode, which is the prox.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .operator import expand
from .samplers import plan
from .schedule import VPSchedule


class TimeTable:
    """Every pair (t, lam) at which the sampler calls the network, with its probability.

    A candidate N is drawn in proportion to N^(1/3) (ProxDM, section 4.2), then one of its N steps uniformly, on the
    sampler's own grid. With start_time = 1 and the uniform grid this is ProxDM's t = floor(u/delta) delta, delta = 1/N.

    Raises ValueError for a candidate that the sampler cannot take (``backward`` with gamma >= 2).
    """

    def __init__(
        self,
        schedule: VPSchedule,
        candidates: list[int],
        sampler: str = "hybrid",
        start_time: float = 1.0,
        spacing: str = "uniform",
    ):
        weights = np.asarray(candidates, dtype=np.float64) ** (1.0 / 3.0)
        entries = [
            (step.t, step.lam, p / n)
            for n, p in zip(candidates, weights / weights.sum(), strict=True)
            for step in plan(schedule, sampler, n, start_time, spacing)
        ]
        self.t, self.lam, self.probability = (np.array(column) for column in zip(*entries, strict=True))

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Draw ``batch`` independent pairs: t, lam [B] float32 on the CPU."""
        index = rng.choice(len(self.t), size=batch, p=self.probability)
        return torch.from_numpy(self.t[index]).float(), torch.from_numpy(self.lam[index]).float()


def corrupt(schedule: VPSchedule, x0: Tensor, t: Tensor, lam: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """Return the network's input y = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n1 + sqrt(lam) n2.

    x0, n1, n2 and y are [B, ...]; t, lam [B].
    """
    alpha_bar = expand(schedule.alpha_bar(t), x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * n1 + expand(lam, x0).sqrt() * n2


def expected_noise(schedule: VPSchedule, y: Tensor, x0: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """Return E[n2 | y, x0] = sqrt(lam) (y - sqrt(alpha_bar) x0) / (1 - alpha_bar + lam), like y; t, lam [B].

    As a target it has the same conditional mean as n2 and less variance: it lacks the part of n2 that n1 hides. For a
    Gaussian p_0 of variance s^2, with total = alpha_bar s^2 + 1 - alpha_bar + lam, the target's variance given y is
    lam alpha_bar s^2 / ((1 - alpha_bar + lam) total), and that of n2 is 1 - lam / total. The target's median and mode
    are not those of n2. Derived; at t = 0 it is the target of denoising score matching.
    """
    alpha_bar, lam = expand(schedule.alpha_bar(t), y), expand(lam, y)
    return lam.sqrt() * (y - alpha_bar.sqrt() * x0) / (1 - alpha_bar + lam)


def looks_for_mode(zeta: float | None) -> bool:
    """Return whether ``matching_loss`` has its minimum at the mode, which it has for a finite zeta."""
    return zeta is not None and math.isfinite(zeta)


def matching_target(
    expected: bool, zeta: float | None, schedule: VPSchedule, y: Tensor, x0: Tensor, t: Tensor, lam: Tensor, n2: Tensor
) -> Tensor:
    """Return the target of eps: n2, or ``expected_noise`` if ``expected`` and the loss does not look for the mode."""
    return expected_noise(schedule, y, x0, t, lam) if expected and not looks_for_mode(zeta) else n2


def level_weight(schedule: VPSchedule, t: Tensor, lam: Tensor, power: float, zeta: float | None) -> Tensor:
    """Return weights [B] that turn ``matching_loss`` of ``expected_noise`` into a score model's loss. t, lam [B].

    y / sqrt(alpha_bar) is x0 with noise of variance level = (1 - alpha_bar + lam)/alpha_bar. Let D be the clean
    prediction that the network's answer contains. Then the error is (x0 - D)/sqrt(level) in denoising score matching,
    and sqrt(lam/(1 - alpha_bar + lam)) times that in proximal matching. The weight is the ratio of the two errors,
    squared where the loss is a square (zeta infinite), times level^power. At t = 0 it is lam^power.

    Derived. With lam^power alone, the first steps of a few-step sampler, which decide what the caption says, would
    count for a tenth of that.
    """
    alpha_bar = schedule.alpha_bar(t)
    noise = 1 - alpha_bar + lam
    return (noise / lam) ** (0.5 if zeta is None else 1.0) * (noise / alpha_bar) ** power


def matching_loss(eps: Tensor, n2: Tensor, zeta: float | None = None) -> Tensor:
    """Return the loss of each sample, [B].

    zeta None: mean |eps - n2|. zeta finite: 1 - exp(-m/zeta^2), where m is the mean over dimensions of (eps - n2)^2.
    zeta infinite: m, which is zeta^2 times the limit. Source: ProxDM, eq. (12) and its L1 warm-up.
    """
    error = (eps - n2).flatten(1)
    if zeta is None:
        return error.abs().mean(1)
    if math.isinf(zeta):
        return error.square().mean(1)
    return -torch.expm1(-error.square().mean(1) / zeta**2)
