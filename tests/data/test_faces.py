import itertools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rlproxi.config.loading import build_config
from rlproxi.data import faces
from rlproxi.data.faces import ATTRIBUTES, caption_of, labels, parse_caption, portrait, render
from rlproxi.data.prompts import heldout_prompts, training_prompts

PLAIN = {
    "skin": "tan",
    "hair_color": "brown",
    "hair_style": "short",
    "mouth": "smiling",
    "glasses": "none",
    "hat": "none",
    "background": "gray",
    "hand": "none",
}


def claimed(attributes: dict[str, str]) -> dict[str, str]:
    """What a caption says: everything, but a hand only where there is one."""
    return {k: v for k, v in attributes.items() if k != "hand" or v != "none"}


def posed(attributes: dict[str, str], index: int = 3) -> faces.Portrait:
    return replace(portrait(0, index), attributes={**PLAIN, **attributes})


def test_the_caption_says_every_attribute_and_parses_back():
    names = [name for name in ATTRIBUTES if name not in ("skin", "hand")]
    for values in itertools.product(*(ATTRIBUTES[name] for name in names)):
        attributes = {**PLAIN, **dict(zip(names, values))}
        assert parse_caption(caption_of(attributes)) == claimed(attributes)
    for i in range(300):
        drawn = portrait(7, i, 0.5)
        assert drawn.caption == caption_of(drawn.attributes)
        assert parse_caption(drawn.caption) == claimed(drawn.attributes)
        assert parse_caption(drawn.caption.upper()) == claimed(drawn.attributes)


def test_captions_read_as_english():
    assert caption_of({**PLAIN, "background": "orange", "hand": "one"}) == (
        "a smiling person with tan skin, short brown hair, no glasses and no hat, on an orange background, "
        "raising a hand with one finger"
    )
    assert caption_of({**PLAIN, "hat": "red", "hand": "five"}).endswith(
        "a red hat, on a gray background, raising a hand with five fingers"
    )


def test_silence_claims_nothing_and_is_labelled_minus_one():
    assert parse_caption("a person in the rain") == {}
    assert (labels({}) == -1).all()
    partial = labels(parse_caption("a frowning person with sunglasses"))
    assert dict(zip(ATTRIBUTES, partial)) == {**dict.fromkeys(ATTRIBUTES, -1), "mouth": 1, "glasses": 2}
    full = labels(PLAIN)
    assert [ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, full)] == [PLAIN[name] for name in ATTRIBUTES]
    assert full.dtype == np.int64


def test_a_portrait_is_the_same_whoever_draws_it():
    together, captions, classes = faces.batch(5, np.arange(40))
    other, _, _ = faces.batch(5, np.array([39, 3]))
    assert np.array_equal(other, together[[39, 3]])
    for i in (0, 31, 32, 39):  # around the edge of a chunk of 32
        alone = portrait(5, i)
        assert np.array_equal(render([alone])[0], together[i]) and alone.caption == captions[i]
        assert np.array_equal(labels(alone.attributes), classes[i])


def test_every_seed_and_index_is_a_portrait_of_its_own():
    images = np.concatenate([faces.batch(seed, np.arange(20))[0] for seed in (1, 2, 2**62)])
    assert len({image.tobytes() for image in images}) == 60


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_hand_fraction_is_the_share_of_raised_hands(fraction):
    drawn = [portrait(11, i, fraction).attributes["hand"] for i in range(2000)]
    share = np.mean([value != "none" for value in drawn])
    assert share == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 2000) ** 0.5 + 1e-12)
    if fraction == 1:  # all finger counts are as likely
        counts = [drawn.count(value) for value in ATTRIBUTES["hand"][1:]]
        assert max(abs(n - 400) for n in counts) < 5 * (2000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_of_every_attribute_can_be_seen(name):
    """Same pose, one attribute changed: a good number of pixels differ by more than a shade."""
    for index in range(4):
        looks = {value: render([posed({name: value}, index)])[0].astype(int) for value in ATTRIBUTES[name]}
        for a, b in itertools.combinations(looks, 2):
            visible = (np.abs(looks[a] - looks[b]).max(-1) > 30).sum()
            assert visible >= 8, f"{name}: {a} and {b} differ in {visible} pixels of 1024"


@pytest.mark.parametrize("size", [16, 32, 64])
def test_sizes_show_the_same_picture(size):
    drawn = [portrait(3, i, 0.5) for i in range(4)]
    images = render(drawn, size)
    assert images.shape == (4, size, size, 3) and images.dtype == np.uint8
    large = render(drawn, 128).reshape(4, size, 128 // size, size, 128 // size, 3).mean((2, 4))
    assert np.abs(large - images).mean() < 8


def test_more_fingers_show_more_skin():
    for index, skin in itertools.product(range(4), faces.SKIN):
        pictures = [render([posed({"hand": hand, "skin": skin}, index)], 64)[0] for hand in ATTRIBUTES["hand"][1:]]
        shade = 0.92 + 0.16 * portrait(0, index).pose[3]
        color = np.array(faces.SKIN[skin]) * shade
        areas = [(np.abs(picture[:, 32:] - color).max(-1) < 8).sum() for picture in pictures]
        assert all(b - a >= 5 for a, b in pairwise(areas)), areas


def test_no_heldout_caption_is_ever_a_training_prompt():
    config = build_config({"evaluate": {"prompts": 128}})
    held = heldout_prompts(config)[1]
    assert len(set(held)) == 128
    trained = {caption for step in range(100) for caption in training_prompts(config, step)[1]}
    assert len(trained) > 1000 and not trained & set(held)


def test_training_and_heldout_prompts_come_from_collections_apart():
    config = build_config({"rl": {"prompts_per_step": 16}, "evaluate": {"prompts": 24}})
    indices, prompts = training_prompts(config, 3)
    assert (indices, prompts) == training_prompts(config, 3) and indices == list(range(48, 64))
    assert len(prompts) == 16 and not set(indices) & set(training_prompts(config, 4)[0])
    held_indices, held = heldout_prompts(config)
    assert (held_indices, held) == heldout_prompts(config) and len(held) == 24
    same_indices = training_prompts(config, 0)[1] + training_prompts(config, 1)[1]
    assert sum(a == b for a, b in zip(held, same_indices)) <= 1  # not the same portraits under another name
    other = build_config({"run": {"seed": 1}})
    assert training_prompts(other, 3)[1] != prompts and heldout_prompts(other)[1] != held


def test_a_longer_evaluation_extends_a_shorter_one():
    short, long = (heldout_prompts(build_config({"evaluate": {"prompts": n}}))[1] for n in (8, 16))
    assert long[:8] == short
