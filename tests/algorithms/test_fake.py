"""The fake score's loss: what it is asked for, and of what there is nothing left to learn."""

import math

import pytest
import torch

from rlproxi.algorithms.fake import LevelSampler, fake_loss
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import build_config

REQUEST = SampleRequest("train", 3, ("a face",) * 64, tuple(range(64)), 1)


def left(loss: str, target: str) -> tuple[float, float]:
    """(the loss of the best answer where all samples are 0, what it has to be)."""
    config = build_config(
        {
            "run": {"algorithm": "didr"},
            "sampler": {"num_inference_steps": 1, "guidance_scale": 1.0},
            "pretrain": {"target": target, "candidates": [3, 4, 6, 8, 16]},
            "fake": {"loss": loss},
        }
    )
    levels, expected = LevelSampler(config), []

    def best(y, t, lam, text):
        lam, hidden = lam.reshape(-1, 1, 1, 1), 1 - levels.schedule.alpha_bar(t).reshape(-1, 1, 1, 1)
        open_part = hidden / (hidden + lam)  # of n2's variance
        expected.append(float((open_part if loss == "l2" else math.sqrt(2 / math.pi) * open_part.sqrt()).mean()))
        return lam.sqrt() * y / (hidden + lam)

    found = fake_loss(best, levels, REQUEST, 0, torch.zeros(64, 3, 16, 16), None).item()
    return found, expected[0] if target == "noise" else 0.0


@pytest.mark.parametrize("target", ["noise", "expected"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_fake_score_is_asked_for_what_pretraining_asks_for(loss, target):
    found, expected = left(loss, target)
    assert found == pytest.approx(expected, rel=0.02, abs=1e-5)
