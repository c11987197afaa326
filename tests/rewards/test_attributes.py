"""The gradient of the reward ``attributes``; its values are tested in test_rewards.py."""

import numpy as np
import pytest
import torch

from rlproxi.rewards import TorchScorer, build, checked_params, provenance
from rlproxi.rewards.attributes import AttributeClassifier

PROMPTS = [
    "a smiling person with pale skin",
    "a frowning person on a blue background",
    "a person with a red hat and sunglasses",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "reward.safetensors"
    torch.manual_seed(3)
    AttributeClassifier(16, 8).save(path)
    return path


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("copies", [0, 1, 4])
def test_the_gradient_is_that_of_central_differences(file, copies, size):
    """In float64, along random directions: the error is that of the quadratic term, far below 1e-6."""
    scorer = build("attributes", {"path": str(file), "copies": copies, "noise": 0.2, "device": "cpu"})
    scorer.model.double()
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, size, size, dtype=torch.float64, requires_grad=True)
    scorer.rewards(pixels, PROMPTS).sum().backward()
    assert torch.isfinite(pixels.grad).all() and all(g.norm() > 1e-4 for g in pixels.grad)
    for _ in range(3):
        direction = torch.randn_like(pixels)
        # One direction for each image: its reward must not depend on the others.
        along = (pixels.grad * direction).sum((1, 2, 3))
        step = 1e-4
        with torch.no_grad():
            ahead, behind = (scorer.rewards(pixels + s * direction, PROMPTS) for s in (step, -step))
        assert torch.allclose((ahead - behind) / (2 * step), along, rtol=1e-5, atol=1e-9)


def test_score_and_rewards_are_the_same_function(file):
    scorer = build("attributes", {"path": str(file), "micro_batch": 2, "device": "cpu"})
    assert isinstance(scorer, TorchScorer) and not isinstance(build("judge", {"path": str(file)}), TorchScorer)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    rewards = scorer.rewards(pixels, PROMPTS)
    assert rewards.dtype == torch.float32 and scorer.score(images, PROMPTS) == pytest.approx(rewards.numpy(), abs=1e-6)
    whole = build("attributes", {"path": str(file), "device": "cpu"}).score(images, PROMPTS)
    assert scorer.score(images, PROMPTS) == pytest.approx(whole, abs=1e-6)
    assert torch.equal(rewards, scorer.rewards(pixels, PROMPTS))  # the noise is drawn once


@pytest.mark.parametrize("name", ["attributes", "judge"])
def test_options_of_a_torch_scorer_are_taken(file, name):
    params = {"path": str(file), "device": "cpu", "precision": "bfloat16", "micro_batch": 2}
    assert checked_params(name, params) == params
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    prompts = [PROMPTS[i % 3] for i in range(5)]
    coarse, fine = build(name, params).score(images, prompts), build(name, {"path": str(file)})
    assert build(name, {"path": str(file)}).dtype is torch.float32
    assert coarse == pytest.approx(fine.score(images, prompts), abs=0.02 if name == "attributes" else 0.51)
    assert len(provenance(fine)[str(file)]) == 64
    assert fine.score(images[:0], []).shape == (0,)


def test_images_of_another_size_are_resized_to_the_classifiers(file):
    flat = np.full((1, 40, 24, 3), 90, np.uint8)
    for name in ("attributes", "judge"):
        scorer = build(name, {"path": str(file)})
        assert scorer.score(flat, PROMPTS[:1]) == pytest.approx(scorer.score(flat[:, :16, :16], PROMPTS[:1]), abs=1e-5)
