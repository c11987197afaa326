"""ProxDM's published formulas (arXiv 2507.08956: Algorithms 1 and 2, the matching loss of section 4) on fixed inputs.

The numbers were computed once with forty decimal digits by a script of these formulas alone, which shares no line with
the package: p_0 = N(0.4, 0.3^2) with its exact prox, beta(t) = 0.1 + 19.9 t, the uniform grid, and the noises below in
the order k = N..1.
"""

import pytest
import torch

from fixtures.closed_form import Gaussian
from rlproxi.proximal.matching import corrupt, matching_loss
from rlproxi.proximal.samplers import plan, sample
from rlproxi.proximal.schedule import VPSchedule

NOISES = [0.3, -1.1, 0.7, 0.05, -0.4, 1.6, -0.9, 0.25, 0.8, -0.35]
#: sampler, N, T, x_N -> x_{N-1}, x_0
GOLDEN = [
    ("hybrid", 4, 1.0, 0.5, 0.431261078849599, 0.419263026109486),
    ("hybrid", 4, 1.0, -1.2, -0.574215173631822, 0.379057753234837),
    ("backward", 10, 1.0, 0.5, 0.474945587078689, 0.451340527825745),
    ("backward", 10, 1.0, -1.2, -0.396514225882113, 0.448280813940436),
    ("ode", 4, 0.8, 0.5, 0.531150882395331, 0.484819706694100),
    ("ode", 4, 0.8, -1.2, -1.144947671425088, 0.133104976344990),
]


@pytest.mark.parametrize("name, n, start, x, first, last", GOLDEN)
def test_samplers(name, n, start, x, first, last):
    noises = iter(NOISES)
    x = torch.tensor([[x]], dtype=torch.float64)
    run = sample(
        Gaussian(0.4, 0.3).prox,
        plan(VPSchedule(), name, n, start),
        x,
        noise=lambda k, like: torch.full_like(like, next(noises)),
        keep_chain=True,
    )
    assert float(run.prox[0]) == pytest.approx(first, abs=2e-15) and float(run.x) == pytest.approx(last, abs=2e-14)


def test_the_matching_loss_and_its_input():
    """t = 0.4, lam = gamma to the next of ten uniform times; x_0 = 0.2, n_1 = -0.7, n_2 = 1.3."""
    schedule, one = VPSchedule(), torch.ones(1, 1, dtype=torch.float64)
    lam = schedule.integral(0.4, 0.5)
    assert lam == pytest.approx(0.9055, abs=1e-15)
    t, lam = torch.tensor([0.4], dtype=torch.float64), torch.tensor([lam], dtype=torch.float64)
    assert float(corrupt(schedule, 0.2 * one, t, lam, -0.7 * one, 1.3 * one)) == pytest.approx(
        0.697647712544604, abs=2e-15
    )
    error = torch.tensor([[0.3, -0.5, 0.1]], dtype=torch.float64)
    for zeta, expected in ((None, 0.3), (2.0, 0.028745424786327), (1.0, 0.110118229011976)):
        assert float(matching_loss(error, torch.zeros_like(error), zeta)) == pytest.approx(expected, abs=1e-15)
