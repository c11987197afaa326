import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlproxi.proximal.schedule import GRIDS, VPSchedule

times = st.floats(0.0, 1.0)
schedules = st.builds(VPSchedule, beta_min=st.floats(1e-3, 2.0), beta_max=st.floats(3.0, 40.0))


@settings(max_examples=60)
@given(schedules, times, times, times)
def test_integral_is_additive_and_antisymmetric(schedule, a, b, c):
    assert schedule.integral(a, b) + schedule.integral(b, c) == pytest.approx(schedule.integral(a, c), abs=1e-12)
    assert schedule.integral(a, b) == -schedule.integral(b, a)


@settings(max_examples=60)
@given(schedules, times)
def test_inverses(schedule, t):
    assert schedule.inverse_integral(schedule.integral(0.0, t)) == pytest.approx(t, rel=1e-12, abs=1e-300)
    assert schedule.time_of_alpha_bar(schedule.alpha_bar(t)) == pytest.approx(t, abs=1e-11)
    assert schedule.alpha_bar(t) == pytest.approx(math.exp(-schedule.integral(0.0, t)), rel=1e-15)


def test_integral_matches_quadrature_of_beta():
    schedule = VPSchedule()
    t = torch.linspace(0.2, 0.7, 100_001, dtype=torch.float64)
    beta = schedule.beta_min + (schedule.beta_max - schedule.beta_min) * t
    assert float(torch.trapezoid(beta, t)) == pytest.approx(schedule.integral(0.2, 0.7), rel=1e-12)


def test_published_numbers():
    schedule = VPSchedule()
    assert schedule.integral(0.0, 1.0) == pytest.approx(10.05, abs=1e-12)
    for n, largest in ((5, 3.60), (10, 1.90), (20, 0.975)):
        assert schedule.integral(1 - 1 / n, 1.0) == pytest.approx(largest, abs=0.005)
    assert schedule.alpha_bar(0.8) == pytest.approx(0.0016, abs=5e-5)
    assert schedule.alpha_bar(0.65) == pytest.approx(0.014, abs=5e-4)


def test_beyond_one_the_inverse_goes_on():
    schedule = VPSchedule()
    assert schedule.time_of_alpha_bar(schedule.alpha_bar(1.0) / 2) > 1.0


def test_tensors_agree_with_floats():
    schedule = VPSchedule()
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for f in (schedule.alpha_bar, schedule.inverse_integral, lambda x: schedule.integral(0.0, x)):
        expected = torch.tensor([f(float(x)) for x in t], dtype=torch.float64)
        assert torch.allclose(f(t), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 49, 1000])
@pytest.mark.parametrize("start", [1.0, 0.65, 0.1])
def test_grids_ascend_with_exact_ends(spacing, n, start):
    grid = VPSchedule().grid(n, start, spacing)
    assert len(grid) == n + 1 and grid[0] == 0.0 and grid[-1] == start
    assert all(a < b for a, b in itertools.pairwise(grid))


def test_gamma_grid_has_equal_gammas():
    schedule = VPSchedule()
    grid = schedule.grid(12, 0.8, "gamma")
    for a, b in itertools.pairwise(grid):
        assert schedule.integral(a, b) == pytest.approx(schedule.integral(0.0, 0.8) / 12, rel=1e-12)


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"num_steps": 0}, "at least 1"),
        ({"num_steps": 5, "start_time": 0.0}, "start_time"),
        ({"num_steps": 5, "start_time": 1.2}, "start_time"),
        ({"num_steps": 5, "spacing": "cosine"}, "cosine"),
    ],
)
def test_grid_errors(kwargs, word):
    with pytest.raises(ValueError, match=word):
        VPSchedule().grid(**kwargs)
