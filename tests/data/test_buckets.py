"""Buckets and fitting: sizes, the nearest one, what is cropped away."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fixtures.shards import smooth
from rlproxi.data.buckets import Fit, bucket_sizes, bucket_step, build_fit


@pytest.mark.parametrize("size, factor", [(16, 1), (32, 1), (64, 1), (120, 1), (256, 8), (512, 8), (768, 1), (1024, 8)])
def test_buckets_are_even_bounded_and_symmetric(size, factor):
    step = bucket_step(size, factor)
    sizes = bucket_sizes(size, step)
    assert len(set(sizes)) == len(sizes) and {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0 and h * w <= size**2 and 0.5 <= w / h <= 2
        # As large as its height allows, up to the longest ratio.
        assert w <= h or (w + step) * h > size**2 or w + step > 2 * h
    ratios = [w / h for h, w in sizes]
    assert ratios == sorted(set(ratios)) and (ratios[0], ratios[-1]) == (0.5, 2) and (size // step * step,) * 2 in sizes


def test_the_step_is_64_pixels_or_eight_latents():
    steps = {(32, 1): 8, (256, 1): 8, (256, 4): 32, (256, 8): 64, (512, 1): 64, (1024, 8): 64}
    assert {case: bucket_step(*case) for case in steps} == steps
    assert (832, 1216) in bucket_sizes(1024, 64) and (768, 1344) in bucket_sizes(1024, 64)  # SDXL's
    with pytest.raises(ValueError, match="data.size 32 is smaller than 64"):
        bucket_sizes(32, 64)
    assert build_fit(64, False, "center", 0).sizes == ((64, 64),)
    assert all(h % 48 == w % 48 == 0 for h, w in build_fit(144, True, "center", 0, 1, 48).sizes)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_nearest_bucket_loses_least_of_the_image(height, width):
    fit = build_fit(512, True, "center", 0)

    def kept(size):
        scale = max(size[0] / height, size[1] / width)
        return size[0] * size[1] / (height * width * scale**2)

    assert kept(fit.nearest(height, width)) >= max(map(kept, fit.sizes)) - 1e-12
    mirrored = fit.nearest(width, height)
    assert abs(math.log(width / height)) < 1e-9 or mirrored == fit.nearest(height, width)[::-1]


def test_centre_crop_of_a_known_picture():
    # 40 x 100 to 32 x 32: shrunk to 32 x 80, columns 24 to 56 are kept.
    image = smooth(40, 100)
    pixels, facts = build_fit(32, False, "center", 0)(image, "k")
    assert facts == (40, 100, 0, 24) and pixels.shape == (32, 32, 3) and pixels.flags.c_contiguous
    reference = np.asarray(Image.fromarray(image).resize((80, 32), Image.Resampling.LANCZOS))[:, 24:56]
    assert np.array_equal(pixels, reference)


def test_an_image_of_the_buckets_size_is_left_alone():
    image = smooth(24, 40)
    pixels, facts = build_fit(32, True, "random", 5)(image, "k")
    assert np.array_equal(pixels, image) and facts == (24, 40, 0, 0)


def test_shrinking_is_antialiased():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(build_fit(32, False, "center", 0)(stripes, "")[0].astype(int) - 127.5).max() <= 4


def test_random_crops_are_named_and_spread():
    image = smooth(32, 96)
    fit = Fit(((32, 32),), "random", seed=1)
    lefts = [fit(image, f"key{i}")[1][3] for i in range(300)]
    assert lefts == [fit(image, f"key{i}")[1][3] for i in range(300)]
    assert lefts != [Fit(((32, 32),), "random", seed=2)(image, f"key{i}")[1][3] for i in range(300)]
    assert min(lefts) >= 0 and max(lefts) <= 64
    # Uniform on 0..64: mean 32, standard deviation 18.8.
    assert abs(np.mean(lefts) - 32) < 4 * 18.8 / 300**0.5 and np.std(lefts) == pytest.approx(18.8, rel=0.15)
    left = lefts[7]
    assert np.array_equal(fit(image, "key7")[0], image[:, left : left + 32])


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["center", "random"]), st.booleans())
def test_any_image_fits(height, width, crop, buckets):
    fit = build_fit(64, buckets, crop, 3)
    pixels, (h, w, top, left) = fit(np.full((height, width, 3), 77, np.uint8), "x")
    assert pixels.shape[:2] in fit.sizes and (pixels == 77).all() and (h, w) == (height, width)
    scale = max(pixels.shape[0] / height, pixels.shape[1] / width)
    for corner, full, kept in ((top, height, pixels.shape[0]), (left, width, pixels.shape[1])):
        assert 0 <= corner <= round(full * scale) - kept + 1
