import json

import numpy as np
import pytest
from PIL import Image

from rlproxi.telemetry import gallery
from rlproxi.telemetry.gallery import GalleryGroup


def group(prompt: str, rewards: list[float], seed: int = 0) -> GalleryGroup:
    images = np.random.default_rng(seed).integers(0, 256, (len(rewards), 6, 4, 3), dtype=np.uint8)
    rewards = np.array(rewards, np.float32)
    return GalleryGroup(prompt, np.int64(7), images, rewards, {"hat": rewards * 2})


def test_pictures_hold_the_samples_side_by_side(tmp_path):
    groups = [group("a hat", [0.5, np.nan, 1.5]), group("é", [np.nan, np.nan], 1)]
    assert gallery.write(tmp_path, 10, 9, groups) == "samples/000010.json"
    told = json.loads((tmp_path / "samples" / "000010.json").read_text())
    assert (told["step"], told["version"]) == (10, 9)
    first, second = told["groups"]
    assert first == {
        "prompt": "a hat",
        "index": 7,
        "rewards": [0.5, None, 1.5],
        "parts": {"hat": [1.0, None, 3.0]},
        "best": 2,
        "worst": 0,
        "size": [6, 4],
        "image": "samples/000010-0.png",
    }
    assert (second["prompt"], second["best"], second["worst"], second["rewards"]) == ("é", None, None, [None, None])
    for entry, made in zip(told["groups"], groups):
        picture = np.array(Image.open(tmp_path / entry["image"]))
        height, width = entry["size"]
        for i, image in enumerate(made.images):
            assert np.array_equal(picture[:height, i * width : (i + 1) * width], image)
        assert picture.shape == (6, 4 * len(made.images), 3)
    assert not list((tmp_path / "samples").glob(".*")), "no drafts are left"


@pytest.mark.parametrize("every, due", [(0, []), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 3, 5]), (10, [0])])
def test_which_iterations_leave_a_gallery(every, due):
    assert [i for i in range(6) if gallery.due(i, every)] == due
