import numpy as np
import pytest
import torch

from rlproxi.data import degradations, faces
from rlproxi.data.degradations import KINDS, degrade, degraded, draw_strengths, quality, spoil

FLAT = np.full((1, 32, 32, 3), 200, np.uint8)


def portraits(count: int) -> np.ndarray:
    return faces.batch(5, np.arange(count))[0]


def alone(kind: str, strength: float, images: np.ndarray) -> np.ndarray:
    strengths = np.zeros((len(images), len(KINDS)), np.float32)
    strengths[:, KINDS.index(kind)] = strength
    return degrade(images, strengths, [np.random.default_rng(i) for i in range(len(images))])


def test_strengths_are_none_or_one_to_three():
    drawn = np.stack([draw_strengths(np.random.default_rng(i), 0.7) for i in range(4000)])
    count = (drawn != 0).sum(1)
    assert set(count) == {0, 1, 2, 3}
    assert (count == 0).mean() == pytest.approx(0.3, abs=0.03)
    sizes = np.abs(drawn[drawn != 0])
    assert sizes.min() >= 0.3 and sizes.max() <= 1 and (drawn[drawn != 0] > 0).mean() == pytest.approx(0.5, abs=0.03)


def test_quality_is_one_for_a_clean_portrait_and_falls_with_each_kind():
    assert quality(np.zeros((1, 5))) == 1
    assert quality(np.array([[0.5, -0.5, 0, 0, 0]])) == pytest.approx(np.exp(-1))


def test_each_kind_alone_by_its_closed_form():
    images = portraits(8)
    assert np.array_equal(alone("light", 0.0, images), images)
    # 0.5 + 0.35 (200 / 255 - 0.5) + 0.2 in [0, 255]
    assert (alone("light", 1.0, FLAT) == round(255 * (0.5 + 0.35 * (200 / 255 - 0.5) + 0.2))).all()
    for kind in ("tilt", "shift", "blur"):  # of a flat image nothing can be seen
        assert np.abs(alone(kind, 1.0, FLAT).astype(int) - 200).max() <= 1
    noise = alone("noise", 1.0, np.full((16, 32, 32, 3), 128, np.uint8)).astype(float) / 255
    assert noise.std() == pytest.approx(0.06, rel=0.05)


def test_a_tilt_keeps_the_centre_and_a_blur_the_sum():
    image = np.zeros((1, 33, 33, 3), np.uint8)
    image[0, 16, 16] = 255
    tilted = alone("tilt", 1.0, image)
    assert np.unravel_index(tilted[0, ..., 0].argmax(), (33, 33)) == (16, 16)
    # exp(-d^2 / 2) over seven taps in each direction
    taps = np.exp(-0.5 * (np.arange(-3, 4) * 32 / 33) ** 2)
    blurred = alone("blur", 1.0, image)[0, 13:20, 13:20, 0] / 255
    assert np.abs(blurred - np.outer(taps, taps) / taps.sum() ** 2).max() < 0.003


def test_a_shift_moves_by_its_share_of_the_width():
    image = np.zeros((1, 40, 40, 3), np.uint8)
    image[0, 18:22, 18:22] = 255
    moved = alone("shift", 1.0, image)[0, ..., 0].astype(float)
    rows, columns = np.indices(moved.shape)
    centre = np.array([(moved * rows).sum(), (moved * columns).sum()]) / moved.sum()
    assert np.linalg.norm(centre - 19.5) == pytest.approx(0.15 * 40, abs=0.1)


def test_a_portrait_depends_on_its_own_index_alone():
    images, indices = portraits(12), np.arange(12)
    whole, strengths = degraded(images, 3, indices, 0.7)
    for part in ([4], [9, 2, 4]):
        some, own = degraded(images[part], 3, indices[part], 0.7)
        assert np.array_equal(some, whole[part]) and np.array_equal(own, strengths[part])
    clean = ~strengths.any(1)
    assert 0 < clean.sum() < 12 and np.array_equal(whole[clean], images[clean])


def test_batches_of_portraits_are_degraded_where_asked():
    clean, captions, labels = faces.batch(5, np.arange(16))
    some, same_captions, same_labels = faces.batch(5, np.arange(16), degraded=1.0)
    assert captions == same_captions and np.array_equal(labels, same_labels)
    assert (some != clean).any((1, 2, 3)).all()


def test_spoilt_images_have_a_grid_or_a_ghost_of_the_strength_that_is_told():
    pixels = torch.full((4000, 3, 16, 16), 0.5)
    images, strengths = spoil(pixels, np.random.default_rng(0))
    changed = (images != pixels).flatten(1).any(1)
    assert torch.equal(changed, strengths >= 0.1) or (strengths[changed] > 0).all()
    assert changed.float().mean() == pytest.approx(0.2, abs=0.03)  # a ghost of the same flat image is not seen
    largest = (images - 0.5).abs().flatten(1).amax(1)
    # Rows and columns together reach twice the amplitude; the strength is ten times the amplitude, and 2 a ghost's.
    assert largest.max() <= 0.24 + 1e-6 and images.min() >= 0 and images.max() <= 1
    assert degradations.KINDS == ("light", "tilt", "shift", "blur", "noise")
