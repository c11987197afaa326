import math

import pytest
import torch

from fixtures import score
from fixtures.closed_form import Gaussian, alpha_bar, gamma
from rlproxi.proximal.operator import ProximalOperator
from rlproxi.proximal.samplers import plan, sample
from rlproxi.proximal.schedule import VPSchedule
from rlproxi.proximal.warmstart import WarmStart

SCHEDULE = VPSchedule()
TARGET = Gaussian(0.4, 0.3)
PAIRS = [(t, lam) for t in (0.0, 0.001, 0.1, 0.5, 0.9, 1.0) for lam in (1e-4, 0.05, 1.0, 4.0)]


def eps_model(x, time, cond):
    return TARGET.eps(x, time)


def v_model(x, time, cond):
    """v = alpha E[eps | x] - sigma E[x_0 | x], with both expectations written out."""
    ab = alpha_bar(time[:, None])
    v = ab * TARGET.std**2 + 1 - ab
    centred = x - ab.sqrt() * TARGET.mean
    clean = TARGET.mean + ab.sqrt() * TARGET.std**2 * centred / v
    return ab.sqrt() * TARGET.eps(x, time) - (1 - ab).sqrt() * clean


def flow_model(x, s, cond):
    """E[n - x_0 | x_s] for x_s = (1 - s) x_0 + s n."""
    s = s[:, None]
    variance = (1 - s) ** 2 * TARGET.std**2 + s**2
    centred = (x - (1 - s) * TARGET.mean) / variance
    return s * centred - (TARGET.mean + (1 - s) * TARGET.std**2 * centred)


MODELS = {"epsilon": eps_model, "v_prediction": v_model, "flow": flow_model}


@pytest.mark.parametrize("prediction", MODELS)
def test_exact_on_a_gaussian(prediction):
    y = torch.linspace(-3, 3, 7, dtype=torch.float64)
    t, lam = (torch.tensor(c, dtype=torch.float64).repeat_interleave(7) for c in zip(*PAIRS))
    y = y.repeat(len(PAIRS))[:, None]
    eps = WarmStart(MODELS[prediction], prediction, SCHEDULE)(y, t, lam, None)
    expected = (y - TARGET.prox(y, t[:, None], lam[:, None])) / lam[:, None].sqrt()
    assert torch.allclose(eps, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("prediction", MODELS)
def test_float32_and_half_precision_models(prediction):
    model = MODELS[prediction]
    y = torch.randn(24, 1)
    t, lam = (torch.tensor(c) for c in zip(*PAIRS))
    expected = (y - TARGET.prox(y, t[:, None], lam[:, None])) / lam[:, None].sqrt()
    exact = WarmStart(model, prediction, SCHEDULE)(y, t, lam)
    assert exact.dtype == torch.float32 and torch.allclose(exact, expected, atol=2e-3)
    rough = WarmStart(lambda *a: model(*a).bfloat16(), prediction, SCHEDULE)(y, t, lam)
    assert rough.dtype == torch.float32 and torch.allclose(rough, expected, atol=0.05)


@pytest.mark.parametrize("prediction", MODELS)
def test_it_is_a_denoiser(prediction):
    """Through the operator, images and all, and finite in the corners t = 0, lam = 0."""
    start = WarmStart(lambda x, time, c: 0.1 * x + time[:, None, None, None], prediction, SCHEDULE)
    y = torch.randn(2, 3, 4, 4)
    assert ProximalOperator(start)(y, 0.3, 0.5).shape == y.shape
    assert torch.equal(start(y, torch.tensor([0.0, 0.4]), torch.zeros(2)), torch.zeros_like(y))


def recorded_times(prediction="epsilon", t=1.0, lam=1.0, **kwargs):
    seen = []

    def model(x, time, cond):
        seen.append(time)
        return torch.zeros_like(x)

    WarmStart(model, prediction, SCHEDULE, **kwargs)(
        torch.ones(1, 1, dtype=torch.float64), *(torch.tensor([v], dtype=torch.float64) for v in (t, lam))
    )
    return float(seen[0])


def test_time_hook():
    assert recorded_times() > 1.0  # half of alpha_bar(1)
    hook = recorded_times(model_time=lambda ab: 1000 * ab)
    assert hook == pytest.approx(1000 * math.exp(-gamma(0.0, 1.0)) / 2)
    assert recorded_times("flow", model_time=lambda s: 1000 * s) == pytest.approx(1000 * recorded_times("flow"))


@pytest.mark.parametrize("n", [1, 4, 10, 100])
def test_hybrid_and_ode_stay_within_the_models_times(n):
    for sampler in ("hybrid", "ode"):
        for step in plan(SCHEDULE, sampler, n):
            old = SCHEDULE.time_of_alpha_bar(alpha_bar(step.t) * math.exp(-step.gamma))
            assert step.t < recorded_times(t=step.t, lam=step.lam) <= old + 1e-12


def test_backward_can_go_beyond():
    first = plan(SCHEDULE, "backward", 10)[0]
    assert recorded_times(t=first.t, lam=first.lam) > 1.0


def test_flow_level_is_the_signal_to_noise_of_y():
    s = recorded_times("flow", 0.3, 0.5)
    ab = alpha_bar(0.3)
    assert s / (1 - s) == pytest.approx(math.sqrt((1 - ab + 0.5) / ab))


def test_parameters_of_the_model_are_reached():
    model = torch.nn.Bilinear(2, 2, 2)
    assert len(list(WarmStart(model, "epsilon", SCHEDULE).parameters())) == 2


@pytest.mark.parametrize("prediction", MODELS)
def test_ddim_in_the_proxs_words_is_the_score_models_own(prediction):
    """Not on a Gaussian only: any eps model, here one that bends; the others are made of it by algebra."""

    def bent(x, t, cond=None):
        return torch.tanh(2 * x) * t[:, None] + 0.1 * x

    def flow(x, s, cond=None):  # x_s (alpha + sigma) is the variance-preserving x_t of the same noise-to-signal ratio
        ratio = s / (1 - s)
        alpha, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        vp = x / (1 - s)[:, None] * alpha[:, None]
        eps = bent(vp, SCHEDULE.time_of_alpha_bar(alpha**2))
        return eps - (vp - sigma[:, None] * eps) / alpha[:, None]

    def velocity(x, t, cond=None):
        alpha, sigma = SCHEDULE.alpha_bar(t).sqrt()[:, None], (1 - SCHEDULE.alpha_bar(t)).sqrt()[:, None]
        eps = bent(x, t)
        return alpha * eps - sigma * (x - sigma * eps) / alpha

    model = {"epsilon": bent, "v_prediction": velocity, "flow": flow}[prediction]
    prox = ProximalOperator(WarmStart(model, prediction, SCHEDULE))
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = sample(prox, plan(SCHEDULE, "ddim", 7, 0.65), x).x
    theirs = score.sample(bent, SCHEDULE, "ddim", SCHEDULE.grid(7, 0.65), x)
    assert torch.allclose(ours, theirs, atol=1e-8)
