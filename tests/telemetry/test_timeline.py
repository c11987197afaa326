import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry import timeline
from rlproxi.telemetry.timeline import Diary, Span, idle_shares, joined


def test_idle_shares_of_a_schedule_made_by_hand():
    """Ten seconds, two rollout actors, one scorer, one learner.

    Actor 0 samples 0-4 and 3-5 (overlapping, 5 s busy), actor 1 from before until 2 (2 s): idle (0.5 + 0.8) / 2. The
    scorer scores 4-6 and beyond the end from 9: 3 s busy. The learner waits 0-6, trains 6-8, writes 8-8.5, syncs 8.5-9.
    """
    spans = [
        Span("rollout", 0, "sample", 100, 4),
        Span("rollout", 0, "sample", 103, 2),
        Span("rollout", 1, "sample", 90, 12),
        Span("reward", "hat", "score", 104, 2),
        Span("reward", "hat", "score", 109, 50),
        Span("learner", 0, "wait", 100, 6),
        Span("learner", 0, "train", 106, 2),
        Span("learner", 0, "checkpoint", 108, 0.5),
        Span("learner", 0, "sync", 108.5, 0.5),
        Span("weights", 0, "sync", 108.5, 0.5),
    ]
    found = idle_shares(spans, 100, 110, {"rollout": [0, 1], "reward": ["hat"], "learner": [0]})
    assert found == pytest.approx({"rollout": 0.65, "reward": 0.7, "learner": 0.7})
    assert idle_shares(spans, 100, 110, {"reward": ["hat", "unused"]}) == pytest.approx({"reward": 0.85})
    assert idle_shares([], 0, 5, {"rollout": [0], "reward": []}) == {"rollout": 1.0}
    assert idle_shares(spans, 110, 110, {"rollout": [0]}) == {}


@given(st.lists(st.tuples(st.floats(-5, 15), st.floats(0, 10)), max_size=8), st.randoms())
def test_idle_is_a_share_and_knows_no_order(pairs, shuffle: random.Random):
    spans = [Span("rollout", 0, "sample", start, seconds) for start, seconds in pairs]
    share = idle_shares(spans, 0, 10, {"rollout": [0]})["rollout"]
    assert -1e-9 <= share <= 1
    grid = [i / 100 for i in range(1000)]  # the same by counting hundredths of a second
    counted = sum(not any(s.start <= t < s.end for s in spans) for t in grid) / 1000
    assert share == pytest.approx(counted, abs=0.01 * (len(spans) + 1))
    shuffle.shuffle(spans)
    assert idle_shares(spans, 0, 10, {"rollout": [0]})["rollout"] == pytest.approx(share)


def test_a_diary_knows_what_goes_on_and_what_has_ended():
    async def main():
        diary, go = Diary(), asyncio.Event()

        async def work(who, fails):
            with diary.span("rollout", who, "sample"):
                await go.wait()
                assert not fails

        tasks = [asyncio.create_task(work(0, False)), asyncio.create_task(work(1, True))]
        await asyncio.sleep(0)
        assert diary.take() == [] and [s.who for s in diary.going_on(1e12)] == [0, 1]
        assert all(s.seconds > 1e9 for s in diary.going_on(1e12))
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(s.who for s in diary.take()) == [0, 1] and diary.take() == [] and diary.going_on(0) == []

    asyncio.run(main())


def test_what_was_cleared_does_not_come_back_and_memory_is_bounded():
    diary = Diary(most=10)
    with diary.span("learner", 0, "train"):
        diary.clear()
    assert diary.take() == []
    for i in range(100):
        diary.note("learner", 0, "train", i, 1)
    kept = diary.take()
    assert len(kept) <= 10 and kept[-1].start == 99


def test_short_steps_are_joined():
    spans = [
        each
        for i in range(50)
        for each in (Span("learner", 0, "wait", i * 0.1, 0.004), Span("learner", 0, "train", i * 0.1 + 0.005, 0.09))
    ]
    spans += [Span("learner", 0, "wait", 5.0, 3.0), Span("learner", 0, "checkpoint", 8.0, 0.5)]
    assert [(s.phase, round(s.start, 3), round(s.seconds, 3)) for s in joined(spans)] == [
        ("train", 0.005, 4.99),
        ("wait", 5.0, 3.0),
        ("checkpoint", 8.0, 0.5),
    ]
    before, after = (idle_shares(each, 0, 8.5, {"learner": [0]})["learner"] for each in (spans, joined(spans)))
    assert after == pytest.approx(before, abs=0.06)


def test_lines_come_back_and_torn_ones_are_skipped(tmp_path):
    spans = [Span("rollout", 0, "sample", 1.25, 0.5), Span("reward", "Güte", "score", 2.0, 0.25)]
    assert timeline.read(tmp_path) == []
    timeline.append(tmp_path, "rl", 1, spans)
    with open(RunDirectory(tmp_path).timeline, "ab") as file:
        file.write(b'{"time": 1, "stage": "rl", "st')
    timeline.append(tmp_path, "rl", 2, [])
    first, second = timeline.read(tmp_path)
    assert (first["stage"], first["step"], first["spans"], second["step"]) == ("rl", 1, spans, 2)
    assert {s.role for s in spans} <= set(timeline.ROLES) and {s.phase for s in spans} <= set(timeline.PHASES)
