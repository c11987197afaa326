"""The three proximal samplers as one affine recursion around the prox.

Each step k = N..1 forms z_k = a_k x_k + s_k n and sets x_{k-1} = prox(z_k; t_{k-1}, lam_k).
Only (a, s, lam) differ (ProxDM, Alg. 1 and 2; ``ode`` is the noise-free limit):

========== ================ =================== =================
name       a                s                   lam
========== ================ =================== =================
hybrid     1 + gamma/2      sqrt(gamma)         gamma
backward   1/(1 - gamma/2)  sqrt(gamma) a       gamma a
ode        1 + gamma/2      0                   gamma/2
========== ================ =================== =================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from .operator import Prox
from .schedule import VPSchedule

SAMPLERS = ("hybrid", "backward", "ode")

#: noise(k, like) -> standard normal tensor like ``like``, for step k = N..1 (and N+1: the start).
Noise = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One step k: x_{k-1} = prox(a x_k + s n; t, lam). ``t`` is the *new* time t_{k-1}."""

    k: int
    t: float
    gamma: float
    a: float
    s: float
    lam: float


def coefficients(gamma: float, sampler: str) -> tuple[float, float, float]:
    """(a, s, lam) of the table above. Raises ValueError where ``backward`` has gamma >= 2."""
    if sampler == "hybrid":
        return 1.0 + gamma / 2, math.sqrt(gamma), gamma
    if sampler == "ode":
        return 1.0 + gamma / 2, 0.0, gamma / 2
    if sampler == "backward":
        if gamma >= 2.0:
            raise ValueError(f"the backward sampler needs every gamma < 2, got {gamma:.3f}")
        a = 1.0 / (1.0 - gamma / 2)
        return a, math.sqrt(gamma) * a, gamma * a
    raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")


def smallest_backward_steps(schedule: VPSchedule, start_time: float, spacing: str) -> int:
    """The smallest N for which every gamma_k < 2 on this grid."""
    n = 1
    while True:
        times = schedule.grid(n, start_time, spacing)
        if max(schedule.integral(a, b) for a, b in zip(times, times[1:])) < 2.0:
            return n
        n += 1


def plan(schedule: VPSchedule, sampler: str, num_inference_steps: int, start_time: float = 1.0,
         spacing: str = "uniform") -> list[Step]:
    """The steps k = N..1 in the order they are taken.

    Raises ValueError for an unknown sampler or spacing, and for a ``backward`` N whose
    largest gamma is 2 or more, naming the smallest N that works.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    times = schedule.grid(num_inference_steps, start_time, spacing)
    gammas = [schedule.integral(a, b) for a, b in zip(times, times[1:])]
    if sampler == "backward" and max(gammas) >= 2.0:
        smallest = smallest_backward_steps(schedule, start_time, spacing)
        raise ValueError(
            f"sampler 'backward' cannot take num_inference_steps={num_inference_steps}: its largest "
            f"gamma is {max(gammas):.2f} and must be below 2. The smallest number of steps that works "
            f"with start_time={start_time} on the {spacing} grid is {smallest}")
    return [Step(k, times[k - 1], gammas[k - 1], *coefficients(gammas[k - 1], sampler))
            for k in range(num_inference_steps, 0, -1)]


def generator_noise(generator: torch.Generator | None = None) -> Noise:
    """Fresh noise from one torch generator (drawn on the generator's device, then moved)."""
    def draw(k: int, like: Tensor) -> Tensor:
        device = generator.device if generator is not None else like.device
        noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
        return noise.to(like.device)
    return draw


@dataclass
class Trajectory:
    """What a sampler call leaves behind.

    x: [B, ...] the sample x_0. If a chain was asked for, ``z[i]`` is the prox's input and
    ``prox[i]`` its output at ``steps[i]`` (in the order taken, k = N..1), both like x.
    """

    x: Tensor
    steps: list[Step]
    z: list[Tensor]
    prox: list[Tensor]


def sample(prox: Prox, steps: list[Step], x: Tensor, cond: Any = None, noise: Noise | None = None,
           keep_chain: bool = False, callback: Callable[[Step, Tensor], None] | None = None) -> Trajectory:
    """Runs the sampler from x = x_N [B, ...] ~ N(0, I), in x's dtype.

    Noise is fresh at every step, the last included: the prox comes after it. Differentiable
    if the prox is. Returns a Trajectory.
    """
    noise = noise or generator_noise()
    zs: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in steps:
        z = step.a * x
        if step.s:
            z = z + step.s * noise(step.k, x)
        x = prox(z, step.t, step.lam, cond)
        if keep_chain:
            zs.append(z)
            outputs.append(x)
        if callback is not None:
            callback(step, x)
    return Trajectory(x, steps, zs, outputs)
