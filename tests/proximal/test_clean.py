import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.closed_form import Gaussian, alpha_bar
from rlproxi.proximal.clean import Ladder, Level, as_clean, clean_prediction
from rlproxi.proximal.matching import TimeTable
from rlproxi.proximal.operator import ProximalOperator
from rlproxi.proximal.schedule import VPSchedule
from rlproxi.proximal.warmstart import WarmStart

SCHEDULE = VPSchedule()
TARGET = Gaussian(0.4, 0.3)
PAIRS = [(t, lam) for t in (0.0, 0.001, 0.1, 0.5, 0.9) for lam in (1e-3, 0.05, 1.0, 4.0)]


def level_of(pairs, dtype=torch.float64):
    t, lam = (torch.tensor(column, dtype=dtype) for column in zip(*pairs))
    return Level.of(SCHEDULE, t, lam)


def column(values):
    return values[:, None]


def posterior_mean(y, level):
    """E[x_0 | y] for p_0 = N(m, s^2), from the joint Gaussian of x_0 and y."""
    alpha, sigma = column(level.alpha), column(level.sigma)
    gain = alpha * TARGET.std**2 / (alpha**2 * TARGET.std**2 + sigma**2)
    return TARGET.mean + gain * (y - alpha * TARGET.mean)


def prox_residual(y, t, lam, cond=None):
    return (y - TARGET.prox(y, column(t), column(lam))) / column(lam).sqrt()


def test_the_closed_form_prox_holds_the_posterior_mean():
    level = level_of(PAIRS)
    y = torch.linspace(-3, 3, 2 * len(PAIRS), dtype=torch.float64).reshape(-1, 2)
    eps = prox_residual(y, level.t, level.lam)
    assert torch.allclose(clean_prediction(y, eps, level), posterior_mean(y, level), atol=1e-10, rtol=0)


def test_it_undoes_the_warm_start():
    """Whatever an eps model says of x_0, not only an exact one."""

    def model(x, time, cond):
        return torch.sin(3 * x) + time[:, None]

    level = level_of(PAIRS)
    y = torch.linspace(-2, 2, len(PAIRS), dtype=torch.float64)[:, None]
    clean = as_clean(WarmStart(model, "epsilon", SCHEDULE))(y, level, None)
    scale = column(1 + level.lam).sqrt()
    ab = column(alpha_bar(level.t) / (1 + level.lam))
    eps = model(y / scale, SCHEDULE.time_of_alpha_bar(ab[:, 0]), None)
    assert torch.allclose(clean, (y / scale - (1 - ab).sqrt() * eps) / ab.sqrt(), atol=1e-9)


def test_level_and_diffuse():
    level = level_of([(0.3, 0.2), (0.0, 1e-6)])
    x0, n = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = level.diffuse(x0, n)
    ab = alpha_bar(0.3)
    assert torch.allclose(y[0], math.sqrt(ab) * x0[0] + math.sqrt(1 - ab + 0.2) * n[0])
    assert torch.allclose(y[1], x0[1] + 1e-3 * n[1])
    assert torch.allclose(level.noise(y, x0), n)
    assert torch.allclose(level.kappa, level.sigma**2 / level.alpha)
    assert torch.allclose(level.log_noise.exp(), level.sigma / level.alpha)
    moved = level.to("cpu")
    assert torch.equal(moved.t, level.t) and torch.equal(moved.sigma, level.sigma)


def test_float32_levels_keep_their_digits_near_the_data():
    rough = level_of([(1e-4, 1e-8)], torch.float32)
    exact = level_of([(1e-4, 1e-8)])
    assert {part.dtype for part in (rough.t, rough.lam, rough.alpha, rough.sigma)} == {torch.float32}
    # Of 1 - alpha_bar = 1e-5, float32 would have kept two digits.
    assert float(rough.sigma) == pytest.approx(float(exact.sigma), rel=1e-6)


def test_half_precision_samples_and_guidance():
    """bfloat16 in, float32 out; guidance in eps is guidance in x_0."""
    level = level_of([(0.3, 0.5), (0.6, 0.2)], torch.float32)

    def denoiser(y, t, lam, cond):
        return prox_residual(y, t, lam) + cond[:, None]

    y = torch.randn(2, 3)
    assert as_clean(denoiser)(y.bfloat16(), level, torch.zeros(2)).dtype == torch.float32
    guided = ProximalOperator(denoiser, 3.0, with_null=lambda cond: torch.cat([cond, torch.zeros_like(cond)]))
    cond = torch.tensor([0.3, -0.2])
    clean_cond, clean_null = (as_clean(denoiser)(y, level, c) for c in (cond, torch.zeros(2)))
    expected = clean_null + 3.0 * (clean_cond - clean_null)
    assert torch.allclose(as_clean(guided.residual)(y, level, cond), expected, atol=1e-5)


def test_gradients_flow_to_y_and_the_denoiser():
    level = level_of([(0.3, 0.5)])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    clean = as_clean(lambda y, t, lam, c: scale * prox_residual(y, t, lam))
    assert torch.autograd.gradcheck(lambda y: clean(y, level, None), y)
    clean(y, level, None).sum().backward()
    assert scale.grad is not None and scale.grad != 0


def ladder(candidates=(4, 8), **kwargs):
    return Ladder(TimeTable(SCHEDULE, list(candidates), **kwargs), SCHEDULE)


def test_ladder_is_sorted_and_draws_by_probability():
    table = TimeTable(SCHEDULE, [4, 8])
    rungs = Ladder(table, SCHEDULE)
    assert len(rungs.t) == 12 and (np.diff(rungs.log_noise) >= 0).all()
    drawn = rungs.draw(np.random.default_rng(0), 40_000, 0.0, 1.0)
    assert drawn.t.dtype == torch.float32 and drawn.sigma.shape == (40_000,)
    for t, lam, p in zip(table.t, table.lam, table.probability):
        share = ((drawn.t - t).abs() < 1e-6) & ((drawn.lam - lam).abs() < 1e-6)
        assert abs(float(share.double().mean()) - p) < 4 * math.sqrt(p / 40_000)


def test_quantiles_trim_only_where_there_are_entries_to_spare():
    few, many = ladder([4]), ladder([1000])
    rng = np.random.default_rng(0)
    assert len(set(few.draw(rng, 2000).lam.tolist())) == 4
    noise = many.draw(rng, 20_000).log_noise.double().numpy()
    assert noise.min() == pytest.approx(many.log_noise[20], abs=1e-5)
    assert noise.max() == pytest.approx(many.log_noise[979], abs=1e-5)
    lowest = few.draw(rng, 20, 0.0, 0.2).log_noise.double().numpy()
    assert np.allclose(lowest, few.log_noise[0], atol=1e-5)


def test_a_draw_is_named_by_its_generator():
    rungs = ladder()
    first, again = (rungs.draw(np.random.default_rng(3), 16) for _ in range(2))
    assert torch.equal(first.t, again.t) and torch.equal(first.lam, again.lam)


@settings(deadline=None, max_examples=50)
@given(index=st.integers(0, 11), fraction=st.floats(0, 1))
def test_below_is_the_nearest_entry_and_never_above(index, fraction):
    rungs = ladder()
    level = Level.of(SCHEDULE, torch.tensor([rungs.t[index]]).float(), torch.tensor([rungs.lam[index]]).float())
    lower = rungs.below(level, fraction)
    goal = (1 - fraction) * rungs.log_noise[index] + fraction * rungs.log_noise[0]
    allowed = rungs.log_noise[rungs.log_noise <= rungs.log_noise[index] + 1e-9]
    distance = abs(float(lower.log_noise.double()) - goal)
    assert distance == pytest.approx(np.abs(allowed - goal).min(), abs=1e-4)
    assert float(lower.log_noise) <= rungs.log_noise[index] + 1e-4


def test_below_at_its_ends_and_in_a_batch():
    rungs = ladder()
    top = rungs.draw(np.random.default_rng(0), 5)
    assert torch.equal(rungs.below(top, 0.0).lam, top.lam)
    assert np.allclose(rungs.below(top, 1.0).log_noise, rungs.log_noise[0], atol=1e-5)
    under = Level.of(SCHEDULE, torch.zeros(1), torch.tensor([1e-6]))
    assert np.allclose(rungs.below(under, 0.5).log_noise, rungs.log_noise[0], atol=1e-5)
