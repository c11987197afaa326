"""The diffused reward against p_ref = N(m, S) and r(x) = -1/2 (x - mu)^T Q (x - mu), where all is known."""

import math

import numpy as np
import pytest
import torch

from rlproxi.algorithms.diffused_reward import damped, denoise_steps, proxy
from rlproxi.proximal.clean import Ladder, Level
from rlproxi.proximal.matching import TimeTable
from rlproxi.proximal.operator import expand
from rlproxi.proximal.schedule import VPSchedule

SCHEDULE = VPSchedule()
TIMES = torch.tensor([0.05, 0.2, 0.4, 0.7, 0.95], dtype=torch.float64)
LEVEL = Level.of(SCHEDULE, TIMES, torch.tensor([0.01, 0.3, 0.0, 2.0, 0.5], dtype=torch.float64))
BATCH = len(TIMES)


def random_spd(dims, seed):
    a = torch.randn(dims, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / dims + 0.2 * torch.eye(dims, dtype=torch.float64)


class Problem:
    """One reference, one reward, everything else by linear algebra; batched over levels."""

    def __init__(self, dims, beta, seed=0):
        self.beta, self.dims = beta, dims
        self.s, self.q = random_spd(dims, seed), random_spd(dims, seed + 1)
        self.m, self.mu = torch.randn(2, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 2))

    def posterior(self, y, level, mean=None, cov=None):
        """(mean [B, D], covariance [B, D, D]) of x_0 given y, for p_0 = N(mean, cov); the reference by default."""
        mean, cov = (self.m, self.s) if mean is None else (mean, cov)
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        total = alpha**2 * cov + sigma**2 * torch.eye(self.dims, dtype=cov.dtype)
        gain = alpha * cov @ torch.linalg.inv(total)
        centred = y - level.alpha[:, None] * mean
        return mean + (gain @ centred[..., None])[..., 0], cov - alpha * gain @ cov

    def tilted(self):
        """q*: exp(r / beta) adds Q / beta to the precision."""
        precision = torch.linalg.inv(self.s) + self.q / self.beta
        cov = torch.linalg.inv(precision)
        return cov @ (torch.linalg.solve(self.s, self.m) + self.q @ self.mu / self.beta), cov

    def reward(self, x):
        centred = x - self.mu
        return -0.5 * ((centred @ self.q) * centred).sum(-1)

    def exact_score(self, y, level):
        """grad_y ln of the Gaussian integral int N(x; M(y), C) exp(r(x) / beta) dx, differentiated by hand.

        The integral is const exp(-1/2 (M - mu)^T (Q^-1 beta + C)^-1 (M - mu)), and M is affine in y.
        """
        mean, cov = self.posterior(y, level)
        slope = level.alpha[:, None, None] / level.sigma[:, None, None] ** 2 * cov  # dM/dy
        inner = torch.linalg.inv(self.beta * torch.linalg.inv(self.q) + cov)
        return -(slope @ inner @ (mean - self.mu)[..., None])[..., 0]

    def clean(self, y, level, cond=None):
        return self.posterior(y, level)[0]


def samples(dims, seed=5):
    return 1.5 * torch.randn(BATCH, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [1, 2, 4])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_two_forms_of_the_diffused_reward_score_agree(dims, beta):
    """By the Gaussian integral, by the difference of two posterior means, and as the difference of two scores."""
    problem, y = Problem(dims, beta), samples(dims)
    first = problem.exact_score(y, LEVEL)
    mean, cov = problem.tilted()
    gap = problem.posterior(y, LEVEL, mean, cov)[0] - problem.posterior(y, LEVEL)[0]
    assert torch.allclose(first, (LEVEL.alpha / LEVEL.sigma**2)[:, None] * gap, atol=1e-10, rtol=1e-10)
    leaf = y.clone().requires_grad_()
    log_ratio = sum(
        sign
        * torch.distributions.MultivariateNormal(
            LEVEL.alpha[:, None] * m,
            LEVEL.alpha[:, None, None] ** 2 * c + LEVEL.sigma[:, None, None] ** 2 * torch.eye(dims),
        ).log_prob(leaf)
        for sign, m, c in ((1, mean, cov), (-1, problem.m, problem.s))
    )
    assert torch.allclose(first, torch.autograd.grad(log_ratio.sum(), leaf)[0], atol=1e-9, rtol=1e-9)


def test_the_plug_in_is_too_large_by_one_plus_q_v_over_beta():
    problem, y = Problem(1, beta=0.3), samples(1)
    estimate = proxy(y, lambda leaf, k: problem.clean(leaf, LEVEL), problem.reward, problem.beta)
    variance = problem.posterior(y, LEVEL)[1][:, 0]
    factor = 1 + problem.q[0, 0] * variance / problem.beta
    assert torch.allclose(estimate, factor * problem.exact_score(y, LEVEL), atol=1e-12)
    assert factor[0] < 1.1 and factor[-1] > 1.5  # nothing near the data, much in the noise


@pytest.mark.parametrize("dims", [1, 3])
def test_kappa_times_the_plug_in_is_the_posterior_covariance_times_the_reward_gradient(dims):
    """Whatever the noise, in x_0 the pull is bounded by the reference's own covariance."""
    problem, y = Problem(dims, beta=0.3), samples(dims)
    estimate = proxy(y, lambda leaf, k: problem.clean(leaf, LEVEL), problem.reward, problem.beta)
    mean, cov = problem.posterior(y, LEVEL)
    pull = -(cov @ problem.q @ (mean - problem.mu)[..., None])[..., 0] / problem.beta
    assert torch.allclose(expand(LEVEL.kappa, y) * estimate, pull, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2])
def test_particles_of_the_exact_posterior_converge_to_the_exact_score(dims):
    problem, y = Problem(dims, beta=0.5), samples(dims)
    root = torch.linalg.cholesky(problem.posterior(y, LEVEL)[1])
    exact = problem.exact_score(y, LEVEL)

    def error(particles, seed):
        noise = torch.randn(
            particles, BATCH, dims, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        estimate = proxy(
            y,
            lambda leaf, k: problem.clean(leaf, LEVEL) + (root @ noise[k])[..., 0],
            problem.reward,
            problem.beta,
            particles,
        )
        return float((estimate - exact).norm() / exact.norm())

    errors = [np.mean([error(k, seed) for seed in range(4)]) for k in (4, 32, 256)]
    assert errors[0] > 1.7 * errors[1] and errors[1] > 1.7 * errors[2] and errors[2] < 0.15


def test_particles_are_weighted_stably_and_per_sample():
    """ln mean exp, written out, with rewards that would overflow exp in any precision."""
    y = torch.tensor([[1.0], [2.0]])
    offsets = torch.tensor([0.0, 0.3, -0.2])

    def reward(x):
        return 500 * torch.sin(x[:, 0])

    estimate = proxy(y, lambda leaf, k: leaf + offsets[k], reward, 0.01, 3)
    leaf = y.double().requires_grad_()
    values = torch.stack([reward(leaf + o) for o in offsets.double()])
    (expected,) = torch.autograd.grad(torch.logsumexp(values / 0.01, 0).sum(), leaf)
    assert torch.isfinite(estimate).all() and torch.allclose(estimate.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("dims", [1, 3])
def test_damped_is_exact_in_one_dimension_and_never_beyond_the_plug_in(dims):
    problem, y = Problem(dims, beta=0.2), samples(dims)
    pull = damped(y, lambda leaf, k: problem.clean(leaf, LEVEL), problem.reward, problem.beta, LEVEL.kappa)
    exact = expand(LEVEL.kappa, y) * problem.exact_score(y, LEVEL)
    estimate = proxy(y, lambda leaf, k: problem.clean(leaf, LEVEL), problem.reward, problem.beta)
    plug_in = expand(LEVEL.kappa, y) * estimate
    if dims == 1:
        assert torch.allclose(pull, exact, atol=1e-10)
    share = (pull * plug_in).sum(1) / plug_in.square().sum(1)
    assert torch.allclose(pull, share[:, None] * plug_in, atol=1e-10) and (share > 0).all() and (share < 1).all()
    assert (pull - exact).norm() < 0.5 * (plug_in - exact).norm()


def test_damped_leaves_linear_and_convex_rewards_alone():
    problem, y = Problem(2, beta=0.2), samples(2)
    flat = torch.zeros(BATCH, 2, dtype=torch.float64)
    for reward in (lambda x: x.sum(1), lambda x: x.square().sum(1)):
        pull = damped(y, lambda leaf, k: problem.clean(leaf, LEVEL), reward, 0.2, LEVEL.kappa)
        estimate = proxy(y, lambda leaf, k: problem.clean(leaf, LEVEL), reward, 0.2)
        assert torch.allclose(pull, expand(LEVEL.kappa, y) * estimate)
    still = damped(y, lambda leaf, k: problem.clean(leaf, LEVEL), lambda x: 0 * x.sum(1), 0.2, LEVEL.kappa)
    assert torch.equal(still, flat)


# Several steps: the affine map Phi_m of a 1-D Gaussian, read off by differentiation.

LADDER = Ladder(TimeTable(SCHEDULE, [200]), SCHEDULE)


def top_level(quantile=0.9):
    index = int(quantile * len(LADDER.t))
    t, lam = (torch.tensor([c[index]]) for c in (LADDER.t, LADDER.lam))
    return Level.of(SCHEDULE, t, lam)


def slope_and_spread(problem, m, eta, level):
    """d Phi_m / d y, and the variance of Phi_m over the noise drawn on the way."""
    y = torch.full((1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    draws = [torch.zeros(1, 1, dtype=torch.float64, requires_grad=True) for _ in range(m - 1)]
    x0 = denoise_steps(problem.clean, y, level, LADDER, m, noise=lambda k, like: draws[k - 1], eta=eta)
    gradients = torch.autograd.grad(x0.sum(), [y, *draws], allow_unused=True)
    return float(gradients[0]), sum(float(g) ** 2 for g in gradients[1:] if g is not None)


def test_one_step_is_tweedie():
    problem, y = Problem(2, 1.0), samples(2)
    assert torch.equal(denoise_steps(problem.clean, y, LEVEL, LADDER, 1), problem.clean(y, LEVEL))


def test_steps_without_noise_approach_the_probability_flow_and_its_larger_slope():
    """Flow: (y - alpha m) / std(y) is kept, so the slope is s / std(y), above Tweedie's alpha s^2 / var(y)."""
    problem, level = Problem(1, 1.0), top_level()
    s = float(problem.s.sqrt())
    total = math.sqrt(float(level.alpha) ** 2 * s**2 + float(level.sigma) ** 2)
    tweedie, flow = float(level.alpha) * s**2 / total**2, s / total
    slopes = [slope_and_spread(problem, m, 0.0, level)[0] for m in (1, 2, 4, 64)]
    assert slopes[0] == pytest.approx(tweedie, rel=1e-9)
    assert slopes == sorted(slopes) and slopes[-1] == pytest.approx(flow, rel=0.05)
    assert slopes[1] > 5 * tweedie  # two steps: many times too strong, for a *linear* reward


def test_posterior_noise_keeps_the_slope_and_spreads_towards_the_posterior():
    problem, level = Problem(1, 1.0), top_level()
    y = torch.zeros(1, 1, dtype=torch.float64)
    variance = float(problem.posterior(y, level)[1])
    tweedie = slope_and_spread(problem, 1, 0.0, level)[0]
    spreads = []
    for m in (1, 2, 4, 64):
        slope, spread = slope_and_spread(problem, m, None, level)
        assert slope == pytest.approx(tweedie, rel=1e-5)
        spreads.append(spread / variance)
    assert spreads[0] == 0 and spreads == sorted(spreads) and 0.85 < spreads[-1] < 1.0


def test_particles_with_posterior_noise_shrink_the_error_as_steps_grow():
    """Many particles, quadratic reward, 1-D: (1 + q v / beta) / (1 + q v_m / beta) times the truth."""
    problem, level = Problem(1, beta=0.5), top_level(0.6)
    y = torch.full((1, 1), 0.7, dtype=torch.float64)
    exact = float(problem.exact_score(y, level))
    variance = float(problem.posterior(y, level)[1])
    q = float(problem.q) / problem.beta
    particles, factors = 4096, []
    for m in (1, 2, 4):
        generator = torch.Generator().manual_seed(m)
        noise = torch.randn(particles, m, dtype=torch.float64, generator=generator)
        # All particles as one batch of K: logsumexp by hand, so that 4096 do not cost 4096 calls.
        leaf = y.clone().requires_grad_()
        many = Level(*(part.expand(particles) for part in (level.t, level.lam, level.alpha, level.sigma)))
        x0 = denoise_steps(
            problem.clean,
            leaf.expand(particles, 1),
            many,
            LADDER,
            m,
            noise=lambda k, like: noise[:, k : k + 1],
            eta=None,
        )
        log_mean = torch.logsumexp(problem.reward(x0) / problem.beta, 0)
        estimate = float(torch.autograd.grad(log_mean, leaf)[0])
        _, spread = slope_and_spread(problem, m, None, level)
        factors.append(estimate / exact)
        assert factors[-1] == pytest.approx((1 + q * variance) / (1 + q * spread), rel=0.08)
    assert factors[0] > 1.1 * factors[1] > 1.1 * factors[2] > 1.1


def test_eta_one_forgets_where_y_was_pointing():
    """x' = alpha' x_0 + sigma' n: two y with one clean prediction cannot be told apart further down."""
    level = top_level()
    y = torch.tensor([[0.3], [0.9]], dtype=torch.float64)
    many = Level(*(part.expand(2) for part in (level.t, level.lam, level.alpha, level.sigma)))

    def noise(k, like):
        return torch.full_like(like, 0.2)

    def clean(x, at, cond):
        return torch.zeros_like(x) if x is y else 0.5 * x

    steps = denoise_steps(clean, y, many, LADDER, 2, noise=noise, eta=1.0)
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(*denoise_steps(clean, y, many, LADDER, 2, noise=noise, eta=0.5))


def test_images_and_half_networks_go_through():
    """[B, C, H, W] float32, a Ladder of float32 levels, gradients through m steps."""
    level = LADDER.draw(np.random.default_rng(0), 3)
    y = torch.randn(3, 2, 4, 4)

    def clean(x, at, cond):
        return (0.5 * x).bfloat16().float()

    estimate = proxy(
        y, lambda leaf, k: denoise_steps(clean, leaf, level, LADDER, 3, eta=0.0), lambda x: x.flatten(1).mean(1), 0.1
    )
    assert estimate.shape == y.shape and estimate.dtype == torch.float32
    assert (estimate != 0).all() and not estimate.requires_grad


def test_what_is_refused():
    y = torch.zeros(BATCH, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="the reward has no gradient"):
        proxy(y, lambda leaf, k: leaf, lambda x: x.detach().sum(1), 1.0)
    with pytest.raises(ValueError, match="the denoised sample has no gradient"):
        damped(y, lambda leaf, k: leaf.detach(), lambda x: x.sum(1), 1.0, LEVEL.kappa)
