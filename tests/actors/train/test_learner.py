"""What a learner's rank makes of the conductor's answers, without Ray and without a network."""

from types import SimpleNamespace

import numpy as np
import pytest

from actors.rl.messages import Ended, Leave, Lost, Ready, Stopped, Trained
from actors.rl.stops import RoleLost
from actors.train import learner
from fixtures.local_actors import Local
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.telemetry.timeline import Diary

REQUESTS = [SampleRequest("train", 3, ("a hat",), (7,), 2)]


class Conductor:
    """Gives every rank the same answer, and keeps what is committed."""

    def __init__(self, answer):
        self.answer, self.asked, self.committed = answer, [], []

    def next_batch(self, iteration, rank, world):
        self.asked.append((iteration, rank, world))
        return self.answer

    def commit(self, trained):
        self.committed.append(trained)


def make(monkeypatch, answer, rank=0) -> learner.LearnerRank:
    """A rank that has passed the check before its first update, and waits for a batch."""
    monkeypatch.setattr(learner, "ray", SimpleNamespace(get=lambda answer: answer))
    made = object.__new__(learner.LearnerRank)
    made.stopped = made.leaving = False
    made.__dict__.update(
        conductor=Local(Conductor(answer)), rank=rank, world=2, ema=None, checked=True, attempt=5, diary=Diary()
    )
    return made


def test_a_batch_is_fresh_where_the_newest_weights_sampled_it(monkeypatch):
    rewards = np.zeros((1, 2), np.float32)
    for iteration, fresh in ((3, True), (4, False)):
        rank = make(monkeypatch, Ready(Ready.pickle(REQUESTS), (3,), rewards, {0: "chain"}), rank=1)
        batch = rank.next_batch(iteration)
        assert rank.conductor.thing.asked == [(iteration, 1, 2)]
        assert (batch.iteration, batch.requests, batch.rank, batch.world) == (iteration, REQUESTS, 1, 2)
        assert batch.rewards is rewards and batch.fresh == fresh and batch.refused is None and not rank.stopped


def test_where_the_learner_samples_a_batch_is_its_requests(monkeypatch):
    batch = make(monkeypatch, Ready(Ready.pickle(REQUESTS))).next_batch(3)
    assert batch.requests == REQUESTS and batch.rewards is None and batch.fresh


@pytest.mark.parametrize(
    "answer, stopped, leaving", [(Ended(), False, False), (Stopped(), True, False), (Leave(), True, True)]
)
def test_an_answer_without_a_batch_ends_training(monkeypatch, answer, stopped, leaving):
    rank = make(monkeypatch, answer)
    assert rank.next_batch(3) is None and (rank.stopped, rank.leaving) == (stopped, leaving)


def test_a_lost_role_fails_the_rank_so_that_it_restarts(monkeypatch):
    with pytest.raises(RoleLost, match="the weight store is gone"):
        make(monkeypatch, Lost("the weight store is gone")).next_batch(3)


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_rank_commits_with_its_spans_and_all_forget_theirs(monkeypatch, number):
    rank = make(monkeypatch, Ended(), number)
    rank.diary.note("learner", number, "train", 1.0, 2.0)
    rank.done(3, None, {"loss": 1.0})
    assert rank.diary.take() == []
    for trained in rank.conductor.thing.committed:
        assert (trained.attempt, trained.iteration, trained.metrics) == (5, 3, {"loss": 1.0})
        assert [span.phase for span in trained.spans] == ["train"] and trained.clock > 1e9
    assert [type(trained) for trained in rank.conductor.thing.committed] == ([Trained] if number == 0 else [])
