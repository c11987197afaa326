"""The variance-preserving schedule and the time grids of the samplers.

Functions take Python floats or tensors and return the same. Times lie in [0, 1], and 0 is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

GRIDS = ("uniform", "gamma", "quadratic")


@dataclass(frozen=True)
class VPSchedule:
    """dX = -beta(t)/2 X dt + sqrt(beta(t)) dW with beta(t) = beta_min + (beta_max - beta_min) t.

    Source: ProxDM (arXiv 2507.08956), section 2; Song et al. 2021, VP SDE.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min < self.beta_max:
            raise ValueError(f"need 0 < beta_min < beta_max, got {self.beta_min} and {self.beta_max}")

    def integral(self, a, b):
        """Return B(a, b), the integral of beta from a to b. Floats or broadcastable tensors."""
        return self.beta_min * (b - a) + 0.5 * (self.beta_max - self.beta_min) * (b * b - a * a)

    def alpha_bar(self, t):
        """Return exp(-B(0, t)), the squared coefficient of x_0 in x_t. Float or tensor."""
        exponent = -self.integral(0.0, t)
        return torch.exp(exponent) if torch.is_tensor(exponent) else math.exp(exponent)

    def inverse_integral(self, total):
        """Return the t with B(0, t) = total. Float or tensor."""
        slope = self.beta_max - self.beta_min
        root = self.beta_min**2 + 2.0 * slope * total
        root = torch.sqrt(root) if torch.is_tensor(root) else math.sqrt(root)
        # The rationalised root: exact for total -> 0, where (root - beta_min)/slope cancels.
        return 2.0 * total / (root + self.beta_min)

    def time_of_alpha_bar(self, alpha_bar):
        """Return the t >= 0 that has this alpha_bar; it may lie beyond 1. Float or tensor."""
        log = torch.log(alpha_bar) if torch.is_tensor(alpha_bar) else math.log(alpha_bar)
        return self.inverse_integral(-log)

    def grid(self, num_steps: int, start_time: float = 1.0, spacing: str = "uniform") -> list[float]:
        """Return the times 0 = t_0 < ... < t_N = start_time.

        ``uniform`` is uniform in t (ProxDM). ``gamma`` makes every gamma_k = B(t_{k-1}, t_k) equal, and is the coarsest
        near the data. ``quadratic``, t = start_time (k/N)^2, is the finest near the data, and its first steps, from
        noise, are the largest of the three.

        Raises ValueError for num_steps < 1, a start time outside (0, 1] or an unknown spacing.
        """
        if num_steps < 1:
            raise ValueError(f"num_inference_steps is {num_steps}; a sampler needs at least 1 step")
        if not 0.0 < start_time <= 1.0:
            raise ValueError(f"start_time is {start_time}; it must lie in (0, 1]")
        fractions = [k / num_steps for k in range(num_steps + 1)]
        if spacing == "uniform":
            return [start_time * f for f in fractions]
        if spacing == "quadratic":
            return [start_time * f * f for f in fractions]
        if spacing == "gamma":
            total = self.integral(0.0, start_time)
            times = [self.inverse_integral(total * f) for f in fractions]
            times[-1] = start_time
            return times
        raise ValueError(f"grid spacing {spacing!r} is unknown; choose one of {', '.join(GRIDS)}")
