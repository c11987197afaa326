import numpy as np
import pytest

from rlproxi.algorithms.guards.over_optimisation import Evaluated, OverOptimisation
from rlproxi.config.loading import build_config
from rlproxi.data import faces
from rlproxi.evaluation.spectrum import PERIODS, DataSpectrum, coefficients

SIDE = 32


def portraits(first: int, count: int) -> np.ndarray:
    return faces.batch(11, np.arange(first, first + count), SIDE, 0.0)[0]


@pytest.fixture(scope="module")
def data() -> DataSpectrum:
    found = DataSpectrum()
    for first in range(0, 1024, 128):
        found.add(portraits(first, 128))
    return found


def grainy(first: int, count: int, sigma: float = 0.02) -> np.ndarray:
    """What an undertrained sampler draws: portraits under noise, in [0, 1]."""
    noise = np.random.default_rng(first).normal(0, sigma, (count, SIDE, SIDE, 3))
    return portraits(first, count) / 255 + noise


def grid(period: int, direction: str, amplitude: float = 0.02) -> np.ndarray:
    wave = amplitude * np.cos(2 * np.pi * np.arange(SIDE) / period)
    return (wave[:, None] if direction == "rows" else wave[None, :])[None, :, :, None]


def as_uint8(pixels: np.ndarray) -> np.ndarray:
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def evaluated(data: DataSpectrum, iteration: int, pixels: np.ndarray) -> Evaluated:
    nan = float("nan")
    return Evaluated(iteration, 0.5, nan, nan, spectrum=data.compare(as_uint8(pixels)))


def guard() -> OverOptimisation:
    return OverOptimisation(build_config({}))


@pytest.mark.parametrize("shape", [(32, 32), (30, 41)])
@pytest.mark.parametrize("period", PERIODS)
def test_a_cosine_has_half_its_amplitude_at_its_period(period, shape):
    """Of whole periods exactly; at period 2, where the cosine is all there is, its whole amplitude."""
    wave = np.round(127.5 + 60 * np.cos(2 * np.pi * np.arange(shape[0]) / period))
    images = np.broadcast_to(wave[None, :, None, None], (2, *shape, 3))
    found = np.abs(coefficients(images.astype(np.uint8)))
    expected = 60 / 255 * (1 if period == 2 else 0.5)
    tolerance = 0.02 if shape[0] % period == 0 else 0.2
    assert found[:, 0, PERIODS.index(period)] == pytest.approx(np.full((2, 3), expected), rel=tolerance)
    assert found[:, 1].max() < 1e-7, "nothing varies along the other direction"


def test_real_images_are_like_the_data(data):
    found = data.compare(portraits(5000, 256))
    for direction in ("rows", "columns"):
        assert list(found[direction].values()) == pytest.approx([1] * len(PERIODS), abs=0.3)
        assert max(found["common"][direction].values()) < 10 / 256
    assert found["worst"] == max([*found["rows"].values(), *found["columns"].values()]) and found["images"] == 256


def test_copies_of_one_image_have_much_in_common(data):
    found = data.compare(np.repeat(portraits(5000, 1), 64, 0))
    assert max(found["common"]["rows"].values()) > 0.5


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("period", [2, 3, 4, 8])
def test_a_grid_of_two_percent_over_grainy_images_raises_the_alarm(data, period, direction):
    # At the longest period portraits themselves have most: there it takes as many images as an evaluation has.
    for count in (64, 256) if period < 8 else (256,):
        watch = guard()
        assert watch.see(evaluated(data, 0, grainy(6000, count))) is None
        message = watch.see(evaluated(data, 25, grainy(6000, count) + grid(period, direction)))
        assert message and message.startswith(f"grid: a grid of period {period} pixels lies over the {direction}")
        assert "there is no held-out score" in message and "(evaluate.alarm_grid)" in message


@pytest.mark.parametrize("count", [16, 64, 256])
def test_new_samples_without_a_grid_raise_none(data, count):
    for turn in range(8):
        watch = guard()
        clean, more = (grainy(20_000 + 1000 * turn + part * count, count, 0.02 * (turn % 2)) for part in (0, 1))
        assert watch.see(evaluated(data, 0, clean)) is None
        assert watch.see(evaluated(data, 25, more)) is None


def test_a_grid_that_was_there_before_is_no_news_and_null_is_never(data):
    with_grid = evaluated(data, 0, grainy(6000, 64) + grid(4, "rows", 0.05))
    watch = guard()
    assert watch.see(with_grid) is None and watch.see(with_grid) is None
    never = OverOptimisation(build_config({"evaluate": {"alarm_grid": None}}))
    assert never.see(evaluated(data, 0, grainy(6000, 64))) is None and never.see(with_grid) is None
