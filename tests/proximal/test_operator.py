import pytest
import torch

from fixtures.closed_form import Gaussian
from rlproxi.proximal.operator import ProximalOperator, expand


class Recorder:
    """eps = cond * y + t + lam, remembering the batch sizes it was called with."""

    def __init__(self):
        self.batches = []

    def __call__(self, y, t, lam, cond):
        self.batches.append(len(y))
        assert t.shape == lam.shape == (len(y),) and t.dtype == lam.dtype == torch.float32
        return expand(cond, y) * y + expand(t + lam, y)


def guided(network, w):
    return ProximalOperator(network, w, with_null=lambda cond: torch.cat([cond, torch.full_like(cond, 0.25)]))


def test_residual_form():
    network = Recorder()
    y, cond = torch.randn(3, 2, 4, 4), torch.tensor([1.0, 2.0, 3.0])
    out = ProximalOperator(network)(y, 0.5, 0.16, cond)
    assert torch.allclose(out, y - 0.4 * (expand(cond, y) * y + 0.66), atol=1e-6)


@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_guidance_is_linear_between_the_two_proxes(w):
    y, cond = torch.randn(3, 5), torch.tensor([1.0, 2.0, 3.0])
    network = Recorder()
    out = guided(network, w)(y, 0.3, 0.5, cond)
    assert network.batches == [6]
    plain = ProximalOperator(Recorder())
    prox_c, prox_null = plain(y, 0.3, 0.5, cond), plain(y, 0.3, 0.5, torch.full_like(cond, 0.25))
    assert torch.allclose(out, prox_null + w * (prox_c - prox_null), atol=1e-5)


def test_w1_is_one_forward_at_the_original_batch():
    network = Recorder()
    y, cond = torch.randn(3, 5), torch.ones(3)
    out = guided(network, 1.0)(y, 0.3, 0.5, cond)
    assert network.batches == [3] and torch.equal(out, ProximalOperator(Recorder())(y, 0.3, 0.5, cond))


def test_guidance_needs_a_null():
    with pytest.raises(AssertionError, match="guidance_scale 2.0 needs with_null"):
        ProximalOperator(Recorder(), 2.0)(torch.zeros(3, 5), 0.3, 0.5, torch.ones(3))


def test_exact_residual_gives_the_exact_prox():
    target = Gaussian(0.4, 0.3)

    def denoiser(y, t, lam, cond):
        return (y - target.prox(y, t[:, None], lam[:, None])) / lam[:, None].sqrt()

    y = torch.randn(4, 3)
    assert torch.allclose(ProximalOperator(denoiser)(y, 0.2, 0.7), target.prox(y, 0.2, 0.7), atol=1e-6)


def test_half_precision_networks_answer_in_the_dtype_of_y():
    out = ProximalOperator(lambda y, t, lam, c: y.bfloat16())(torch.randn(2, 3), 0.2, 0.25)
    assert out.dtype == torch.float32
