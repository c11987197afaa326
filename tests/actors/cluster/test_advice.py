"""The model of an iteration against an event-by-event simulation and closed forms, and advice from a run log."""

import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cluster.advice import IterationCosts, Split, advise, best, describe, measured
from rlproxi.config.loading import build_config, dump_config
from rlproxi.telemetry.runlog import RunLog

ONE_EACH = Split(1, 1, 1)


def made(
    m=64, a=1.0, b=0.0, c=64.0, s=0.0, split=ONE_EACH, gpus=(1.0, 0.0, 1.0), overlapped=False, **more
) -> IterationCosts:
    return IterationCosts(m, a, b, c, s, 1.0, split, gpus, overlapped, **more)


def simulated(m: int, a: float, b: float, actors: int, replicas: int) -> float:
    """When the last of m micro-batches is scored. The first free actor samples, the first free replica scores."""
    free_actors, free_replicas, scored = [0.0] * actors, [0.0] * replicas, 0.0
    done = []
    for _ in range(m):
        end = heapq.heappop(free_actors) + a
        heapq.heappush(free_actors, end)
        done.append(end)
    for ready in sorted(done):
        end = max(ready, heapq.heappop(free_replicas)) + b
        heapq.heappush(free_replicas, end)
        scored = max(scored, end)
    return scored


@given(m=st.integers(1, 40), a=st.floats(0.1, 5), b=st.floats(0.1, 5), c=st.floats(0, 50), s=st.floats(0, 5))
def test_with_one_actor_and_one_replica_the_pipeline_is_exact(m, a, b, c, s):
    expected = simulated(m, a, b, 1, 1) + c + s
    assert made(m, a, b, c, s).seconds(Split(1, 1, 1)) == pytest.approx(expected)
    assert expected == pytest.approx(a + b + (m - 1) * max(a, b) + c + s)  # the closed form


@given(m=st.integers(1, 40), a=st.floats(0.1, 5), b=st.floats(0.1, 5), n=st.integers(1, 8), k=st.integers(1, 8))
def test_with_several_it_errs_by_less_than_a_round_of_the_faster_role(m, a, b, n, k):
    told, true = made(m, a, b, 0.0).seconds(Split(n, k, 1)), simulated(m, a, b, n, k)
    assert told <= true + 1e-9, "a lower bound: work cannot be done faster"
    assert true - told <= math.ceil(n / k) * b + a + 1e-9


def test_overlapped_is_as_slow_as_the_slowest_role():
    what = made(m=8, a=2.0, b=1.0, c=12.0, s=0.5, overlapped=True)
    assert what.seconds(Split(2, 1, 2)) == 8.0  # rollouts: 4 rounds of 2 s
    assert what.seconds(Split(4, 2, 1)) == 12.5  # learner: 12 s + sync
    assert what.seconds(Split(8, 1, 4)) == 8.0  # rewards: 8 x 1 s
    assert what.seconds(Split(2, 1, 2), overlapped=False) == 10.0 + 6.5  # the first is sampled, then 8 x 1 s


@settings(deadline=None)
@given(a=st.sampled_from([0.25, 1.0, 4.0]), share=st.sampled_from([4, 8, 16, 32]))
def test_the_best_splits_are_those_of_the_closed_forms(a, share):
    m, places = 3600, 30
    work, c = m * a, m * a * share / 16
    synchronous = best(made(m, a, 0.0, c), places)
    root = places * math.sqrt(work) / (math.sqrt(work) + math.sqrt(c))
    assert abs(synchronous.rollout - root) <= 1.5, "n proportional to the square root of the work"
    overlapped = best(made(m, a, 0.0, c, overlapped=True), places)
    assert abs(overlapped.rollout - places * work / (work + c)) <= 1.5, "n proportional to the work"
    # Both are the best of all that fit, by the model's own time.
    for split, how in ((synchronous, False), (overlapped, True)):
        what = made(m, a, 0.0, c)
        every = [Split(n, 1, k) for n in range(1, places) for k in what.ranks() if n + k <= places]
        assert what.seconds(split, how) == pytest.approx(min(what.seconds(each, how) for each in every))


def test_fractions_whole_ranks_and_too_few_places():
    what = made(m=6, a=1.0, b=0.5, c=6.0, gpus=(0.5, 0.25, 1.0), updates=2)
    assert what.ranks() == [1, 3], "2 updates of 6 micro-batches are shared by 1 or 3 ranks"
    split = best(what, 4)
    assert what.used(split) <= 4 and split.learner in (1, 3)
    assert best(what, 1.5) is None and "too few" in describe(what, 1.5)[-1]
    assert best(made(gpus=(1.0, 0.0, 1.0), split=Split(1, 5, 1)), 2).reward == 5, (
        "what needs no GPU is not short of them"
    )
    assert sum(best(made(gpus=(0.0, 0.0, 0.0), b=1.0), 9)) <= 9, "without GPUs processes are counted"


def write_run(folder, steps, **resources):
    values = {
        "resources": resources,
        "rl": {"prompts_per_step": 8, "groups_per_micro_batch": 1},
        "rewards": {"train": [{"name": "jpeg"}], "heldout": [], "replicas": 2},
    }
    folder.mkdir()
    dump_config(build_config(values), folder / "config.yaml")
    with RunLog(folder) as log:
        for i, (rollout, reward, train, sync, step) in enumerate(steps):
            log.append(
                "metrics",
                stage="rl",
                step=i + 1,
                **{
                    "seconds/rollout": rollout,
                    "seconds/reward": reward,
                    "seconds/train": train,
                    "seconds/sync": sync,
                    "seconds/step": step,
                },
            )
    return folder


def test_a_run_log_becomes_numbers_and_lines(tmp_path):
    steady = (16.0, 4.0, 3.0, 0.5, 12.0)
    folder = write_run(
        tmp_path / "run",
        [(99.0, 99.0, 99.0, 99.0, 99.0), *[steady] * 3],
        rollout_actors=2,
        learner_workers=2,
        rollout_gpus=1,
        learner_gpus=1,
    )
    what = measured(folder)
    assert (what.micro_batches, what.rollout, what.reward, what.learner, what.sync) == (8, 2.0, 0.5, 6.0, 0.5)
    assert what.split == Split(2, 2, 2) and what.gpus == (1.0, 0.0, 1.0) and not what.overlapped
    assert what.seconds(what.split) == pytest.approx(8.0 + 0.5 + 3.0 + 0.5)  # as measured: 12 s
    lines = advise(folder)
    assert "took 12.00 s on 2 rollout actors, 2 reward replicas, 2 learner ranks (4 GPUs)" in lines[0]
    assert any("8 GPUs, max_staleness 0: " in line for line in lines)
    assert len(advise(folder, 6)) == 3


def test_waiting_does_not_count_as_work(tmp_path):
    folder = write_run(tmp_path / "run", [(16.0, 500.0, 3.0, 0.5, 12.0)] * 3, rollout_actors=2)
    assert measured(folder).reward == 2 * 12.0 / 8, "at most all replicas for all of the step"


def test_a_run_without_iterations_gets_no_advice(tmp_path):
    assert measured(write_run(tmp_path / "run", [])) is None
    assert "no advice" in advise(tmp_path / "run")[0]
    with pytest.raises(ValueError, match="config.yaml"):
        advise(tmp_path)
