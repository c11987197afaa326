"""bfloat16 by autocast: what a context keeps of one forward must not be missed by the next."""

import pytest
import torch
from torch import nn

from rlproxi.models import precision
from rlproxi.rewards import build
from rlproxi.rewards.attributes import AttributeClassifier


def gradients(net: nn.Module, x: torch.Tensor, without_first: bool) -> list[torch.Tensor]:
    """Gradients of a forward in bfloat16, after one without gradients in the same context, as R0 and DIDR have it."""
    net.zero_grad()
    with precision.autocast(torch.bfloat16, "cpu"):
        if without_first:
            with torch.no_grad():
                net(x)
        net(x).float().square().mean().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("caches", [precision.CACHES, False])
def test_a_forward_without_gradients_takes_none_from_the_next(caches, monkeypatch):
    monkeypatch.setattr(precision, "CACHES", caches)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(2, 3, 8, 8)
    for alone, after in zip(gradients(net, x, False), gradients(net, x, True), strict=True):
        assert after.abs().sum() > 0 and torch.equal(after, alone)


def test_a_torch_that_loses_gradients_is_known_by_it(monkeypatch):
    """A product of weights that have no history, as they are cached there; torch's generator is left alone."""
    before = torch.get_rng_state()
    assert precision.cache_keeps_gradients() == precision.CACHES
    assert torch.equal(torch.get_rng_state(), before)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, weight: mm(x, weight.detach()))
    assert not precision.cache_keeps_gradients()
    monkeypatch.setattr(precision, "CACHES", False)
    with precision.autocast(torch.bfloat16, "cpu"):
        assert not torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(
    "avx512_bf16, amx, dtype",
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_takes_bfloat16_only_where_it_is_fast(avx512_bf16, amx, dtype, tmp_path, monkeypatch):
    """A CPU with plain AVX-512, where oneDNN says that bfloat16 is supported and emulates it, computes in float32."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision.compute_dtype("auto", "cpu") is dtype
    AttributeClassifier(16, 8).save(tmp_path / "classifier.safetensors")
    params = {"path": str(tmp_path / "classifier.safetensors"), "precision": "auto", "device": "cpu"}
    assert build("attributes", params).dtype is dtype


def test_float32_is_left_alone():
    with precision.autocast(torch.float32, "cpu"):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype is torch.float32
