import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlproxi.rewards.combine import combine

NAN = float("nan")


def test_weighted_sum():
    parts = {"a": np.array([[1.0, 2.0]]), "b": np.array([[10.0, -10.0]])}
    total = combine(parts, {"a": 1.0, "b": 0.5})
    assert total.dtype == np.float32 and total.tolist() == [[6.0, -3.0]]


def test_group_normalisation_by_hand():
    parts = {"a": np.array([[1.0, 3.0], [5.0, 5.0]]), "b": np.array([[200.0, 100.0], [0.0, 400.0]])}
    total = combine(parts, {"a": 1.0, "b": 2.0}, "group")
    # Two samples a group: each reward becomes -1 and +1; a group without spread 0.
    assert total.tolist() == [[-1 + 2, 1 - 2], [0 - 2, 0 + 2]]


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_scale_and_offset_of_a_reward_do_not_matter(seed, scale, offset):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 3, 6))
    weights = {"a": 0.7, "b": 0.3}
    plain = combine({"a": a, "b": b}, weights, "group")
    assert combine({"a": a * scale + offset, "b": b}, weights, "group") == pytest.approx(plain, abs=1e-3)
    # Each reward's share of the variance is its weight's, whatever the scales.
    assert np.asarray(combine({"a": a * scale}, {"a": 0.7}, "group")).std(1) == pytest.approx(0.7, rel=1e-5)


def test_a_missing_score_is_missing_in_the_sum_and_in_no_other_sample():
    parts = {"a": np.array([[1.0, NAN, 3.0]]), "b": np.array([[0.0, 1.0, 2.0]])}
    for normalize in ("none", "group"):
        total = combine(parts, {"a": 1.0, "b": 1.0}, normalize)
        assert np.isnan(total).tolist() == [[False, True, False]]
    assert combine({"a": parts["a"]}, {"a": 1.0}, "group")[0, [0, 2]].tolist() == [-1.0, 1.0]
    assert np.isnan(combine({"a": np.full((1, 3), NAN)}, {"a": 1.0}, "group")).all()


def test_equal_float32_scores_have_no_spread():
    same = np.full((1, 8), np.float32(0.1))
    same[0, 0] = np.nextafter(same[0, 0], np.float32(1))
    assert not combine({"a": same}, {"a": 1.0}, "group").any()


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="rewards.normalize 'std' is unknown; choose one of none, group"):
        combine({"a": np.zeros((1, 2))}, {"a": 1.0}, "std")
