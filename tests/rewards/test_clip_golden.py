"""The CLIP scorers against their authors' own code: tests/crosscheck/clip_family.py wrote what is compared here."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import clip as fixtures
from rlproxi.rewards.aesthetic import Aesthetic
from rlproxi.rewards.base import to_pixels
from rlproxi.rewards.clip import longest_side, shortest_side
from rlproxi.rewards.clip_score import ClipScore
from rlproxi.rewards.clip_text import load_tokens, open_clip_clean
from rlproxi.rewards.hpsv2 import HPSv21
from rlproxi.rewards.pickscore import PickScore

GOLDEN = np.load(Path(__file__).parent / "golden" / "clip_family.npz")
NAMES = GOLDEN["names"].tolist()
PAIRS = [(name, fixtures.PROMPTS[i]) for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def hpsv2(files):
    return HPSv21(**files["hpsv2.1"])


@pytest.fixture(scope="module")
def pickscore(files):
    return PickScore(**files["pickscore"])


@pytest.fixture(scope="module")
def aesthetic(files):
    return Aesthetic(**files["aesthetic"])


def pixels(name: str) -> torch.Tensor:
    return to_pixels(fixtures.image(name)[None])


def scores(scorer) -> np.ndarray:
    return np.concatenate([scorer.score(fixtures.image(name)[None], [prompt]) for name, prompt in PAIRS])


@pytest.mark.parametrize(
    "which, transform",
    [
        ("hpsv2", longest_side),
        ("transformers", lambda x: shortest_side(x, crop_down=True)),
        ("aesthetic", shortest_side),
    ],
)
def test_preprocessing_is_the_authors(which, transform):
    ours = np.concatenate([fixtures.strided(transform(pixels(name)).numpy()) for name in NAMES])
    theirs = GOLDEN[f"{which}.images"]
    assert np.abs(ours - theirs)[:, :-3].max() < 1e-5
    assert np.abs(ours - theirs)[:, -3:].max() < 1e-3  # sums over all 150,528 values


def test_the_transforms_are_not_interchangeable():
    """What the comparison above would miss if the golden images were all alike."""
    hps, clip, openai = (GOLDEN[f"{which}.images"][:, :-3] for which in ("hpsv2", "transformers", "aesthetic"))
    photo, wide = NAMES.index("photo"), NAMES.index("wide")
    assert np.abs(hps[photo] - clip[photo]).max() > 1 and np.abs(hps[wide] - clip[wide]).max() > 1
    assert np.abs(clip - openai).max() > 0.1  # of an odd number of pixels, they cut another half


def test_tokens_are_the_authors(files):
    for name in (files["hpsv2"]["tokenizer"], files["pickscore"]["tokenizer"]):  # merges, a transformers folder
        assert np.array_equal(load_tokens(name, open_clip_clean)(fixtures.PROMPTS).numpy(), GOLDEN["hpsv2.tokens"])


def test_hpsv2_features_are_the_authors(hpsv2):
    with torch.no_grad():
        features = torch.cat([hpsv2.image_features(longest_side(pixels(name))) for name in NAMES]).numpy()
    assert np.abs(features - GOLDEN["hpsv2.image_features"]).max() < 1e-5
    texts = hpsv2.text_features(fixtures.PROMPTS).numpy()
    assert np.abs(texts - GOLDEN["hpsv2.text_features"]).max() < 1e-5


def test_hpsv2_scores_are_the_authors(hpsv2):
    assert np.abs(scores(hpsv2) - GOLDEN["hpsv2.scores"]).max() < 1e-4
    assert np.ptp(GOLDEN["hpsv2.scores"]) > 0.2


def test_pickscore_is_the_authors(pickscore):
    with torch.no_grad():
        images = [shortest_side(pixels(name), crop_down=True) for name in NAMES]
        features = torch.cat([pickscore.image_features(image) for image in images]).numpy()
    assert np.abs(features - GOLDEN["transformers.image_features"]).max() < 1e-5
    texts = pickscore.text_features([prompt for _, prompt in PAIRS]).numpy()
    assert np.abs(texts - GOLDEN["transformers.text_features"]).max() < 1e-5
    assert np.abs(scores(pickscore) - GOLDEN["pick.scores"]).max() < 1e-3  # a hundred times a cosine
    assert np.ptp(GOLDEN["pick.scores"]) > 10


def test_clip_score_is_torchmetrics(files):
    found = scores(ClipScore(**files["clip"]))
    assert np.abs(found - GOLDEN["clip.scores"]).max() < 1e-3
    assert found[0] == 0 and GOLDEN["pick.scores"][0] < 0  # a negative cosine


def test_aesthetic_is_the_authors(aesthetic):
    with torch.no_grad():
        features = torch.cat([aesthetic.image_features(shortest_side(pixels(name))) for name in NAMES]).numpy()
    assert np.abs(features - GOLDEN["aesthetic.features"]).max() < 1e-5
    assert np.abs(scores(aesthetic) - GOLDEN["aesthetic.scores"]).max() < 1e-4
    assert np.ptp(GOLDEN["aesthetic.scores"]) > 0.02
