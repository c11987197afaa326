"""The diffused reward: how a reward on clean images pulls at a noisy one (DIDR, arXiv 2605.24001).

With q*(x_0) proportional to p_ref(x_0) exp(r(x_0) / beta), diffused to a level y = alpha x_0 + sigma n,

    s_r(y) = grad ln E_ref[exp(r(x_0) / beta) | y] = (alpha / sigma^2) (E_q*[x_0 | y] - E_ref[x_0 | y]).

The first form is estimated here from K particles of p_ref(x_0 | y), made by a few differentiable denoising steps of the
frozen reference; the second says what the estimate is for: kappa s_r, kappa = sigma^2 / alpha, moves the reference's
clean prediction to the target's.

What the estimate costs in accuracy (derived; tests/algorithms/test_diffused_reward.py):

- One particle, one step (Tweedie): kappa grad_y r(E[x_0 | y]) / beta = Cov[x_0 | y] grad r(E[x_0 | y]) / beta. It is
  exact for a linear reward on a Gaussian reference, and bounded at any noise. For r = -q/2 (x - mu)^2 and posterior
  variance v it is (1 + q v / beta) times the truth, so the error grows with the noise and with 1 / beta.
- More steps without noise (eta = 0) approach the probability-flow map, whose slope exceeds that of E[x_0 | y], the more
  so the higher the noise: they make the estimate larger yet, even for a linear reward.
- Steps with the posterior's own noise (eta = None) keep the slope of E[x_0 | y] on a Gaussian and spread the
  particles towards p_ref(x_0 | y): of all m > 1 only these approach the truth, as steps *and* particles grow. Where
  p_ref(x_0 | y) has several modes a particle's slope is steep between them, and a few particles are mostly variance.
- ``damped`` looks once more at the reward, where the pull would lead, which tells its curvature: exact, with one step
  and one particle, for any concave quadratic reward on a Gaussian in 1-D. It is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..proximal.clean import Clean, Ladder, Level
from ..proximal.operator import expand
from ..proximal.samplers import Noise

#: reward(x_0 [B, ...]) -> [B], differentiable; each sample's reward must depend on that sample alone.
Reward = Callable[[Tensor], Tensor]


def proxy(
    y: Tensor, denoise: Callable[[Tensor, int], Tensor], reward: Reward, beta: float, particles: int = 1
) -> tuple[Tensor, Tensor]:
    """The diffused reward proxy: grad_y ln (1/K) sum_k exp(r(denoise(y, k)) / beta), per sample.

    K = 1 is grad_y r(denoise(y)) / beta. Particles are taken one after another: the memory of one, and K gradients.

    Args:
        y: [B, ...]; its own graph is left alone.
        denoise: (y, k) -> x_0 [B, ...], differentiable; particle k's noise is its own affair.
        reward: see ``Reward``.
        beta: temperature of the tilt.
        particles: K.

    Returns:
        The gradient, like y, and the particles' mean reward [B], both detached.

    Raises:
        ValueError: beta <= 0, K < 1, or a reward or a denoiser without gradient.
    """
    if beta <= 0 or particles < 1:
        raise ValueError(f"beta is {beta} and particles is {particles}; need beta > 0 and at least 1 particle")

    def look(k: int) -> _Look:
        return _look(y, lambda leaf: denoise(leaf, k), reward)

    looks = [look(k) for k in range(particles)]
    values = torch.stack([one.value for one in looks])
    share = torch.softmax(values.double() / beta, 0).to(y.dtype)  # the gradient of logsumexp
    weighted = sum(expand(s, y) * one.at_y for s, one in zip(share, looks, strict=True))
    gradient = cast(Tensor, weighted) / beta  # there is at least one particle
    return gradient, values.mean(0)


class _Look(NamedTuple):
    """A particle and its reward: x_0, r(x_0) [B], grad r(x_0), grad_y r(x_0(y)). All detached."""

    x0: Tensor
    value: Tensor
    at_x0: Tensor
    at_y: Tensor


def _look(y: Tensor, denoise: Callable[[Tensor], Tensor], reward: Reward) -> _Look:
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        x0 = denoise(leaf)
        value = reward(x0)
    if not (x0.requires_grad and value.requires_grad):
        raise ValueError(
            f"{'the reward' if x0.requires_grad else 'the denoised sample'} has no gradient: a diffused "
            "reward needs a differentiable reward, and a denoiser that does not run under no_grad"
        )
    (at_x0,) = torch.autograd.grad(value.sum(), x0)
    (at_y,) = torch.autograd.grad(x0, leaf, at_x0)
    return _Look(x0.detach(), value.detach(), at_x0, at_y)


def damped(
    y: Tensor, denoise: Callable[[Tensor], Tensor], reward: Reward, beta: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """kappa s_r from one particle and one more look at the reward, instead of K particles.

    The plug-in's pull p = kappa grad_y r / beta at x = denoise(y) is a gradient step, in the metric of the covariance,
    for the problem that the mean of q* solves where p_ref is Gaussian and r concave and quadratic:

        max over d of  r(x + d) / beta - 1/2 <d, Cov[x_0 | y]^-1 d>.

    Along d = tau p, with g = <grad r(x), p> / beta, the second term is -tau^2 g / 2; the parabola through r(x), its
    slope and r(x + p) gives the first, and so the best tau = g / (3 g - 2 (r(x + p) - r(x)) / beta). It is kept
    in [0, 1]: where the reward curves upwards the plug-in is left as it is.

    Args:
        y, reward, beta: as in ``proxy``.
        denoise: y -> x_0, one particle.
        weight: kappa [B], or a clamped one.

    Returns:
        tau p, like y, and the rewards r(x) [B], both detached: ``direction(fake, ref + pull)``, with no further weight.

    Raises:
        ValueError: as ``proxy``.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; need beta > 0")
    look = _look(y, denoise, reward)
    pull = expand(weight / beta, y) * look.at_y
    slope = (look.at_x0 * pull).flatten(1).sum(1) / beta
    with torch.no_grad():
        gain = (reward(look.x0 + pull) - look.value) / beta
    # A slope of 0 has no pull to shorten; the divisor only has to be positive there.
    tau = slope / torch.maximum(3 * slope - 2 * gain, slope).clamp_min(torch.finfo(slope.dtype).tiny)
    return expand(tau.clamp(0, 1), y) * pull, look.value


def denoise_steps(
    clean: Clean,
    y: Tensor,
    level: Level,
    ladder: Ladder,
    m: int,
    cond: Any = None,
    noise: Noise | None = None,
    eta: float | None = None,
) -> Tensor:
    """Phi_m: x_0 from y by m differentiable denoising steps down the ladder. m = 1 is the clean prediction (Tweedie).

    The levels between lie k/m of the way, in ln(sigma/alpha), from ``level`` to the ladder's lowest. Between two levels

        y' = alpha' x_0 + sigma' (sqrt(1 - eta^2) n_hat + eta n),    n_hat = (y - alpha x_0) / sigma.

    Args:
        clean: the frozen model; gradients go through it.
        y: [B, ...].
        level: y's level.
        m: clean predictions taken.
        noise: noise(k, like) for step k = 1..m-1; needed where eta is not 0.
        eta: None is the posterior's own, eta^2 = 1 - (sigma' alpha / (sigma alpha'))^2, for which y' has the mean of
            p_ref(y' | y) (ancestral sampling); 0 is deterministic (DDIM), 1 forgets n_hat.

    Raises:
        ValueError: m < 1, eta outside [0, 1], or noise missing.
    """
    if m < 1 or (eta is not None and not 0.0 <= eta <= 1.0):
        raise ValueError(f"m is {m} and eta is {eta}; need at least 1 step, and eta in [0, 1] or None")
    if m > 1 and eta != 0.0 and noise is None:
        raise ValueError(f"eta is {eta}, which draws noise between the {m} steps: pass noise(k, like), or eta=0")
    x0 = clean(y, level, cond)
    start = level
    for k in range(1, m):
        lower = ladder.below(start, k / m)
        estimate = level.noise(y, x0)
        if eta != 0.0 and noise is not None:
            keep, fresh = _shares(level, lower, eta)
            estimate = expand(keep, y) * estimate + expand(fresh, y) * noise(k, y)
        y, level = lower.diffuse(x0, estimate), lower
        x0 = clean(y, level, cond)
    return x0


def _shares(level: Level, lower: Level, eta: float | None) -> tuple[Tensor, Tensor]:
    """(sqrt(1 - eta^2), eta), each [B]."""
    if eta is None:
        keep = (lower.log_noise - level.log_noise).exp().clamp(max=1.0)
    else:
        keep = torch.full_like(level.sigma, (1.0 - eta**2) ** 0.5)
    return keep, (1.0 - keep.square()).sqrt()


def weight(level: Level, kappa_max: float) -> Tensor:
    """The weight of a diffused reward score in x_0: kappa = sigma^2 / alpha, at most ``kappa_max``. [B].

    The clamp fades the reward out where kappa exceeds it, for there the gradient of E[x_0 | y] goes on shrinking as
    1 / kappa. It is a choice of noise levels that the reward may speak at, not a bound against divergence: see the
    module's first point.
    """
    return level.kappa.clamp(max=kappa_max)
