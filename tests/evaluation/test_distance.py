"""Distances and diversity against closed forms, scipy and what was done to real portraits."""

from functools import cache
from itertools import islice

import numpy as np
import pytest
from scipy.linalg import sqrtm

from fixtures.shards import sample, write_tar
from rlproxi.config.loading import build_config
from rlproxi.data import faces
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation import reference
from rlproxi.evaluation.distance import GaussianFit, Moments, Reference, frechet, layout, texture
from rlproxi.evaluation.diversity import area_average, diversity
from rlproxi.evaluation.spectrum import DataSpectrum

CONFIG = build_config({"evaluate": {"prompts": 64, "samples": 4}})


def random_gaussian(seed: int, d: int, rank: int) -> GaussianFit:
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(rank, d)) * np.exp(draw.normal(size=d))
    return GaussianFit(draw.normal(size=d), rows.T @ rows / rank)


# -- the distance ---------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 7, 48])
def test_frechet_is_what_scipys_matrix_root_gives(d):
    a, b = random_gaussian(1, d, 3 * d), random_gaussian(2, d, 3 * d)
    expected = np.square(a.mean - b.mean).sum() + np.trace(
        a.covariance + b.covariance - 2 * sqrtm(a.covariance @ b.covariance).real
    )
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9) == frechet(b, a)


def test_frechet_of_gaussians_with_the_same_axes():
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    s, t, shift = np.linspace(0, 2, 9), np.linspace(3, 0.1, 9), np.full(9, 0.5)
    a, b = (GaussianFit(m, axes * np.square(x) @ axes.T) for m, x in ((np.zeros(9), s), (shift, t)))
    assert frechet(a, b) == pytest.approx(9 * 0.25 + np.square(s - t).sum(), rel=1e-12)
    assert frechet(a, a) < 1e-12


def test_fewer_rows_than_dimensions_are_exact():
    a, b = random_gaussian(3, 192, 20), random_gaussian(4, 192, 200)
    assert 0 <= frechet(a, a) < 1e-10 * np.trace(a.covariance)
    # tr (A B)^{1/2} from the other side: with A = X'X of 20 rows X, that of the small matrix X B X'.
    values, vectors = np.linalg.eigh(a.covariance)
    rows = (vectors[:, -20:] * np.sqrt(values[-20:])).T
    cross = np.sqrt(np.linalg.eigvalsh(rows @ b.covariance @ rows.T)).sum()
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_moments_in_pieces_are_those_of_the_whole_and_large_means_do_not_cancel():
    rows = 1e6 + np.random.default_rng(0).normal(size=(100, 5))
    moments = Moments()
    for piece in np.split(rows, [3, 40]):
        moments.add(piece)
    found = moments.gaussian()
    assert np.allclose(found.mean, rows.mean(0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(rows, rowvar=False, bias=True), rtol=1e-7)
    with pytest.raises(ValueError, match=r"finite numbers \[R, D\]"):
        moments.add(np.full((2, 5), np.nan))
    with pytest.raises(ValueError, match="3 and 5 dimensions"):
        frechet(random_gaussian(0, 3, 9), found)


# -- the spaces -----------------------------------------------------------------------------


def test_area_means_at_any_size():
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)
    blocks = images.reshape(3, 8, 3, 8, 5, 3).mean((2, 4)) / 255
    assert np.allclose(area_average(images, 8), blocks, atol=1e-6)
    assert np.allclose(layout(images), blocks.reshape(3, -1), atol=1e-6)
    # Each pixel of 12 x 12 as 2 x 2 equal ones lies whole in one of 8 x 8 cells of 3 x 3.
    odd = images[:, :12, :12]
    assert np.allclose(area_average(odd, 8), area_average(odd.repeat(2, 1).repeat(2, 2), 8), atol=1e-6)
    assert np.array_equal(area_average(odd, 16), odd.astype(np.float32) / 255), "never enlarged"


def test_patches_are_those_of_the_image_less_their_means():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 19, 3), np.uint8)
    found = texture(images).reshape(2, 5, 16, 3, 16)  # 5 rows of positions, 16 columns: both with step 1
    patch = images[1, 4:8, 15:19].reshape(16, 3).T / 255
    assert np.allclose(found[1, 4, 15], patch - patch.mean(1, keepdims=True), atol=1e-6)
    wide = texture(np.concatenate([images] * 2, 2)).reshape(2, 5, 12, 3, 16)  # 35 positions: step 3
    assert np.allclose(wide[:, :, :5], found[:, :, ::3][:, :, :5])
    with pytest.raises(ValueError, match="at least 4 x 4 pixels, got 3 x 8"):
        texture(images[:, :3, :8])


def test_a_reference_takes_any_features_and_refuses_other_sizes():
    real = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    mean = {"colour": lambda images: images.mean((1, 2))}
    found = Reference([real[:30], real[30:]], mean).distance(real[:20])
    a, b = ((x.mean((1, 2)).mean(0), np.cov(x.mean((1, 2)), rowvar=False, bias=True)) for x in (real, real[:20]))
    expected = frechet(GaussianFit(*a), GaussianFit(*b)) / np.trace(a[1])
    assert found == {"total": pytest.approx(expected), "colour": pytest.approx(expected)}
    with pytest.raises(ValueError, match="8 x 6 pixels cannot be compared with a reference of 8 x 8"):
        Reference([real], mean).distance(real[:, :, :6])
    with pytest.raises(ValueError, match="do not vary in colour"):
        Reference([real[:1]], mean)
    with pytest.raises(ValueError, match="at least one image"):
        Reference([], mean)


# -- what it sees ---------------------------------------------------------------------------


def real_images(config, count: int) -> np.ndarray:
    """The first real images of a run, fewer where the data end."""
    return np.stack(list(islice(reference.real_images(config), count)))


@cache
def portraits() -> tuple[Reference, np.ndarray, np.ndarray]:
    """2048 real portraits as the reference, and 256 others of the same prompts, twice, prompt-major [64 * 4]."""
    images = real_images(CONFIG, 2048 + 512)
    others = images[2048:].reshape(2, 4, 64, 32, 32, 3).swapaxes(1, 2).reshape(2, 256, 32, 32, 3)
    return Reference([images[:2048]]), *others


def clipped(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, amplitude: float, period: int = 2) -> np.ndarray:
    squares = (np.indices(images.shape[1:3]) // (period // 2)).sum(0)
    return clipped(images + amplitude * 255 * (squares % 2 * 2.0 - 1)[..., None])


def blurred(images: np.ndarray) -> np.ndarray:
    """Halved and enlarged again."""
    half = images.reshape(len(images), 16, 2, 16, 2, 3).mean((2, 4))
    return clipped(half.repeat(2, 1).repeat(2, 2))


def softened(images: np.ndarray) -> np.ndarray:
    """1-2-1 in both directions."""
    x = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return clipped((x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4)


# Measured factors over the level of real images: 80, 25, 17, 108, 300, 5.5, 340.
@pytest.mark.parametrize(
    "name, part, factor, change",
    [
        ("grid of 3 %", "texture", 40, lambda x: grid(x, 0.03)),
        ("grid of 2 %", "texture", 12, lambda x: grid(x, 0.02)),
        ("grid of 3 %, period 4", "texture", 8, lambda x: grid(x, 0.03, 4)),
        ("blur 2x", "texture", 50, blurred),
        ("blur 1-2-1", "texture", 150, softened),
        ("brighter by 10", "layout", 3, lambda x: clipped(x + 10.0)),
        ("one prompt for all", "layout", 100, lambda x: np.concatenate([x[:4]] * 64)),
    ],
)
def test_what_a_judge_overlooks_shows_in_the_right_part(name, part, factor, change):
    real, images, _ = portraits()
    level, found = real.distance(images), real.distance(change(images))
    assert found[part] > factor * level[part], (name, found, level)
    assert found["total"] == pytest.approx(found["layout"] + found["texture"]) and found["total"] > 1.7 * level["total"]
    other = {"layout": "texture", "texture": "layout"}[part]
    if name != "one prompt for all":
        assert found[other] < 1.5 * level[other], "the other part does not answer"


def test_real_images_are_near_and_the_nearer_the_more_there_are():
    real, images, more = portraits()
    few, one, two, all_ = (real.distance(x) for x in (images[:128], images, more, np.concatenate([images, more])))
    for level in (one, two):  # 0.0085 with a standard deviation of 0.0013
        assert 0.004 < level["total"] < 0.013 and level["texture"] < 0.001
    assert all_["total"] < 0.7 * max(one["total"], two["total"]) and few["total"] > 1.5 * one["total"]


# -- diversity ------------------------------------------------------------------------------


def test_diversity_of_copies_is_0_and_of_noise_what_its_spread_says():
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (5, 1, 32, 32, 3), np.uint8)
    assert diversity(image.repeat(4, 1).reshape(20, 32, 32, 3), 4) == 0
    noise = clipped(127.5 + 20 * draw.normal(size=(24, 32, 32, 3)))
    # The mean of 4 pixels has half the spread, a difference sqrt(2) times it; 768 numbers: sqrt is as good as linear.
    assert diversity(noise, 4) == pytest.approx(20 / 255 / 2 * 2**0.5, rel=0.01)
    assert diversity(noise) == pytest.approx(20 / 255 / 2 * 2**0.5, rel=0.01)
    still = clipped(127.5 + 20 * draw.normal(size=(96, 16, 16, 3)))
    assert diversity(still, 2) == pytest.approx(20 / 255 * 2**0.5, rel=0.01), "16 x 16 pixels are the cells"


def test_diversity_is_the_mean_over_pairs_of_a_prompt():
    level = np.array([0, 10, 50, 200, 200, 230]) / 255  # constant images: an RMS difference is that of the levels
    images = np.broadcast_to((level * 255).astype(np.uint8)[:, None, None, None], (6, 8, 8, 3))
    pairs = np.abs(level[:, None] - level)
    assert diversity(images) == pytest.approx(pairs.sum() / 30)
    assert diversity(images, 3) == pytest.approx((pairs[:3, :3].sum() + pairs[3:, 3:].sum()) / 12)
    for samples in (1, 4):
        with pytest.raises(ValueError, match=f"6 images are no groups of {samples}"):
            diversity(images, samples)


def test_a_collapsed_prompt_shows_in_diversity_and_a_texture_does_not():
    _, images, more = portraits()
    own = diversity(images, 4)
    assert own == pytest.approx(diversity(more, 4), rel=0.1) and diversity(images) > 2 * own
    assert diversity(grid(images, 0.03), 4) == pytest.approx(own, rel=0.02)
    assert diversity(images[::4].repeat(4, 0), 4) == 0


# -- real images of a run -------------------------------------------------------------------


def test_portraits_are_those_of_the_heldout_prompts_and_new_each_time():
    images, prompts = real_images(CONFIG, 130), heldout_prompts(CONFIG)[1]
    assert images.shape == (130, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images[:40], real_images(CONFIG, 40)), "named by the seed"
    assert not np.array_equal(images[0], images[64]), "another portrait of the same caption"
    with_hand = next(i for i, p in enumerate(prompts) if "fingers" in p)
    for place in (0, with_hand):
        drawn = [reference.portrait_of(prompts[place], np.random.default_rng(i)) for i in range(3)]
        assert all(faces.caption_of(p.attributes) == prompts[place] for p in drawn)
    vague = [reference.portrait_of("a smiling person", np.random.default_rng(i)).attributes for i in range(30)]
    assert {a["mouth"] for a in vague} == {"smiling"} and {a["hand"] for a in vague} == {"none"}
    assert {a["background"] for a in vague} == set(faces.ATTRIBUTES["background"])


def test_an_evaluation_is_compared_with_as_many_real_images():
    data, images, more = portraits()
    compare = reference.Comparison(CONFIG)
    found = compare(grid(images, 0.03))
    assert found["distance"] == pytest.approx(data.distance(grid(images, 0.03)))
    assert found["diversity"] == diversity(grid(images, 0.03), 4)
    assert compare.note is None and compare.data["images"] == 256
    assert compare.data["distance"] == pytest.approx(data.distance(images))
    assert compare.data["diversity"] == pytest.approx(diversity(images, 4))
    small = reference.Comparison(CONFIG)
    assert list(small(more[:, ::2, ::2])) == ["diversity"]
    assert small.note == "no distance to data: images are 16 x 16, data.size is 32"


def shards(tmp_path, count: int):
    url = write_tar(tmp_path / f"{count}.tar", [sample(0, image=b"broken"), *(sample(i) for i in range(1, count + 1))])
    return build_config({"data": {"source": "shards", "urls": [url], "size": 16}, "evaluate": {"samples": 2}})


def test_of_shards_what_is_readable_counts_and_nothing_is_made_up(tmp_path, monkeypatch):
    assert real_images(shards(tmp_path, 5), 9).shape == (5, 16, 16, 3)
    assert list(reference.real_images(shards(tmp_path, 0))) == []
    config, fakes = shards(tmp_path, 30), np.zeros((8, 16, 16, 3), np.uint8)
    few = reference.Comparison(config)
    assert few(fakes) == {"diversity": 0.0} and few.data == {}
    assert few.note == "no distance to data: data.urls hold 30 readable images, 256 are needed"
    monkeypatch.setattr(reference, "LEAST", 20)
    monkeypatch.setattr(reference, "COUNT", 20)
    enough = reference.Comparison(config)
    own = real_images(config, 30)
    found = enough(fakes)["distance"]
    assert found == Reference([own[:20]]).distance(fakes) and enough.note is None
    spectrum = DataSpectrum()
    spectrum.add(own[:20])
    assert enough.data == {
        "images": 8,
        "distance": Reference([own[:20]]).distance(own[20:28]),
        "spectrum": spectrum.compare(own[20:28]),
    }
    monkeypatch.setattr(reference, "COUNT", 25)
    short = reference.Comparison(config)
    assert "distance" in short(fakes) and short.data == {} and "hold 5 beside the reference, not 8" in short.note
    gone = reference.Comparison(
        build_config({"data": {"source": "shards", "urls": ["/no/such.tar"], "size": 16}, "evaluate": {"samples": 2}})
    )
    assert gone(fakes) == {"diversity": 0.0} and "'/no/such.tar' matches no file" in gone.note
