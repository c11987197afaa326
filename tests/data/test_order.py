"""The order of samples: every property that resuming and sharing rest on."""

import pickle
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlproxi.data.order import Order

BUCKETS = [(8, 16), (16, 8), (16, 16)]
indices = st.lists(st.dictionaries(st.sampled_from(BUCKETS), st.integers(0, 12)), min_size=1, max_size=9)


def batches_of(order, start, stop):
    return [order.batch(number) for number in range(start, stop)]


def orders(**fixed):
    @st.composite
    def build(draw):
        index, batch = draw(indices), draw(st.integers(1, 7))
        assume(any(sum(s.get(b, 0) for s in index) >= batch for b in BUCKETS))
        seed, window = draw(st.integers(0, 5)), draw(st.integers(1, 4))
        return index, Order(index, batch, seed, window)

    return build()


@given(orders(), st.integers(0, 3))
def test_an_epoch_is_a_permutation_without_the_remainders(built, epoch):
    index, order = built
    per = order.batches_per_epoch
    batches = batches_of(order, epoch * per, (epoch + 1) * per)
    assert all(b.epoch == epoch and len(b.rows) == order.batch_size for b in batches)
    seen = Counter((b.bucket, shard, row) for b in batches for shard, row in b.rows)
    assert max(seen.values()) == 1
    assert all(0 <= row < index[shard].get(bucket, 0) for bucket, shard, row in seen)
    for bucket in BUCKETS:
        total = sum(s.get(bucket, 0) for s in index)
        assert sum(key[0] == bucket for key in seen) == total - total % order.batch_size
    totals = [sum(s.get(b, 0) for s in index) for b in BUCKETS]
    assert order.never_used == sum(total for total in totals if total < order.batch_size)


@given(orders(), st.integers(0, 40))
def test_any_batch_is_known_without_the_ones_before(built, number):
    index, order = built
    alone = Order(index, order.batch_size, order.seed, order.window).batch(number)
    assert alone == batches_of(order, 0, number + 1)[number] == pickle.loads(pickle.dumps(order)).batch(number)


@given(orders(), st.integers(1, 4))
def test_ranks_together_read_what_one_would(built, world):
    _, order = built
    assume(order.batch_size % world == 0)
    batch = order.batch(0)
    parts = [row for rank in range(world) for row in batch.share(rank, world)]
    assert parts == batch.share(0, 1) == batch.rows


@given(orders())
def test_a_batch_lies_in_one_window_or_starts_with_what_was_left_over(built):
    index, order = built
    plan = order.plan(0)
    window_of = {int(shard): w for w, shards in enumerate(plan.windows) for shard in shards}
    assert sorted(window_of) == list(range(len(index))) and all(len(w) <= order.window for w in plan.windows)
    batches = batches_of(order, 0, order.batches_per_epoch)
    ends = []
    for batch in batches:
        at = [window_of[shard] for shard, _ in batch.rows]
        assert at == sorted(at)  # what was left over comes first
        ends.append(at[-1])
    assert ends == sorted(ends)
    for bucket in BUCKETS:
        for w in range(len(plan.windows)):
            there = sum(shard.get(bucket, 0) for s, shard in enumerate(index) if window_of[s] <= w)
            used = order.batch_size * sum(end <= w and batch.bucket == bucket for end, batch in zip(ends, batches))
            assert 0 <= there - used < order.batch_size


def test_epochs_differ_and_so_does_what_they_leave_out():
    order = Order([{(8, 8): 7}, {(8, 8): 8}, {(8, 8): 7}], 5, seed=0, window=2)
    assert order.batches_per_epoch == 4
    epochs = [[row for b in batches_of(order, 4 * e, 4 * e + 4) for row in b.rows] for e in range(6)]
    assert len({tuple(e) for e in epochs}) == 6
    everything = {(s, r) for s, n in enumerate((7, 8, 7)) for r in range(n)}
    left = [frozenset(everything - set(e)) for e in epochs]
    assert all(len(rest) == 2 for rest in left) and len(set(left)) > 1
    assert set().union(*epochs) == everything
    other = Order([{(8, 8): 7}, {(8, 8): 8}, {(8, 8): 7}], 5, seed=1, window=2)
    assert [b.rows for b in batches_of(other, 0, 4)] != [b.rows for b in batches_of(order, 0, 4)]


def test_buckets_alternate_within_a_window():
    order = Order([{(8, 8): 400, (8, 16): 400}] * 2, 10, seed=0, window=2)
    buckets = [b.bucket for b in batches_of(order, 0, order.batches_per_epoch)]
    changes = sum(a != b for a, b in pairwise(buckets))
    assert changes == pytest.approx(80, abs=4 * 160**0.5 / 2)  # 159 neighbours, half of them differ


@pytest.mark.parametrize("index", [[], [{}], [{(8, 8): 3}, {(8, 16): 3}]])
def test_too_little_data_says_what_there_is(index):
    with pytest.raises(ValueError, match="no bucket fills a batch of 4 .rows in each: (none|8x8: 3, 8x16: 3)"):
        Order(index, 4, seed=0)


def test_a_resume_deep_inside_a_large_set_is_quick():
    """15 million samples in 1,500 shards."""
    order = Order([{(64, 8 * b): 1000 for b in range(1, 11)} for _ in range(1500)], 512, seed=0)
    begun = time.perf_counter()
    batch = order.batch(10 * order.batches_per_epoch + 20_000)
    assert time.perf_counter() - begun < 2 and batch.epoch == 10 and len(set(batch.rows)) == 512
