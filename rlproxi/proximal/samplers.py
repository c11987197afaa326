"""The samplers as one affine recursion around the prox.

Each step k = N..1 is

    z_k = a_k x_k + s_k n,   P = prox(z_k; t, lam_k),   x_{k-1} = b_k P + d_k x_k + e_k n.

n is standard normal, and gamma_k is the integral of beta over the step. At the old time t_k, alpha^2 = alpha_bar and
sigma^2 = 1 - alpha_bar. A prime marks the new time t_{k-1}, and eta in [0, 1] is the share of fresh noise.

The three proximal samplers have b = 1, d = e = 0 and t = t_{k-1} (ProxDM, Alg. 1 and 2). ``ode`` is the noise-free
limit:

========== ================ =================== =================
name       a                s                   lam
========== ================ =================== =================
hybrid     1 + gamma/2      sqrt(gamma)         gamma
backward   1/(1 - gamma/2)  sqrt(gamma) a       gamma a
ode        1 + gamma/2      0                   gamma/2
========== ================ =================== =================

``ddim`` is the denoising sampler of score and flow models (Song, Meng, Ermon 2021; R0's generator, arXiv 2503.13070).
x_k / alpha is x_0 with noise of variance sigma^2/alpha^2. So the prox at t = 0 with that lam is the clean prediction
x^. The noise estimate is n^ = (x_k - alpha x^)/sigma, and x_{k-1} = alpha' x^ + sigma' (sqrt(1 - eta^2) n^ + eta n).
This gives a = 1/alpha, s = 0, t = 0, lam = sigma^2/alpha^2, b = alpha' - d alpha, d = sigma' sqrt(1 - eta^2) / sigma,
e = sigma' eta. With the warm start of a published network it is that network's own DDIM.

``euler`` calls the prox at the same point and takes an Euler step of the reverse process with a share eta of its noise:
x_{k-1} = (1 + gamma/2) x_k - gamma (1 + eta^2)/2 n^/sigma + eta sqrt(gamma) n. At eta = 1 this is Euler-Maruyama on the
reverse SDE, at 0 the Euler step of the probability flow (Song et al. 2021). So b = gamma (1 + eta^2)/2 alpha/sigma^2,
d = 1 + gamma/2 - b/alpha, e = eta sqrt(gamma). The last step has e = 0, for its noise would stay in the image.

``matched`` takes the DDIM step, but calls the network at the (t, lam) pairs it was trained on. With a = e^{gamma/2},
a x_k is exactly x_{k-1} with noise of variance lam = e^gamma - 1, for any size of step. So the network is called at the
new time t with that lam. Its answer P = E[x_{k-1} | x_k] contains the clean prediction: alpha' x^ = P + v (P - z)/lam
with v = 1 - alpha_bar(t), and the DDIM step follows. With c = sqrt(v (1 - eta^2) (v + lam))/lam, the step has
b = 1 + v/lam - c, d = a (c - v/lam), e = eta sqrt(v).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .operator import Prox
from .schedule import VPSchedule

PROXIMAL = ("hybrid", "backward", "ode")
#: Those whose noise comes after the prox.
AFTER = ("ddim", "euler", "matched")
SAMPLERS = (*PROXIMAL, *AFTER)

#: noise(k, like) -> standard normal tensor like ``like``, for step k = N..1 (and N+1: the start).
Noise = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One step k: x_{k-1} = b prox(z; t, lam) + d x_k + e n with z = a x_k + s n.

    ``t`` is the *new* time t_{k-1}, or 0 for ddim and euler.
    """

    k: int
    t: float
    gamma: float
    a: float
    s: float
    lam: float
    b: float = 1.0
    d: float = 0.0
    e: float = 0.0

    def before(self, x: Tensor, noise: Noise) -> Tensor:
        """Return z, the prox's input, from x_k [B, ...]."""
        return self.a * x + self.s * noise(self.k, x) if self.s else self.a * x

    def after(self, prox: Tensor, x: Tensor, noise: Noise) -> Tensor:
        """Return x_{k-1} from the prox's output and x_k, both [B, ...]. No step draws noise both before and after."""
        if self.b != 1.0 or self.d:
            prox = self.b * prox + self.d * x
        return prox + self.e * noise(self.k, x) if self.e else prox


def coefficients(gamma: float, sampler: str) -> tuple[float, float, float]:
    """Return (a, s, lam) of a proximal sampler's step. Raises ValueError where ``backward`` has gamma >= 2."""
    if sampler == "hybrid":
        return 1.0 + gamma / 2, math.sqrt(gamma), gamma
    if sampler == "ode":
        return 1.0 + gamma / 2, 0.0, gamma / 2
    if sampler == "backward":
        if gamma >= 2.0:
            raise ValueError(f"the backward sampler needs every gamma < 2, got {gamma:.3f}")
        a = 1.0 / (1.0 - gamma / 2)
        return a, math.sqrt(gamma) * a, gamma * a
    raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(PROXIMAL)}")


def _step_with_noise_after(schedule: VPSchedule, sampler: str, k: int, t: float, old: float, eta: float) -> Step:
    """The step from time ``old`` down to ``t``."""
    signal, noise = (
        (lambda at: math.exp(-schedule.integral(0.0, at) / 2)),
        (lambda at: math.sqrt(-math.expm1(-schedule.integral(0.0, at)))),
    )
    gamma, lam = schedule.integral(t, old), (noise(old) / signal(old)) ** 2
    if sampler == "matched":
        a, lam, v = math.exp(gamma / 2), math.expm1(gamma), noise(t) ** 2
        c = math.sqrt(v * (1 - eta**2) * (v + lam)) / lam
        return Step(k, t, gamma, a, 0.0, lam, 1 + v / lam - c, a * (c - v / lam), eta * math.sqrt(v))
    if sampler == "ddim":
        d = noise(t) * math.sqrt(1 - eta**2) / noise(old)
        b, e = signal(t) - d * signal(old), noise(t) * eta
    else:
        b = gamma * (1 + eta**2) / 2 * signal(old) / noise(old) ** 2
        d, e = 1 + gamma / 2 - b / signal(old), eta * math.sqrt(gamma) if t else 0.0
    return Step(k, 0.0, gamma, 1 / signal(old), 0.0, lam, b, d, e)


def smallest_backward_steps(schedule: VPSchedule, start_time: float, spacing: str) -> int:
    """Return the smallest N for which every gamma_k < 2 on this grid."""
    n = 1
    while True:
        times = schedule.grid(n, start_time, spacing)
        if max(schedule.integral(a, b) for a, b in pairwise(times)) < 2.0:
            return n
        n += 1


def plan(
    schedule: VPSchedule,
    sampler: str,
    num_inference_steps: int,
    start_time: float = 1.0,
    spacing: str = "uniform",
    eta: float | Sequence[float] = 0.0,
) -> list[Step]:
    """Return the steps k = N..1 in the order they are taken.

    Args:
        eta: of ddim, euler and matched, from 0 (deterministic) to 1 (all noise is fresh; not the DDIM paper's eta). One
            number, or one for each step in that order.

    Raises ValueError for an unknown sampler or spacing, and for a ``backward`` N whose largest gamma is 2 or more. The
    message names the smallest N that works.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    times = schedule.grid(num_inference_steps, start_time, spacing)
    if sampler in AFTER:
        etas = [eta] * num_inference_steps if isinstance(eta, (int, float)) else list(eta)
        return [
            _step_with_noise_after(schedule, sampler, k, times[k - 1], times[k], etas[num_inference_steps - k])
            for k in range(num_inference_steps, 0, -1)
        ]
    gammas = [schedule.integral(a, b) for a, b in pairwise(times)]
    if sampler == "backward" and max(gammas) >= 2.0:
        smallest = smallest_backward_steps(schedule, start_time, spacing)
        raise ValueError(
            f"sampler 'backward' cannot take num_inference_steps={num_inference_steps}: its largest "
            f"gamma is {max(gammas):.2f} and must be below 2. The smallest number of steps that works "
            f"with start_time={start_time} on the {spacing} grid is {smallest}"
        )
    return [
        Step(k, times[k - 1], gammas[k - 1], *coefficients(gammas[k - 1], sampler))
        for k in range(num_inference_steps, 0, -1)
    ]


def generator_noise(generator: torch.Generator | None = None) -> Noise:
    """Return a ``Noise`` that draws from one torch generator, on the generator's device; None: torch's own."""

    def draw(k: int, like: Tensor) -> Tensor:
        device = generator.device if generator is not None else like.device
        noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
        return noise.to(like.device)

    return draw


@dataclass
class Trajectory:
    """The result of a sampler call.

    Attributes:
        x: [B, ...], the sample x_0.
        z, prox: with ``keep_chain`` the prox's input and output at each of ``steps``, like x; else empty.
    """

    x: Tensor
    steps: list[Step]
    z: list[Tensor]
    prox: list[Tensor]


def sample(
    prox: Prox,
    steps: list[Step],
    x: Tensor,
    cond: Any = None,
    noise: Noise | None = None,
    keep_chain: bool = False,
    callback: Callable[[Step, Tensor], None] | None = None,
) -> Trajectory:
    """Run the sampler from x = x_N [B, ...] ~ N(0, I), in x's dtype. Differentiable if the prox is.

    Noise is fresh at every step. The last step of a proximal sampler draws it too, before the prox.
    """
    noise = noise or generator_noise()
    zs: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in steps:
        z = step.before(x, noise)
        clean = prox(z, step.t, step.lam, cond)
        if keep_chain:
            zs.append(z)
            outputs.append(clean)
        x = step.after(clean, x, noise)
        if callback is not None:
            callback(step, x)
    return Trajectory(x, steps, zs, outputs)
