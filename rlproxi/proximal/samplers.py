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
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from .operator import Prox
from .schedule import VPSchedule

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


@dataclass(frozen=True)
class SamplerKind:
    """One sampler: everything that the rest of the project asks about it.

    Attributes:
        step: (schedule, k, new time t_{k-1}, old time t_k, eta) -> the step between them.
        without_noise: a step -> the same step with its noise taken away, from its own coefficients.
        noise_after: whether its noise is drawn after the prox, scaled by eta; else before the prox, whatever eta is.
        limit: the sampler that it becomes without its noise, at eta 0; None: none of this module.
        full_noise_name: the name under which ``rlproxi eval`` draws from it with eta 1; None: it does not.
        gamma_below: every gamma_k of a grid must be below this.
    """

    name: str
    step: Callable[[VPSchedule, int, float, float, float], Step]
    without_noise: Callable[[Step], Step]
    noise_after: bool = False
    limit: str | None = None
    full_noise_name: str | None = None
    gamma_below: float = math.inf


def _hybrid(schedule: VPSchedule, k: int, t: float, old: float, eta: float) -> Step:
    gamma = schedule.integral(t, old)
    return Step(k, t, gamma, 1.0 + gamma / 2, math.sqrt(gamma), gamma)


def _ode(schedule: VPSchedule, k: int, t: float, old: float, eta: float) -> Step:
    gamma = schedule.integral(t, old)
    return Step(k, t, gamma, 1.0 + gamma / 2, 0.0, gamma / 2)


def _backward(schedule: VPSchedule, k: int, t: float, old: float, eta: float) -> Step:
    gamma = schedule.integral(t, old)
    a = 1.0 / (1.0 - gamma / 2)
    return Step(k, t, gamma, a, math.sqrt(gamma) * a, gamma * a)


def _signal(schedule: VPSchedule, t: float) -> float:
    """alpha, the factor of x_0 in x_t."""
    return math.exp(-schedule.integral(0.0, t) / 2)


def _noise(schedule: VPSchedule, t: float) -> float:
    """sigma, the standard deviation of the noise in x_t."""
    return math.sqrt(-math.expm1(-schedule.integral(0.0, t)))


def _matched(schedule: VPSchedule, k: int, t: float, old: float, eta: float) -> Step:
    gamma = schedule.integral(t, old)
    a, lam, v = math.exp(gamma / 2), math.expm1(gamma), _noise(schedule, t) ** 2
    c = math.sqrt(v * (1 - eta**2) * (v + lam)) / lam
    return Step(k, t, gamma, a, 0.0, lam, 1 + v / lam - c, a * (c - v / lam), eta * math.sqrt(v))


def _ddim(schedule: VPSchedule, k: int, t: float, old: float, eta: float) -> Step:
    signal, noise = _signal(schedule, old), _noise(schedule, old)
    d = _noise(schedule, t) * math.sqrt(1 - eta**2) / noise
    b, e = _signal(schedule, t) - d * signal, _noise(schedule, t) * eta
    return Step(k, 0.0, schedule.integral(t, old), 1 / signal, 0.0, (noise / signal) ** 2, b, d, e)


def _euler(schedule: VPSchedule, k: int, t: float, old: float, eta: float) -> Step:
    gamma, signal, noise = schedule.integral(t, old), _signal(schedule, old), _noise(schedule, old)
    b = gamma * (1 + eta**2) / 2 * signal / noise**2
    d, e = 1 + gamma / 2 - b / signal, eta * math.sqrt(gamma) if t else 0.0
    return Step(k, 0.0, gamma, 1 / signal, 0.0, (noise / signal) ** 2, b, d, e)


def _noiseless_proximal(step: Step) -> Step:
    """z = a x + zeta s n has lam (1 + zeta^2)/2 at a share zeta of the noise: half of lam is left."""
    return replace(step, s=0.0, lam=step.lam / 2 if step.s else step.lam)


def _noiseless_ddim(step: Step) -> Step:
    """The fresh noise is taken from the predicted noise: d' = sqrt(d^2 + (e/sigma)^2), with sigma = sqrt(lam)/a."""
    d = math.hypot(step.d, step.e * step.a / math.sqrt(step.lam))
    return replace(step, b=step.b + (step.d - d) / step.a, d=d, e=0.0)


def _noiseless_euler(step: Step) -> Step:
    """Half of the drift of a full share of noise is left: b' = gamma/2 alpha/sigma^2 = gamma a/(2 lam)."""
    b = step.gamma * step.a / (2 * step.lam)
    return replace(step, b=b, d=1 + step.gamma / 2 - b * step.a, e=0.0)


def _noiseless_matched(step: Step) -> Step:
    """Two of b, d, e and lam give v = sigma'^2, from which the step without noise follows."""
    v = (step.lam * (1 - step.b) ** 2 + step.e**2) / (2 * step.b - 1 - step.e**2 / step.lam)
    c = math.sqrt(v * (v + step.lam)) / step.lam
    return replace(step, b=1 + v / step.lam - c, d=step.a * (c - v / step.lam), e=0.0)


#: Name -> sampler. A new one is a function and a line here.
KINDS = {
    kind.name: kind
    for kind in (
        SamplerKind("hybrid", _hybrid, _noiseless_proximal, limit="ode"),
        SamplerKind("backward", _backward, _noiseless_proximal, gamma_below=2.0),
        SamplerKind("ode", _ode, _noiseless_proximal, limit="ode"),
        SamplerKind("ddim", _ddim, _noiseless_ddim, noise_after=True, limit="ddim", full_noise_name="ddim-ancestral"),
        SamplerKind(
            "euler", _euler, _noiseless_euler, noise_after=True, limit="euler", full_noise_name="euler-maruyama"
        ),
        SamplerKind("matched", _matched, _noiseless_matched, noise_after=True, limit="matched"),
    )
}
SAMPLERS = tuple(KINDS)
#: Those whose noise comes after the prox.
AFTER = tuple(name for name, kind in KINDS.items() if kind.noise_after)


def smallest_steps(schedule: VPSchedule, gamma_below: float, start_time: float, spacing: str) -> int:
    """The smallest N for which every gamma_k of this grid is below ``gamma_below``."""
    grids = (schedule.grid(n, start_time, spacing) for n in count(1))
    return next(len(times) - 1 for times in grids if _largest_gamma(schedule, times) < gamma_below)


def _largest_gamma(schedule: VPSchedule, times: list[float]) -> float:
    return max(schedule.integral(a, b) for a, b in pairwise(times))


def plan(
    schedule: VPSchedule,
    sampler: str,
    num_inference_steps: int,
    start_time: float = 1.0,
    spacing: str = "uniform",
    eta: float | Sequence[float] = 0.0,
) -> list[Step]:
    """Return the steps k = N..1 in the order they are taken.

    eta: of samplers with ``noise_after``, 0 (deterministic) to 1 (all noise is fresh; not the DDIM paper's eta); one
    number, or one for each step in that order.

    Raises ValueError for an unknown sampler or spacing, and for an N whose largest gamma the sampler cannot take,
    naming the smallest N that works.
    """
    if sampler not in KINDS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(KINDS)}")
    kind, n = KINDS[sampler], num_inference_steps
    times = schedule.grid(n, start_time, spacing)
    largest = _largest_gamma(schedule, times)
    if largest >= kind.gamma_below:
        smallest = smallest_steps(schedule, kind.gamma_below, start_time, spacing)
        raise ValueError(
            f"sampler {sampler!r} cannot take num_inference_steps={n}: its largest gamma is {largest:.2f} and must be "
            f"below {kind.gamma_below:g}. The smallest number of steps that works with start_time={start_time} on the "
            f"{spacing} grid is {smallest}"
        )
    etas = [eta] * n if isinstance(eta, (int, float)) else list(eta)
    return [kind.step(schedule, k, times[k - 1], times[k], etas[n - k]) for k in range(n, 0, -1)]


@dataclass
class Trajectory:
    """The sample x_0 [B, ...]; with ``keep_chain`` also the prox's input and output at each step, like x."""

    x: Tensor
    z: list[Tensor] = field(default_factory=list)
    prox: list[Tensor] = field(default_factory=list)


def sample(
    prox: Prox,
    steps: list[Step],
    x: Tensor,
    cond: Any = None,
    noise: Noise | None = None,
    keep_chain: bool = False,
) -> Trajectory:
    """Run the sampler from x = x_N [B, ...] ~ N(0, I), in x's dtype. Differentiable if the prox is.

    Noise is fresh at every step; None draws it from torch's own generator. The last step of a proximal sampler draws it
    too, before the prox.
    """
    noise = noise or (lambda k, like: torch.randn_like(like))
    done = Trajectory(x)
    for step in steps:
        z = step.before(done.x, noise)
        clean = prox(z, step.t, step.lam, cond)
        if keep_chain:
            done.z.append(z)
            done.prox.append(clean)
        done.x = step.after(clean, done.x, noise)
    return done
