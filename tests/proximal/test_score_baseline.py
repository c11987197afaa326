import itertools
import math

import numpy as np
import pytest
import torch

from fixtures.closed_form import Gaussian, affine_moments, alpha_bar, exact_normals, gamma
from fixtures.score import SAMPLERS, draw_times, guided, matching_loss, perturb, sample
from rlproxi.proximal.samplers import plan
from rlproxi.proximal.samplers import sample as proximal_sample
from rlproxi.proximal.schedule import VPSchedule

SCHEDULE = VPSchedule()
TARGET = Gaussian(0.4, 0.3)


def recursion(sampler, times, target, eta=0.0, denoise_last=True):
    """Mean and variance by hand. DDIM is written through x_0 and eps, as its paper does."""
    mean, variance = 0.0, 1.0
    for k in range(len(times) - 1, 0, -1):
        ab, ab2, g = alpha_bar(times[k]), alpha_bar(times[k - 1]), gamma(times[k - 1], times[k])
        m, v = target.marginal(times[k])
        if sampler == "ddim":
            sigma2 = eta**2 * (1 - ab2) / (1 - ab) * (1 - ab / ab2)
            # eps = sqrt(1-ab) (x-m)/v, x_0 = (x - sqrt(1-ab) eps)/sqrt(ab): slopes in x, value at x = m
            eps = math.sqrt(1 - ab) / v
            clean = (1 - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
            slope = math.sqrt(ab2) * clean + math.sqrt(1 - ab2 - sigma2) * eps
            mean, variance = math.sqrt(ab2) * target.mean + slope * (mean - m), slope**2 * variance + sigma2
        else:
            pull = g / v * (1.0 if sampler == "euler_maruyama" else 0.5)
            mean = (1 + g / 2) * mean - pull * (mean - m)
            variance = (1 + g / 2 - pull) ** 2 * variance
            if sampler == "euler_maruyama" and not (k == 1 and denoise_last):
                variance += g
    return mean, variance


def moments(sampler, times, target=TARGET, **options):
    def run(x, noise):
        return sample(target.eps, SCHEDULE, sampler, times, x, noise=noise, **options)

    return affine_moments(run, len(times) - 1)


@pytest.mark.parametrize(
    "sampler, options",
    [
        ("euler_maruyama", {}),
        ("euler_maruyama", {"denoise_last": False}),
        ("ode", {}),
        ("ddim", {}),
        ("ddim", {"eta": 0.5}),
        ("ddim", {"eta": 1.0}),
    ],
)
@pytest.mark.parametrize("n", [1, 5, 20, 100])
def test_exact_moments(sampler, options, n):
    times = SCHEDULE.grid(n, 0.9)
    expected = recursion(sampler, times, TARGET, **options)
    assert moments(sampler, times, **options) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    "sampler, eta, theirs", [("euler", 1.0, "euler_maruyama"), ("euler", 0.0, "ode"), ("ddim", 0.0, "ddim")]
)
@pytest.mark.parametrize("n", [1, 4, 25])
def test_the_samplers_of_clean_predictions_are_these(sampler, eta, theirs, n):
    """``proximal.samplers`` has them around prox(.; 0, lam) = E[x_0 | x_t], which for a Gaussian both know exactly."""
    steps = plan(SCHEDULE, sampler, n, 0.9, eta=eta)
    ours = affine_moments(lambda x, noise: proximal_sample(TARGET.prox, steps, x, noise=noise).x, n)
    assert ours == pytest.approx(moments(theirs, SCHEDULE.grid(n, 0.9)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "sampler, options", [("euler_maruyama", {}), ("ode", {}), ("ddim", {}), ("ddim", {"eta": 1.0})]
)
def test_converges_to_the_target(sampler, options):
    errors = []
    for n in (20, 100, 500, 2500):
        mean, variance = (
            moments(sampler, SCHEDULE.grid(n), **options)
            if n < 2500
            else recursion(sampler, SCHEDULE.grid(n), TARGET, **options)
        )
        errors.append(abs(mean - TARGET.mean) + abs(math.sqrt(variance) - TARGET.std))
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 5e-3


def test_many_samples_match():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 1, generator=generator, dtype=torch.float64)
    noise = lambda k, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    out = sample(TARGET.eps, SCHEDULE, "euler_maruyama", SCHEDULE.grid(50), x, noise=noise)
    mean, variance = recursion("euler_maruyama", SCHEDULE.grid(50), TARGET)
    assert float(out.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / 50_000))
    assert float(out.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / 50_000))


def test_old_times_noise_protocol_and_early_end():
    seen_t, seen_k, done = [], [], []

    def model(x, t, cond):
        assert cond == "caption" and t.shape == (2,) and t.dtype == torch.float32
        seen_t.append(float(t[0]))
        return torch.zeros_like(x)

    def noise(k, like):
        seen_k.append(k)
        return torch.zeros_like(like)

    times = [1e-3, *SCHEDULE.grid(5)[1:]]
    sample(
        model,
        SCHEDULE,
        "euler_maruyama",
        times,
        torch.ones(2, 1),
        "caption",
        noise,
        callback=lambda k, x: done.append(k),
    )
    assert seen_t == pytest.approx(times[:0:-1]) and seen_k == [5, 4, 3, 2] and done == [5, 4, 3, 2, 1]
    sample(model, SCHEDULE, "euler_maruyama", times, torch.ones(2, 1), "caption", noise, denoise_last=False)
    assert seen_k[4:] == [5, 4, 3, 2, 1]
    del seen_k[:]
    sample(model, SCHEDULE, "ddim", SCHEDULE.grid(3), torch.ones(2, 1), "caption", noise, eta=1.0)
    assert seen_k == [3, 2]  # at ab' = 1 DDIM has no noise left to add


def test_clipping_bounds_the_clean_prediction():
    x = torch.linspace(-3, 3, 13)[:, None]
    out = sample(lambda x, t, c: torch.zeros_like(x), SCHEDULE, "ddim", [0.0, 1.0], x, clip_sample=1.0)
    assert torch.allclose(out, x.sign() * (x != 0), atol=1e-4)
    free = sample(TARGET.eps, SCHEDULE, "ddim", SCHEDULE.grid(10), x.double())
    loose = sample(TARGET.eps, SCHEDULE, "ddim", SCHEDULE.grid(10), x.double(), clip_sample=100.0)
    assert torch.allclose(free, loose, atol=1e-10)


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"sampler": "heun"}, "heun"),
        ({"sampler": "ode", "eta": 0.5}, "eta"),
        ({"sampler": "ddim", "eta": 1.5}, "eta"),
        ({"times": [1.0, 0.0]}, "ascend"),
        ({"times": [0.0]}, "ascend"),
    ],
)
def test_errors(kwargs, word):
    options = {"sampler": "ddim", "times": [0.0, 1.0], **kwargs}
    with pytest.raises(ValueError, match=word):
        sample(TARGET.eps, SCHEDULE, x=torch.ones(1, 1), **options)
    assert len(SAMPLERS) == 3


def test_least_squares_recovers_eps():
    n = exact_normals(500, 2)
    t = torch.full((500,), 0.4, dtype=torch.float64)
    x = perturb(SCHEDULE, 0.4 + 0.3 * n[:, :1], t, n[:, 1:])
    weights = torch.linalg.lstsq(torch.cat([torch.ones_like(x), x], 1), n[:, 1:]).solution
    assert torch.allclose(weights[0] + weights[1] * x, TARGET.eps(x, t), atol=1e-11)


def test_loss_and_times():
    eps, n = torch.randn(2, 4, 3, 2, 2).unbind(0)
    assert torch.allclose(matching_loss(eps, n), ((eps - n) ** 2).mean((1, 2, 3)))
    t = draw_times(np.random.default_rng(0), 10_000, 0.1)
    assert t.dtype == torch.float32 and float(t.min()) >= 0.1 and float(t.max()) <= 1.0
    assert float(t.mean()) == pytest.approx(0.55, abs=0.02)
    with pytest.raises(ValueError, match="t_min"):
        draw_times(np.random.default_rng(0), 1, 1.0)


def test_guidance_form_and_cost():
    batches = []

    def model(x, t, cond):
        batches.append(len(x))
        return cond[:, None] * x + t[:, None]

    x, t, cond = torch.randn(3, 2), torch.rand(3), torch.tensor([1.0, 2.0, 3.0])
    wiring = dict(with_null=lambda c: torch.cat([c, torch.zeros_like(c)]))
    out = guided(model, 2.5, **wiring)(x, t, cond)
    null = model(x, t, torch.zeros(3))
    assert batches == [6, 3] and torch.allclose(out, null + 2.5 * (model(x, t, cond) - null), atol=1e-5)
    del batches[:]
    assert torch.equal(guided(model, 1.0, **wiring)(x, t, cond), model(x, t, cond)) and batches == [3, 3]
