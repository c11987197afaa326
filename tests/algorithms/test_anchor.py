"""AdamW towards its start: by itself, and under DeepSpeed at every ZeRO stage (one rank)."""

import copy

import pytest
import torch
from torch import nn

from actors.train.engine import Engine
from rlproxi.algorithms.anchor import AnchoredAdamW

OPTIONS = {"betas": (0.9, 0.99), "weight_decay": 0.0}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def loss_of(module, step):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return module(x).square().mean()


def by_hand(steps, anchor):
    """torch's own AdamW on the loss with the term written out."""
    module = network()
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, **OPTIONS)
    for step in range(steps):
        optimizer.zero_grad()
        distance = sum((p - p0).square().sum() for p, p0 in zip(module.parameters(), start))
        (loss_of(module, step) + anchor * distance).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def test_it_is_adamw_on_the_loss_with_the_term():
    module = network()
    optimizer = AnchoredAdamW(module.parameters(), lr=0.05, anchor=0.3, fused=True, **OPTIONS)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()
    torch.testing.assert_close(flat(module), by_hand(6, 0.3), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_hand(6, 0.3), by_hand(6, 0.0), atol=1e-3)


def test_the_start_survives_saving():
    module = network()
    optimizer = AnchoredAdamW(module.parameters(), lr=0.05, anchor=0.3, **OPTIONS)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AnchoredAdamW(module.parameters(), lr=0.05, anchor=0.3, **OPTIONS)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()
    torch.testing.assert_close(flat(module), by_hand(6, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_at_every_zero_stage_and_across_a_checkpoint(stage, process_group, tmp_path):
    def engine():
        return Engine(network(), torch.device("cpu"), stage, 1, (0.9, 0.99), 0.0, 1e9, anchor=0.3)

    made = engine()
    for step in range(6):
        if step == 3:
            made.save(tmp_path)
            made.close()
            made = engine()
            made.load(tmp_path)
        made.update(iter([(loss_of(made.module, step), {})]), 0.05)
    with made.gathered() as weights:
        ours = torch.cat([w.detach().reshape(-1) for w in weights.values()])
    torch.testing.assert_close(ours, by_hand(6, 0.3), rtol=1e-4, atol=1e-5)
    made.close()
