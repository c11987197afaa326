"""The sampler without its noise against the deterministic one."""

import math
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fixtures.generators import Encoder
from rlproxi.algorithms.base import AlgorithmStopped
from rlproxi.algorithms.guards.sampler_limit import accept, check, deviation
from rlproxi.config.loading import build_config
from rlproxi.proximal.samplers import KINDS

SAMPLERS = [
    {"name": "hybrid"},
    {"name": "ode"},
    {"name": "ddim", "eta": 0.7},
    {"name": "ddim", "eta": 1.0},
    {"name": "ddim"},
    {"name": "matched"},
    {"name": "matched", "eta": 0.6},
    {"name": "matched", "eta": 1.0},
    {"name": "euler", "eta": 1.0},
    {"name": "euler", "eta": 0.4},
    {"name": "backward", "num_inference_steps": 16},
]


def config(sampler):
    return build_config(
        {
            "run": {"stages": ["pretrain"]},
            "sampler": sampler,
            "pretrain": {"candidates": [16]},
            "evaluate": {"steps": [16]},
        }
    )


def prox(z, t, lam):
    return 0.7 * z.sin() / (1 + lam) + 0.1 * t


def test_each_step_without_its_noise_is_the_deterministic_samplers_own():
    for name, known in (
        ("hybrid", {"name": "ode"}),
        ("ddim", {"eta": 0.0}),
        ("euler", {"eta": 0.0}),
        ("matched", {"eta": 0.0}),
    ):
        s = config({"name": name, "eta": 0.0 if name == "hybrid" else 0.6}).sampler
        schedule = config({}).schedule.build()
        for one, two in zip(s.plan(schedule), s.model_copy(update=known).plan(schedule), strict=True):
            assert astuple(KINDS[name].without_noise(one)) == pytest.approx(astuple(two), abs=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_passes_with_a_network_that_is_a_function(sampler):
    c = config(sampler)
    found = deviation(c, torch.randn(2, 3, 4, 4), prox, prox)
    assert found < 1e-5
    accept(found, c)


@pytest.mark.parametrize(
    "spoil, least",
    [
        (lambda z, t, lam: prox(z, t, lam) + 0.1, 0.05),
        (lambda z, t, lam: prox(z, t, 2 * lam), 0.02),
        (lambda z, t, lam: prox(z, t, lam) * math.nan, math.inf),
    ],
)
def test_another_network_another_lam_and_nan_are_found(spoil, least):
    c = config({"name": "hybrid"})
    found = deviation(c, torch.randn(2, 3, 4, 4), spoil, prox)
    assert found >= least
    with pytest.raises(
        AlgorithmStopped,
        match=r"a noise-free step of sampler 'hybrid' is off .* \(guards.sampler_tolerance = 0.01\)"
        ".*dropout.*model.compile=false",
    ):
        accept(found, c)


def test_wrong_coefficients_are_found_without_the_network(monkeypatch):
    monkeypatch.setitem(KINDS, "hybrid", replace(KINDS["hybrid"], without_noise=lambda step: step))
    assert deviation(config({"name": "hybrid"}), torch.randn(2, 3), prox, prox) == math.inf


class Network(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(dropout)

    def forward(self, y, t, lam, cond):
        return self.dropout(self.layer(y))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_dropout_in_training_is_what_it_is_for(dropout):
    network = Network(dropout).train()
    network.layer.eval()
    parts = SimpleNamespace(
        networks={"policy": network}, encoder=Encoder(), sample_shape=(3, 4, 4), device=torch.device("cpu")
    )
    c = config({"name": "hybrid"})
    found = check(c, parts, "a face")
    assert network.dropout.training and not network.layer.training, "as it was"
    if dropout:
        with pytest.raises(AlgorithmStopped):
            accept(found, c)
    else:
        assert found < 1e-6
