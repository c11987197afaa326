"""Exact answers for p_0 = N(m, s^2 I) and for Gaussian mixtures in 1-D, written apart from the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0


def alpha_bar(t):
    """exp(-(0.1 t + 9.95 t^2)); float or tensor."""
    exponent = -(BETA_MIN * t + (BETA_MAX - BETA_MIN) / 2 * t * t)
    return torch.exp(exponent) if torch.is_tensor(exponent) else math.exp(exponent)


def gamma(a: float, b: float) -> float:
    """B(a, b)."""
    return BETA_MIN * (b - a) + (BETA_MAX - BETA_MIN) / 2 * (b * b - a * a)


@dataclass(frozen=True)
class Gaussian:
    """p_0 = N(mean, std^2 I)."""

    mean: float
    std: float

    def marginal(self, t):
        """(mean, variance) of x_t."""
        ab = alpha_bar(t)
        return ab**0.5 * self.mean, ab * self.std**2 + 1 - ab

    def prox(self, y: Tensor, t, lam, cond=None) -> Tensor:
        """(v y + lam m_t) / (v + lam). ProxDM's closed form."""
        m, v = self.marginal(t)
        return (v * y + lam * m) / (v + lam)

    def eps(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        """-sqrt(1 - ab) score = E[n | x_t = x]; t [B], x [B, D]."""
        m, v = self.marginal(t[:, None])
        return (1 - alpha_bar(t[:, None])).sqrt() * (x - m) / v


@dataclass(frozen=True)
class Mixture:
    """p_0 = sum_i w_i N(m_i, std^2) on the line."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    std: float

    def _parts(self, x: float, t: float) -> tuple[np.ndarray, np.ndarray, float]:
        ab = alpha_bar(t)
        v = ab * self.std**2 + 1 - ab
        centres = math.sqrt(ab) * np.asarray(self.means)
        return np.log(self.weights) - (x - centres) ** 2 / (2 * v), centres, v

    def log_density(self, x: float, t: float) -> float:
        """ln p_t(x)."""
        logs, _, v = self._parts(x, t)
        return float(np.logaddexp.reduce(logs) - 0.5 * math.log(2 * math.pi * v))

    def score(self, x: float, t: float) -> float:
        """d/dx ln p_t(x)."""
        logs, centres, v = self._parts(x, t)
        share = np.exp(logs - np.logaddexp.reduce(logs))
        return float((share * (centres - x)).sum() / v)

    def prox(self, y: float, t: float, lam: float) -> float:
        """argmin 1/2 (x - y)^2 - lam ln p_t(x), by search: a local minimiser from each mode, the best wins.

        Between y and the mean that a component pulls to lies that component's own minimum.
        """
        def cost(x: float) -> float:
            return 0.5 * (x - y) ** 2 - lam * self.log_density(x, t)

        _, centres, v = self._parts(y, t)
        found = []
        for centre in centres:
            own = (v * y + lam * centre) / (v + lam)  # where this component alone would put it
            width = 4 * math.sqrt(v * lam / (v + lam)) + 1e-12
            found.append(minimize_scalar(cost, bounds=(own - width, own + width), method="bounded",
                                         options={"xatol": 1e-13}))
        return float(min(found, key=lambda r: r.fun).x)


@dataclass(frozen=True)
class PointCloud:
    """p_0 = the mean of point masses at ``points`` [M, D], so p_t = mean of N(sqrt(ab) p_i, (1 - ab) I)."""

    points: Tensor

    def _means(self, x: Tensor, t: float) -> Tensor:
        """E[sqrt(ab) p | x_t = x], [B, D]."""
        centres = alpha_bar(t) ** 0.5 * self.points
        return torch.softmax(-torch.cdist(x, centres).square() / (2 * (1 - alpha_bar(t))), 1) @ centres

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """ln p_t(x) up to a constant of t, [B]."""
        centres = alpha_bar(t) ** 0.5 * self.points
        return torch.logsumexp(-torch.cdist(x, centres).square() / (2 * (1 - alpha_bar(t))), 1)

    def eps(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        """-sqrt(1 - ab) score; t [B], of one value."""
        at = float(t[0])
        return (x - self._means(x, at)) / (1 - alpha_bar(at)) ** 0.5

    def prox(self, y: Tensor, t: float, lam: float, cond=None) -> Tensor:
        """argmin 1/2 |x - y|^2 - lam ln p_t(x); y [B, D] float64.

        At t = 0 the nearest point. Else the fixed point of x = (v y + lam E[sqrt(ab) p | x]) / (v + lam), v = 1 - ab, which is
        expectation-maximisation: every turn lowers the objective. From y and from the minimum of the nearest mass alone; the
        better one wins.
        """
        if t == 0.0:
            return self.points[torch.cdist(y, self.points).argmin(1)]
        v = 1 - alpha_bar(t)
        nearest = alpha_bar(t) ** 0.5 * self.points[torch.cdist(y, alpha_bar(t) ** 0.5 * self.points).argmin(1)]
        found = []
        for x in (y, (v * y + lam * nearest) / (v + lam)):
            x, moving = x.clone(), torch.arange(len(y))  # most points stand still after a few turns
            for _ in range(2000):
                before = x[moving]
                x[moving] = after = (v * y[moving] + lam * self._means(before, t)) / (v + lam)
                moving = moving[(after - before).abs().amax(1) >= 1e-10]
                if not len(moving):
                    break
            found.append(x)
        costs = torch.stack([(x - y).square().sum(1) / 2 - lam * self.log_density(x, t) for x in found])
        return torch.where((costs[0] <= costs[1])[:, None], *found)


def affine_moments(run, steps: int) -> tuple[float, float]:
    """(mean, variance) of an affine sampler's output, read off exactly by feeding it basis vectors.

    ``run(x_N, noise)`` maps [B, 1] float64 to [B, 1]. Row 0 sees no noise at all, row 1 only x_N = 1, and row
    1 + k only step k's noise = 1; with unit normal inputs the variance is the sum of squared responses.
    """
    rows = steps + 2

    def one_hot(row: int) -> Tensor:
        x = torch.zeros(rows, 1, dtype=torch.float64)
        x[row] = 1.0
        return x

    out = run(one_hot(1), lambda k, like: one_hot(1 + k)).squeeze(1)
    return float(out[0]), float((out[1:] - out[0]).square().sum())


def exact_normals(rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] float64 whose empirical mean is 0 and covariance the identity, to rounding."""
    x = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, _ = torch.linalg.qr(x - x.mean(0))
    return q * rows**0.5
