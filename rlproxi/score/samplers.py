"""Euler-Maruyama, probability-flow Euler and DDIM as one affine recursion around eps.

Each step from t = t_k to t' = t_{k-1} is x' = a x + b eps(x, t) + s n. With gamma = B(t', t), ab and ab' the
alpha_bar at t and t', and sigma = eta sqrt((1 - ab')/(1 - ab)) sqrt(1 - ab/ab'):

============== =============== ========================================== ===========
name           a               b                                          s
============== =============== ========================================== ===========
euler_maruyama 1 + gamma/2     -gamma / sqrt(1 - ab)                      sqrt(gamma)
ode            1 + gamma/2     -gamma / (2 sqrt(1 - ab))                  0
ddim           sqrt(ab'/ab)    sqrt(1 - ab' - sigma^2) - a sqrt(1 - ab)   sigma
============== =============== ========================================== ===========

The first two are explicit: the score, -eps/sqrt(1 - ab), is taken at the *old* time. So no model is ever
asked about t = 0 and the grid may end there; a grid whose first entry is a small t_min ends at t_min
instead. Sources: Song et al. 2021 (SDE, ODE), Song, Meng, Ermon 2021 (DDIM, eq. 12 and 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..proximal.samplers import Noise, generator_noise
from ..proximal.schedule import VPSchedule
from .model import EpsModel

SAMPLERS = ("euler_maruyama", "ode", "ddim")


def coefficients(
    schedule: VPSchedule, sampler: str, t: float, t_next: float, eta: float = 0.0
) -> tuple[float, float, float]:
    """(a, b, s) of the table, for t > t_next >= 0. Raises ValueError for an unknown sampler."""
    gamma = schedule.integral(t_next, t)
    noise = -math.expm1(-schedule.integral(0.0, t))  # 1 - ab without cancellation
    if sampler == "euler_maruyama":
        return 1 + gamma / 2, -gamma / math.sqrt(noise), math.sqrt(gamma)
    if sampler == "ode":
        return 1 + gamma / 2, -gamma / (2 * math.sqrt(noise)), 0.0
    if sampler == "ddim":
        noise_next = -math.expm1(-schedule.integral(0.0, t_next))
        a = math.exp(gamma / 2)  # ab'/ab = exp(gamma)
        variance = eta**2 * noise_next / noise * -math.expm1(-gamma)
        # noise_next - variance >= 0 for eta <= 1; rounding can take it just under.
        return a, math.sqrt(max(noise_next - variance, 0.0)) - a * math.sqrt(noise), math.sqrt(variance)
    raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")


def sample(
    model: EpsModel,
    schedule: VPSchedule,
    sampler: str,
    times: list[float],
    x: Tensor,
    cond: Any = None,
    noise: Noise | None = None,
    eta: float = 0.0,
    denoise_last: bool = True,
    clip_sample: float | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Runs the sampler from x = x_N [B, ...] ~ N(0, I) down the grid, in x's dtype. Returns x_0 like x.

    Args:
        model: eps(x, t[B], cond); ``guided`` adds classifier-free guidance.
        times: ascending, as ``schedule.grid`` gives them: t_0 (the end, 0 or a small t_min) .. t_N.
        noise: noise(k, like) for k = N..1, as the proximal samplers'; not called where s is 0.
        eta: 0 is deterministic DDIM, 1 is ancestral; ``ddim`` only.
        denoise_last: leave out Euler-Maruyama's noise of the last step (Song et al.'s practice). It
            would only be left standing in the image: a std of 0.33 with 10 uniform steps.
        clip_sample: if given, clean predictions are clamped to +-clip_sample and eps follows. Few-step sampling
            from t = 1 divides by sqrt(alpha_bar(1)) = 0.0066 and wants it.
        callback: called with (k, x_{k-1}) after each step.

    Raises:
        ValueError: unknown sampler; eta outside [0, 1] or given to another sampler; times not ascending from >= 0.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0 or (eta and sampler != "ddim"):
        raise ValueError(f"eta={eta} with sampler {sampler!r}: eta lies in [0, 1] and belongs to ddim")
    if len(times) < 2 or times[0] < 0.0 or any(a >= b for a, b in zip(times, times[1:])):
        raise ValueError("times must ascend from t_0 >= 0 to t_N, at least one step: see VPSchedule.grid")
    noise = noise or generator_noise()
    for k in range(len(times) - 1, 0, -1):
        t = times[k]
        a, b, s = coefficients(schedule, sampler, t, times[k - 1], eta)
        now = torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        eps = model(x, now, cond).to(x.dtype)
        if clip_sample is not None:
            eps = _clip(schedule, t, x, eps, clip_sample)
        drop = k == 1 and denoise_last and sampler == "euler_maruyama"
        x = a * x + b * eps
        if s and not drop:
            x = x + s * noise(k, x)
        if callback is not None:
            callback(k, x)
    return x


def _clip(schedule: VPSchedule, t: float, x: Tensor, eps: Tensor, bound: float) -> Tensor:
    """The eps whose clean prediction is that of ``eps`` clamped to +-bound."""
    alpha, sigma = math.sqrt(schedule.alpha_bar(t)), math.sqrt(-math.expm1(-schedule.integral(0.0, t)))
    clean = ((x - sigma * eps) / alpha).clamp(-bound, bound)
    return (x - alpha * clean) / sigma
