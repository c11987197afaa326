"""What a prox *is*: optimality, projection onto point masses, and where the matching loss leads."""

import math

import numpy as np
import pytest
import torch

from fixtures.closed_form import Gaussian, Mixture
from rlproxi.proximal.matching import matching_loss
from rlproxi.proximal.samplers import plan, sample
from rlproxi.proximal.schedule import VPSchedule

MIXTURE = Mixture((0.3, 0.5, 0.2), (-1.0, 0.4, 1.2), 0.15)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0])
def test_mixture_prox_meets_the_optimality_condition(t, lam):
    for y in np.linspace(-2, 2, 9):
        x = MIXTURE.prox(y, t, lam)
        assert (y - x) / lam == pytest.approx(-MIXTURE.score(x, t), abs=2e-4 * (1 + 1 / lam))
        grid = np.linspace(-3, 3, 2001)
        cost = [0.5 * (g - y) ** 2 - lam * MIXTURE.log_density(g, t) for g in grid]
        assert 0.5 * (x - y) ** 2 - lam * MIXTURE.log_density(x, t) <= min(cost) + 1e-12  # global, not just local


def test_one_component_is_the_gaussian_closed_form():
    one, gaussian = Mixture((1.0,), (0.4,), 0.3), Gaussian(0.4, 0.3)
    for t, lam, y in ((0.0, 0.1, -1.0), (0.4, 1.0, 2.0), (0.9, 2.0, 0.3)):
        assert one.prox(y, t, lam) == pytest.approx(gaussian.prox(y, t, lam), abs=1e-6)


@pytest.mark.parametrize("lam", [1e-3, 0.1, 2.0])
def test_equal_point_masses_at_t0_are_projected_onto(lam):
    """As std -> 0 every mass has the same -lam ln p at its peak, so the distance decides, whatever lam."""
    points = Mixture((1 / 3, 1 / 3, 1 / 3), (-1.0, 0.4, 1.2), 1e-5)
    for y in (-1.7, -0.5, -0.2, 0.1, 0.7, 0.9, 3.0):
        nearest = min(points.means, key=lambda m: abs(m - y))
        assert points.prox(y, 0.0, lam) == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("lam", [1e-3, 0.1, 2.0])
def test_unequal_point_masses_are_projected_onto_with_their_weights(lam):
    """argmin 1/2 (m_i - y)^2 - lam ln w_i: the nearest point only for equal weights or lam -> 0."""
    points = Mixture((0.3, 0.5, 0.2), (-1.0, 0.4, 1.2), 1e-5)
    for y in (-1.7, -0.5, -0.2, 0.1, 0.7, 0.9, 3.0):
        cost = [0.5 * (m - y) ** 2 - lam * math.log(w) for w, m in zip(points.weights, points.means)]
        assert points.prox(y, 0.0, lam) == pytest.approx(points.means[int(np.argmin(cost))], abs=1e-6)


def test_the_sampler_ends_on_a_point_mass():
    points = Mixture((0.3, 0.5, 0.2), (-1.0, 0.4, 1.2), 1e-5)

    def prox(y, t, lam, cond):
        return torch.tensor([[points.prox(float(v), t, lam)] for v in y], dtype=y.dtype)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, dtype=torch.float64, generator=generator)
    noise = lambda k, like: torch.randn(like.shape, dtype=like.dtype, generator=generator)  # noqa: E731
    out = sample(prox, plan(VPSchedule(), "hybrid", 10), x, noise=noise).x
    distance = (out - torch.tensor(points.means, dtype=torch.float64)).abs().min(1)
    assert float(distance.values.max()) < 1e-6 and len(set(distance.indices.tolist())) > 1


def test_zeta_to_zero_leads_to_the_nearest_point_and_zeta_to_infinity_to_the_mean():
    """Expected loss at one y, over the exact posterior of n2, minimised over the answer by brute force."""
    points, lam, y = torch.tensor([-1.0, 0.4, 1.2], dtype=torch.float64), 0.8, 0.85
    n2 = (y - points) / math.sqrt(lam)
    posterior = torch.softmax(-0.5 * n2**2, 0)  # equal weights: the nearest point is the likeliest
    answers = torch.linspace(-3, 4, 14_001, dtype=torch.float64)

    def best(zeta):
        loss = sum(p * matching_loss(answers[:, None], n.expand(len(answers), 1), zeta) for p, n in zip(posterior, n2))
        return y - math.sqrt(lam) * float(answers[loss.argmin()])

    nearest, mean = 1.2, float((posterior * points).sum())
    assert best(0.05) == pytest.approx(nearest, abs=1e-3)
    assert best(1e3) == pytest.approx(mean, abs=1e-3)
    assert best(None) == pytest.approx(0.4, abs=1e-3)  # L1: the posterior median
