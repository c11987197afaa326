"""One curve of the live page: buckets, cuts, and the exact tail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlproxi.telemetry.live.curve import Curve

values = st.one_of(st.none(), st.floats(-1e6, 1e6))


@given(st.lists(values, max_size=300), st.sampled_from([2, 4, 10]))
def test_buckets_hold_the_points_that_were_added(points, limit):
    series = Curve(limit, tail=7)
    for step, value in enumerate(points):
        series.add(step, value)
    assert len(series) <= limit
    assert list(series.tail) == list(enumerate(points))[-7:]
    edges = list(zip(series.first, series.last))
    assert [e for first, last in edges for e in range(first, last + 1)] == list(range(len(points)))
    for i, (first, last) in enumerate(edges):
        inside = [v for v in points[first : last + 1] if v is not None]
        assert series.size[i] == last - first + 1 and series.count[i] == len(inside)
        if inside:
            assert series.low[i] == min(inside) and series.high[i] == max(inside)
            assert series.total[i] == pytest.approx(sum(inside), abs=1e-6)


@given(st.integers(0, 120), st.integers(-1, 130))
def test_a_cut_drops_what_lies_behind_it_and_tells_when_a_bucket_is_in_the_way(count, at):
    series = Curve(8)
    for step in range(count):
        series.add(step, float(step))
    before = list(zip(series.first, series.last))
    exact = series.cut(at)
    assert not series.last or series.last[-1] <= at
    assert all(step <= at for step, _ in series.tail)
    assert exact == (not any(first <= at < last for first, last in before))
    series.add(at + 1, -5.0)
    assert series.tail[-1] == (at + 1, -5.0) and len(series) <= 8


def test_a_small_curve_is_exact_and_the_last_of_two_records_of_a_step_wins():
    series = Curve()
    for step, value in [(1, 0.1), (2, None), (4, 0.4), (4, 0.5), (2, 0.2), (3, 0.3)]:
        series.add(step, value)
    assert series.buckets() == {"stride": 1, "x": [1, 2, 3, 4], "y": [0.1, 0.2, 0.3, 0.5]}
