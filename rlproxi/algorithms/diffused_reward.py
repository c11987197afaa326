"""The diffused reward: how a reward on clean images pulls at a noisy one (DIDR, arXiv 2605.24001).

With q*(x_0) proportional to p_ref(x_0) exp(r(x_0) / beta), diffused to a level y = alpha x_0 + sigma n,

    s_r(y) = grad ln E_ref[exp(r(x_0) / beta) | y] = (alpha / sigma^2) (E_q*[x_0 | y] - E_ref[x_0 | y]).

The first form is estimated here from K particles of p_ref(x_0 | y), made by a few differentiable denoising steps of the
frozen reference; the second says what the estimate is for: kappa s_r, kappa = sigma^2 / alpha, moves the reference's
clean prediction to the target's.

What the estimate costs in accuracy (derived; tests/algorithms/test_diffused_reward.py):

- One particle, one step (Tweedie): kappa grad_y r(E[x_0 | y]) / beta = Cov[x_0 | y] grad r(E[x_0 | y]) / beta. It is
  exact for a linear reward on a Gaussian reference, and bounded at any noise. For r = -q/2 (x - mu)^2 and posterior
  variance v it is (1 + q v / beta) times the truth.
- More steps without noise (eta = 0) approach the probability-flow map and make the estimate larger yet.
- Steps with the posterior's own noise (eta = None) are the only ones that approach the truth, as steps *and* particles
  grow. Where p_ref(x_0 | y) has several modes, a few particles are mostly variance.
- ``damped`` is ours: exact, with one step and one particle, for any concave quadratic reward on a Gaussian in 1-D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..proximal.clean import Clean, Ladder, Level
from ..proximal.operator import expand
from ..proximal.samplers import Noise

#: reward(x_0 [B, ...]) -> [B], differentiable; each sample's reward must depend on that sample alone.
Reward = Callable[[Tensor], Tensor]
#: denoise(y [B, ...], k) -> particle k of x_0, like y, differentiable.
Denoise = Callable[[Tensor, int], Tensor]


def proxy(y: Tensor, denoise: Denoise, reward: Reward, beta: float, particles: int = 1) -> Tensor:
    """The diffused reward proxy: grad_y ln (1/K) sum_k exp(r(denoise(y, k)) / beta), per sample, detached.

    K = 1 is grad_y r(denoise(y)) / beta. Particles are taken one after another: the memory of one, and K gradients.

    Args:
        y: [B, ...]; its own graph is left alone.
        beta: temperature of the tilt.
        particles: K.

    Raises:
        ValueError: a reward or a denoiser without gradient.
    """
    looks = [_look(y, denoise, reward, k) for k in range(particles)]
    values = torch.stack([one.value for one in looks])
    share = torch.softmax(values.double() / beta, 0).to(y.dtype)  # the gradient of logsumexp
    weighted = (expand(s, y) * one.at_y for s, one in zip(share, looks, strict=True))
    return sum(weighted, torch.zeros_like(y)) / beta


class _Look(NamedTuple):
    """A particle and its reward: x_0, r(x_0) [B], grad r(x_0), grad_y r(x_0(y)). All detached."""

    x0: Tensor
    value: Tensor
    at_x0: Tensor
    at_y: Tensor


def _look(y: Tensor, denoise: Denoise, reward: Reward, k: int = 0) -> _Look:
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        x0 = denoise(leaf, k)
        value = reward(x0)
    if not (x0.requires_grad and value.requires_grad):
        what = "the reward" if x0.requires_grad else "the denoised sample"
        raise ValueError(f"{what} has no gradient: a diffused reward needs a differentiable reward and denoiser")
    (at_x0,) = torch.autograd.grad(value.sum(), x0)
    (at_y,) = torch.autograd.grad(x0, leaf, at_x0)
    return _Look(x0.detach(), value.detach(), at_x0, at_y)


def damped(y: Tensor, denoise: Denoise, reward: Reward, beta: float, weight: Tensor) -> Tensor:
    """kappa s_r from one particle and one more look at the reward, instead of K particles; like y, detached.

    The plug-in's pull p = kappa grad_y r / beta at x = denoise(y) is a gradient step, in the metric of the covariance,
    for the problem that the mean of q* solves where p_ref is Gaussian and r concave and quadratic:

        max over d of  r(x + d) / beta - 1/2 <d, Cov[x_0 | y]^-1 d>.

    Along d = tau p, with g = <grad r(x), p> / beta, the second term is -tau^2 g / 2; the parabola through r(x), its
    slope and r(x + p) gives the first, and so the best tau = g / (3 g - 2 (r(x + p) - r(x)) / beta). It is kept
    in [0, 1]: where the reward curves upwards the plug-in is left as it is.

    Arguments and errors as in ``proxy``; ``weight`` is kappa [B], or a clamped one.
    """
    look = _look(y, denoise, reward)
    pull = expand(weight / beta, y) * look.at_y
    slope = (look.at_x0 * pull).flatten(1).sum(1) / beta
    with torch.no_grad():
        gain = (reward(look.x0 + pull) - look.value) / beta
    # A slope of 0 has no pull to shorten; the divisor only has to be positive there.
    tau = slope / torch.maximum(3 * slope - 2 * gain, slope).clamp_min(torch.finfo(slope.dtype).tiny)
    return expand(tau.clamp(0, 1), y) * pull


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
        level: of y [B, ...].
        noise: noise(k, like) for step k = 1..m-1; needed where eta is not 0.
        eta: None is the posterior's own, eta^2 = 1 - (sigma' alpha / (sigma alpha'))^2, for which y' has the mean of
            p_ref(y' | y) (ancestral sampling); 0 is deterministic (DDIM), 1 forgets n_hat.
    """
    x0 = clean(y, level, cond)
    start = level
    for k in range(1, m):
        lower = ladder.below(start, k / m)
        estimate = level.noise(y, x0)
        if eta != 0.0:
            assert noise is not None, "steps draw noise unless eta is 0"
            if eta is None:
                keep = (lower.log_noise - level.log_noise).exp().clamp(max=1.0)
            else:
                keep = torch.full_like(level.sigma, (1.0 - eta**2) ** 0.5)
            estimate = expand(keep, y) * estimate + expand((1.0 - keep.square()).sqrt(), y) * noise(k, y)
        y, level = lower.diffuse(x0, estimate), lower
        x0 = clean(y, level, cond)
    return x0
