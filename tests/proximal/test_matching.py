import math

import numpy as np
import pytest
import torch

from fixtures.closed_form import Gaussian, alpha_bar, exact_normals
from rlproxi.proximal.matching import TimeTable, corrupt, expected_noise, level_weight, matching_loss
from rlproxi.proximal.samplers import plan
from rlproxi.proximal.schedule import VPSchedule

SCHEDULE = VPSchedule()
CANDIDATES = [5, 10, 20, 50, 100, 1000]


@pytest.mark.parametrize("sampler, candidates", [("hybrid", CANDIDATES), ("ode", [4, 8]), ("backward", [10, 20])])
@pytest.mark.parametrize("start, spacing", [(1.0, "uniform"), (0.8, "gamma")])
def test_pairs_are_those_the_sampler_asks_for(sampler, candidates, start, spacing):
    table = TimeTable(SCHEDULE, candidates, sampler, start, spacing)
    position, total = 0, sum(n ** (1 / 3) for n in candidates)
    for n in candidates:
        steps = plan(SCHEDULE, sampler, n, start, spacing)
        here = slice(position, position + n)
        assert table.t[here].tolist() == [s.t for s in steps]
        assert table.lam[here].tolist() == [s.lam for s in steps]
        assert (
            table.probability[here].sum() == pytest.approx(n ** (1 / 3) / total)
            and np.ptp(table.probability[here]) == 0
        )
        position += n
    assert position == len(table.t) and table.probability.sum() == pytest.approx(1.0)


def test_uniform_table_is_proxdm_floor_rule():
    table = TimeTable(SCHEDULE, [8], "hybrid")
    u = np.random.default_rng(0).uniform(size=500)
    t = np.floor(u * 8) / 8
    lam = {round(a, 9): b for a, b in zip(table.t, table.lam)}
    assert max(table.t) == 1 - 1 / 8
    for value in t:
        assert lam[round(value, 9)] == pytest.approx(SCHEDULE.integral(value, value + 1 / 8), abs=1e-12)


def test_draws_follow_the_table():
    table = TimeTable(SCHEDULE, [2, 4], "hybrid")
    times, lams = table.draw(np.random.default_rng(1), 60_000)
    assert times.dtype == lams.dtype == torch.float32 and times.shape == (60_000,)
    for t, lam, p in zip(table.t, table.lam, table.probability):
        hits = ((times == np.float32(t)) & (lams == np.float32(lam))).double().mean()
        assert float(hits) == pytest.approx(p, abs=5 * math.sqrt(p / 60_000))


def test_impossible_backward_candidate():
    with pytest.raises(ValueError, match="num_inference_steps=5"):
        TimeTable(SCHEDULE, [5, 10], "backward")


@pytest.mark.parametrize("t, lam", [(0.0, 0.1), (0.3, 0.5), (0.9, 2.0)])
def test_corrupt_moments_and_the_l2_fact(t, lam):
    """Least squares of n2 on y is the prox residual for a Gaussian p_0. Inputs have exact moments: no tolerance."""
    target, rows = Gaussian(0.4, 0.3), 1000
    n = exact_normals(rows, 3)
    x0 = target.mean + target.std * n[:, :1]
    times, lams = torch.full((rows,), t, dtype=torch.float64), torch.full((rows,), lam, dtype=torch.float64)
    y = corrupt(SCHEDULE, x0, times, lams, n[:, 1:2], n[:, 2:])
    ab = alpha_bar(t)
    assert float(y.mean()) == pytest.approx(math.sqrt(ab) * 0.4, abs=1e-12)
    assert float(y.var(correction=0)) == pytest.approx(ab * 0.09 + 1 - ab + lam, abs=1e-12)
    design = torch.cat([torch.ones_like(y), y], 1)
    weights = torch.linalg.lstsq(design, n[:, 2:]).solution
    probe = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    fitted = weights[0] + weights[1] * probe
    assert torch.allclose(fitted, (probe - target.prox(probe, t, lam)) / math.sqrt(lam), atol=1e-11)


@pytest.mark.parametrize("t, lam", [(0.0, 0.1), (0.3, 0.5), (0.9, 2.0)])
def test_expected_noise_is_what_y_and_x0_tell_of_n2(t, lam):
    """It is the least squares of n2 on y and x0, with exact moments.

    Its own least squares on y alone are those of n2, so the minimiser is the same.
    """
    n = exact_normals(1000, 3)
    x0 = 0.4 + 0.3 * n[:, :1]
    times, lams = torch.full((1000,), t, dtype=torch.float64), torch.full((1000,), lam, dtype=torch.float64)
    y = corrupt(SCHEDULE, x0, times, lams, n[:, 1:2], n[:, 2:])
    target = expected_noise(SCHEDULE, y, x0, times, lams)
    both = torch.cat([y, x0], 1)
    assert torch.allclose(both @ torch.linalg.lstsq(both, n[:, 2:]).solution, target, atol=1e-11)
    alone = torch.cat([torch.ones_like(y), y], 1)
    fits = [torch.linalg.lstsq(alone, wanted).solution for wanted in (target, n[:, 2:])]
    assert torch.allclose(*fits, atol=1e-11)
    left = [float((wanted - alone @ fit).var(correction=0)) for wanted, fit in zip((target, n[:, 2:]), fits)]
    ab, total = alpha_bar(t), alpha_bar(t) * 0.09 + 1 - alpha_bar(t) + lam
    assert left == pytest.approx([lam * ab * 0.09 / ((1 - ab + lam) * total), 1 - lam / total], rel=1e-9)


@pytest.mark.parametrize("zeta", [None, math.inf])
def test_weighed_by_level_a_clean_prediction_costs_as_prox_what_it_costs_as_score(zeta):
    """The same wrong clean prediction of the same noisy images, told to matching at (t, lam) and to denoising score
    matching, which is matching at t = 0, at the noise level of the whole."""
    x0, wrong, n1, n2 = torch.randn(4, 6, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    lam = torch.tensor([0.4, 0.01, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    row = lambda number: number.reshape(-1, 1, 1, 1)  # noqa: E731
    y = corrupt(SCHEDULE, x0, t, lam, n1, n2)
    ab = torch.tensor([alpha_bar(float(time)) for time in t], dtype=torch.float64)
    level = (1 - ab + lam) / ab
    as_prox = row(lam).sqrt() * (y - row(ab).sqrt() * wrong) / row(1 - ab + lam)
    as_score = (y / row(ab).sqrt() - wrong) / row(level).sqrt()
    prox = matching_loss(as_prox, expected_noise(SCHEDULE, y, x0, t, lam), zeta)
    clean, nothing = y / row(ab).sqrt(), torch.zeros_like(t)
    score = matching_loss(as_score, expected_noise(SCHEDULE, clean, x0, nothing, level), zeta)
    for power in (0.0, 0.5, 1.0):
        weighed = level_weight(SCHEDULE, t, lam, power, zeta) * prox
        assert torch.allclose(weighed, level**power * score, rtol=1e-10)
        assert torch.allclose(level_weight(SCHEDULE, nothing, lam, power, zeta), lam**power, rtol=1e-12)


def test_corrupt_takes_one_time_per_row():
    x0 = torch.ones(2, 3, 4, 4)
    y = corrupt(SCHEDULE, x0, torch.tensor([0.0, 0.5]), torch.tensor([0.0, 4.0]), torch.zeros_like(x0), x0)
    assert torch.allclose(y[0], x0[0]) and torch.allclose(y[1], x0[1] * (alpha_bar(0.5) ** 0.5 + 2))


def test_losses_against_the_formula():
    eps, n2 = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64).unbind(0)
    for i in range(5):
        difference = (eps[i] - n2[i]).numpy().ravel()
        assert float(matching_loss(eps, n2)[i]) == pytest.approx(np.abs(difference).mean(), rel=1e-12)
        for zeta in (2.0, 1.0):
            expected = 1 - math.exp(-np.mean(difference**2) / zeta**2)
            assert float(matching_loss(eps, n2, zeta)[i]) == pytest.approx(expected, rel=1e-12)
        assert float(matching_loss(eps, n2, math.inf)[i]) == pytest.approx(np.mean(difference**2), rel=1e-12)
    assert torch.equal(matching_loss(n2, n2, 1.0), torch.zeros(5, dtype=torch.float64))
