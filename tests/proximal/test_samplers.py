import itertools
import math
import re

import pytest
import torch

from fixtures.closed_form import Gaussian, affine_moments, gamma
from rlproxi.proximal.samplers import AFTER, KINDS, plan, sample, smallest_steps
from rlproxi.proximal.schedule import VPSchedule

SCHEDULE = VPSchedule()
PROXIMAL = [name for name in KINDS if name not in AFTER]
TARGET = Gaussian(mean=0.4, std=0.3)


def recursion(sampler: str, times: list[float], target: Gaussian) -> tuple[float, float]:
    """Mean and variance of x_0, from method.md's table by hand: no code shared with the package."""
    mean, variance = 0.0, 1.0
    for old, new in zip(times[:0:-1], times[-2::-1]):
        g = gamma(new, old)
        if sampler == "hybrid":
            mean, variance, lam = (1 + g / 2) * mean, (1 + g / 2) ** 2 * variance + g, g
        elif sampler == "backward":
            mean, variance, lam = mean / (1 - g / 2), (variance + g) / (1 - g / 2) ** 2, g / (1 - g / 2)
        else:
            mean, variance, lam = (1 + g / 2) * mean, (1 + g / 2) ** 2 * variance, g / 2
        m, v = target.marginal(new)
        mean, variance = (v * mean + lam * m) / (v + lam), variance * (v / (v + lam)) ** 2
    return mean, variance


@pytest.mark.parametrize(
    "sampler, n", [(s, n) for s in PROXIMAL for n in (1, 4, 10, 37, 100) if s != "backward" or n >= 10]
)
@pytest.mark.parametrize("start", [1.0, 0.65])
@pytest.mark.parametrize("spacing", ["uniform", "gamma", "quadratic"])
def test_exact_moments(sampler, n, start, spacing):
    if sampler == "backward" and n < smallest_steps(SCHEDULE, 2.0, start, spacing):
        pytest.skip("backward needs more steps on this grid")
    steps = plan(SCHEDULE, sampler, n, start, spacing)
    mean, variance = affine_moments(lambda x, noise: sample(TARGET.prox, steps, x, noise=noise).x, n)
    expected = recursion(sampler, SCHEDULE.grid(n, start, spacing), TARGET)
    assert mean == pytest.approx(expected[0], abs=1e-10)
    assert variance == pytest.approx(expected[1], abs=1e-10)


@pytest.mark.parametrize("sampler", ["ddim", "matched"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("n, start", [(1, 0.8), (4, 0.65), (20, 1.0)])
def test_ddim_is_the_recursion_of_its_paper(n, start, eta, sampler):
    """DDIM on a Gaussian by the posterior mean E[x_0 | x_t], written down from the target's marginals. ``matched`` asks
    the prox for E[x_{k-1} | x_k], which contains it."""
    times = SCHEDULE.grid(n, start)
    mean, variance = 0.0, 1.0
    for old, new in zip(times[:0:-1], times[-2::-1]):
        alpha, alpha_next = (SCHEDULE.alpha_bar(t) ** 0.5 for t in (old, new))
        sigma, sigma_next = ((1 - a * a) ** 0.5 for a in (alpha, alpha_next))
        gain = alpha * TARGET.std**2 / (alpha**2 * TARGET.std**2 + sigma**2)  # x^ = m + gain (x - alpha m)
        kept = sigma_next * (1 - eta**2) ** 0.5 / sigma
        slope = (alpha_next - kept * alpha) * gain + kept
        mean = slope * mean + (alpha_next - kept * alpha) * (TARGET.mean - gain * alpha * TARGET.mean)
        variance = slope**2 * variance + (sigma_next * eta) ** 2
    steps = plan(SCHEDULE, sampler, n, start, eta=eta)
    found = affine_moments(lambda x, noise: sample(TARGET.prox, steps, x, noise=noise).x, n)
    assert found[0] == pytest.approx(mean, abs=1e-7) and found[1] == pytest.approx(variance, abs=1e-7)


@pytest.mark.parametrize("spacing", ["uniform", "gamma"])
def test_matched_asks_for_what_matching_trains_on(spacing):
    """z = a x_k is x_{k-1} with noise of variance lam and nothing else, for steps of any size."""
    times = SCHEDULE.grid(4, 1.0, spacing)
    for step, old, new in zip(plan(SCHEDULE, "matched", 4, 1.0, spacing), times[:0:-1], times[-2::-1]):
        signal, after = SCHEDULE.alpha_bar(old), SCHEDULE.alpha_bar(new)
        assert step.t == new and step.s == 0
        assert step.a * signal**0.5 == pytest.approx(after**0.5)  # the share of x_0
        assert step.a**2 * (1 - signal) == pytest.approx(1 - after + step.lam)  # the variance of the noise
    assert (step.b, step.d, step.e) == (1, 0, 0)  # the last one is the prox's own answer


@pytest.mark.parametrize("sampler", ["ddim", "matched"])
def test_an_eta_for_each_step(sampler):
    steps = plan(SCHEDULE, sampler, 3, 0.8, eta=[0.0, 1.0, 0.5])
    assert [step.e > 0 for step in steps] == [False, True, False]  # the last one ends at no noise whatever eta is
    assert sampler == "matched" or (steps[1].d == 0.0 and steps[0].d > 0)


def test_few_steps_under_disperse_as_recorded():
    target = Gaussian(0.0, 0.3)
    for n, std in ((5, 0.14), (10, 0.20), (100, 0.29)):
        steps = plan(SCHEDULE, "hybrid", n)
        _, variance = affine_moments(lambda x, noise: sample(target.prox, steps, x, noise=noise).x, n)
        assert math.sqrt(variance) == pytest.approx(std, abs=0.007)


@pytest.mark.parametrize("sampler", PROXIMAL)
def test_converges_to_the_target_as_steps_grow(sampler):
    errors = []
    for n in (10, 50, 250, 1250):
        mean, variance = recursion(sampler, SCHEDULE.grid(n), TARGET)
        errors.append(abs(mean - TARGET.mean) + abs(math.sqrt(variance) - TARGET.std))
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 5e-3


def test_many_samples_approach_the_target():
    generator = torch.Generator().manual_seed(3)
    errors = []
    for n in (10, 40, 160):
        x = torch.randn(200_000, 1, dtype=torch.float64, generator=generator)

        def noise(k, like):
            return torch.randn(like.shape, dtype=like.dtype, generator=generator)

        out = sample(TARGET.prox, plan(SCHEDULE, "hybrid", n), x, noise=noise).x
        mean, variance = recursion("hybrid", SCHEDULE.grid(n), TARGET)
        assert float(out.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / 200_000))
        assert float(out.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / 200_000))
        errors.append(abs(float(out.std()) - TARGET.std))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


@pytest.mark.parametrize("sampler", ["hybrid", "backward"])
def test_fresh_noise_every_step_and_new_times(sampler):
    n = 12
    seen_noise, seen_t = [], []

    def noise(k, like):
        seen_noise.append(k)
        return torch.full_like(like, float(k))

    def prox(y, t, lam, cond):
        seen_t.append(t)
        assert cond == "caption"
        return y * 0.5

    steps = plan(SCHEDULE, sampler, n)
    out = sample(prox, steps, torch.ones(2, 3), "caption", noise, keep_chain=True)
    assert seen_noise == list(range(n, 0, -1))  # k = 1, the last step, is among them
    assert seen_t == SCHEDULE.grid(n)[-2::-1] and seen_t[-1] == 0.0
    assert len(out.z) == len(out.prox) == n and torch.equal(out.prox[-1], out.x)
    x = torch.ones(2, 3)
    for step, z, p in zip(steps, out.z, out.prox):
        assert torch.allclose(z, step.a * x + step.s * step.k)
        x = p


def test_ode_draws_no_noise():
    def refuse(k, like):
        raise AssertionError("the ode sampler is deterministic")

    sample(TARGET.prox, plan(SCHEDULE, "ode", 5), torch.ones(1, 1), noise=refuse)


def test_the_chain_is_kept_only_on_request():
    out = sample(TARGET.prox, plan(SCHEDULE, "hybrid", 3), torch.ones(1, 1))
    assert out.z == [] and out.prox == []


def test_noise_comes_from_torchs_own_generator_where_none_is_given():
    def drawn(seed):
        torch.manual_seed(seed)
        return sample(TARGET.prox, plan(SCHEDULE, "hybrid", 3), torch.ones(4, 2, dtype=torch.float64)).x

    assert torch.equal(drawn(7), drawn(7)) and not torch.equal(drawn(7), drawn(8))


@pytest.mark.parametrize("start, spacing", [(1.0, "uniform"), (0.8, "uniform"), (1.0, "gamma"), (1.0, "quadratic")])
def test_impossible_backward_names_the_smallest_that_works(start, spacing):
    with pytest.raises(ValueError, match="must be below 2") as error:
        plan(SCHEDULE, "backward", 2, start, spacing)
    smallest = int(re.search(r"is (\d+)$", str(error.value)).group(1))
    assert all(step.gamma < 2 for step in plan(SCHEDULE, "backward", smallest, start, spacing))
    with pytest.raises(ValueError, match=rf"is {smallest}$"):
        plan(SCHEDULE, "backward", smallest - 1, start, spacing)


def test_backward_with_five_uniform_steps():
    with pytest.raises(ValueError, match=r"num_inference_steps=5: its largest gamma is 3\.60.*is 10$"):
        plan(SCHEDULE, "backward", 5)


def test_unknown_names():
    with pytest.raises(ValueError, match="heun.*hybrid"):
        plan(SCHEDULE, "heun", 5)
