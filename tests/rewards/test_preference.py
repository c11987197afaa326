import numpy as np
import pytest
import torch

from rlproxi.algorithms.preparation import train_scorer
from rlproxi.config.loading import build_config
from rlproxi.data import degradations, faces
from rlproxi.rewards import build, facts, is_differentiable
from rlproxi.rewards.preference import PreferenceModel, QualityModel, bradley_terry_loss, quality_loss

BOTH = {"preference": PreferenceModel, "quality": QualityModel}
both = pytest.mark.parametrize("name", list(BOTH))


def saved(name: str, tmp_path) -> str:
    torch.manual_seed(0)
    file = tmp_path / f"{name}.safetensors"
    BOTH[name](16, width=8).save(file)
    return str(file)


@both
def test_a_scorer_finds_its_networks_sizes_in_the_file(name, tmp_path):
    scorer = build(name, {"path": saved(name, tmp_path)})
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    scores = scorer.score(images, ["anything"] * 5)
    assert scores.shape == (5,) and scores.dtype == np.float32 and np.isfinite(scores).all()
    assert np.allclose(scores[2:3], scorer.score(images[2:3], ["something else"]), atol=1e-5), "its own image alone"
    assert scorer.score(images.repeat(2, 1).repeat(2, 2), [""] * 5).shape == (5,), "other sizes are resized"
    assert facts(name).prepared_as == name and is_differentiable(name)


@both
def test_the_gradient_is_that_of_finite_differences(name, tmp_path):
    scorer = build(name, {"path": saved(name, tmp_path)})
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(scorer.rewards(pixels, [""]).sum(), pixels)
    with torch.no_grad():
        ahead, behind = (scorer.rewards(pixels + step * direction, [""]) for step in (1e-2, -1e-2))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-2, rel=0.02)


@both
def test_a_missing_or_other_file_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors' is missing: the stage 'prepare' makes it"):
        build(name, {"path": str(tmp_path / "gone.safetensors")})
    other = next(other for other in BOTH if other != name)
    with pytest.raises(ValueError, match=f"is not a usable {BOTH[name].title}"):
        build(name, {"path": saved(other, tmp_path)})


def test_quality_is_a_probability_and_preference_is_not(tmp_path):
    white = np.full((2, 16, 16, 3), 255, np.uint8)
    quality = build("quality", {"path": saved("quality", tmp_path)}).score(white, ["", ""])
    assert ((quality > 0) & (quality < 1)).all()


def test_bradley_terry_is_the_likelihood_of_the_comparisons():
    scores, strengths = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.7])
    prefers = torch.sigmoid(torch.tensor(0.5 / 0.25)).item()  # how often the first is preferred
    for draw, won in ((prefers - 0.01, True), (prefers + 0.01, False)):
        loss = bradley_terry_loss(scores, strengths, torch.full((2, 2), draw))
        odds = torch.sigmoid(torch.tensor(1.5))
        assert loss.item() == pytest.approx(-torch.log(odds if won else 1 - odds).item(), rel=1e-5)


def test_the_quality_loss_is_zero_at_the_quality_itself():
    strengths = torch.tensor([0.1, 0.5, 2.0])
    assert quality_loss(torch.logit(torch.exp(-strengths)), strengths).item() == pytest.approx(0, abs=1e-10)
    assert quality_loss(torch.logit(torch.exp(-strengths - 0.4)), strengths).item() == pytest.approx(
        0.4 - 0.1, rel=1e-4
    )


def test_both_are_trained_to_tell_clean_portraits_from_spoilt_ones(tmp_path):
    sizes = ["data.size=16", "prepare.samples=512", "prepare.classifier_steps=60", "prepare.batch_size=64"]
    config = build_config({}, sizes)
    clean = faces.batch(77, np.arange(64), 16)[0]
    poor = degradations.degraded(clean, 77, np.arange(64), 1.0)[0]
    told = {name: train_scorer(config, name, tmp_path / f"{name}.safetensors", lambda *_: None) for name in BOTH}
    assert told["preference"].startswith("prefers the better of two new portraits in")
    assert told["quality"].endswith("off the quality of new portraits on average")
    for name in BOTH:
        scorer = build(name, {"path": str(tmp_path / f"{name}.safetensors")})
        better = scorer.score(clean, [""] * 64) > scorer.score(poor, [""] * 64)
        assert better.mean() > 0.8, name
