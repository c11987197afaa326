"""What the observer records beside the numbers, and the spans that pool, reward client and ranks add. Without Ray."""

import asyncio
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from actors.rewards.service import RewardClient
from actors.rl.messages import Images, Scored, Trained, WeightsVersion
from actors.rl.observer import Observer
from actors.rl.pool import RolloutPool
from actors.rl.staleness import Stamp
from fixtures.local_actors import Local, local_log
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import build_config
from rlproxi.rewards import RewardError
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry import timeline
from rlproxi.telemetry.runlog import read
from rlproxi.telemetry.timeline import Diary, Span

CONFIG = {
    "resources": {"rollout_actors": 2},
    "rewards": {"train": [{"name": "attributes"}]},
    "telemetry": {"samples_every": 2, "samples_groups": 3},
}


def make(folder, all_roles=True, lost=lambda: 0, **sections) -> Observer:
    return Observer(build_config({**CONFIG, **sections}), folder, local_log(folder), Diary(), lost, all_roles)


def request(groups: int = 2, size: int = 2) -> SampleRequest:
    return SampleRequest("train", 0, tuple(f"prompt {i}" for i in range(groups)), tuple(range(groups)), size)


def records(folder, event) -> list[dict]:
    return [r for r in read(folder) if r["event"] == event]


def test_an_iterations_line_and_its_idle_shares(tmp_path):
    observer = make(tmp_path)
    observer.begun()
    observer.diary.note("rollout", 0, "sample", 1000.0, 5.0)
    observer.diary.note("reward", "attributes", "score", 1005.0, 1.0)
    # By another clock, at 80 now.
    learner = [Span("learner", 3, "wait", 70.0, 6.0), Span("learner", 3, "train", 76.0, 4.0)]
    with observer.diary.span("rollout", 1, "sample"):
        observer.diary.open = {k: s._replace(start=1008.0) for k, s in observer.diary.open.items()}
        metrics = observer.committed(Trained(1, 0, {}, learner, 80.0), 1000.0, 1010.0, 16)
    # Actor 0 was busy for 5 s, actor 1 for 2 s so far.
    assert metrics == pytest.approx({"idle/rollout": 0.65, "idle/reward": 0.9, "idle/learner": 0.6, "restarts": 0})
    observer.committed(Trained(1, 1, {}), 1010.0, 1020.0, 16)
    asyncio.run(observer.close())
    first, second = timeline.read(tmp_path)
    assert first["spans"] == [
        ("rollout", 0, "sample", 1000.0, 5.0),
        ("reward", "attributes", "score", 1005.0, 1.0),
        ("learner", 0, "wait", 1000.0, 6.0),
        ("learner", 0, "train", 1006.0, 4.0),
    ]
    assert (first["stage"], first["step"], second["step"]) == ("rl", 1, 2)
    assert [s.who for s in second["spans"]] == [1], "each span is in one line: that of the iteration in which it ended"


def test_roles_that_an_algorithm_does_not_use_are_not_idle(tmp_path):
    observer = make(tmp_path, all_roles=False, telemetry={"timeline": False})
    metrics = observer.committed(Trained(1, 0, {}, [Span("learner", 0, "train", 75.0, 5.0)], 80.0), 0.0, 10.0, 16)
    assert metrics == {"idle/learner": 0.5, "restarts": 0}
    asyncio.run(observer.close())
    assert not (RunDirectory(tmp_path).timeline).exists(), "telemetry.timeline = false"


def test_restarts_and_gpus(tmp_path):
    gpus = {"rollout_actors": 2, "rollout_gpus": 1.0, "learner_gpus": 2.0}
    observer = make(tmp_path, lost=lambda: 3, resources=gpus)
    observer.begun()
    assert observer.committed(Trained(1, 0, {}), 0.0, 10.0, 80)["restarts"] == 3
    observer.begun()
    metrics = observer.committed(Trained(1, 0, {}), 0.0, 10.0, 80)
    assert metrics["restarts"] == 4 and metrics["images_per_second/gpu"] == pytest.approx(8 / 4)


def scored(observer, iteration, j, pixel) -> Scored:
    images = np.full((4, 2, 2, 3), pixel, np.uint8)
    images[2:] += 1
    rewards = np.array([[0.0, 1.0], [np.nan, 2.0]], np.float32)
    kept = observer.keep(iteration, j, request(), images)
    stamp = Stamp(1, iteration, iteration)
    return Scored(request(), stamp, None, rewards, {"attributes": rewards}, 0.0, 0.0, 0, kept)


def test_the_first_groups_of_some_iterations_become_a_gallery(tmp_path):
    observer = make(tmp_path)
    for iteration in range(3):
        observer.show(iteration, [scored(observer, iteration, j, 10 * j) for j in range(3)])
    asyncio.run(observer.close())
    assert [(r["step"], r["file"]) for r in records(tmp_path, "samples")] == [
        (1, "samples/000001.json"),
        (2, "samples/000002.json"),
    ]
    shown = json.loads((tmp_path / "samples" / "000001.json").read_text())["groups"]
    assert [(g["prompt"], g["rewards"], g["best"], g["worst"]) for g in shown] == [
        ("prompt 0", [0, 1], 1, 0),
        ("prompt 1", [None, 2], 1, 1),
        ("prompt 0", [0, 1], 1, 0),
    ], "three groups, no more"


def test_a_fault_of_the_disk_is_one_warning(tmp_path):
    observer = make(tmp_path)
    (tmp_path / "samples").write_text("in the way")
    (RunDirectory(tmp_path).timeline).mkdir()
    for iteration in range(4):
        observer.committed(Trained(1, iteration, {}), 0.0, 1.0, 1)
        observer.show(iteration, [scored(observer, iteration, 0, 0)])
    asyncio.run(observer.close())
    (warning,) = records(tmp_path, "warning")
    assert warning["message"].startswith("telemetry: timeline or gallery cannot be written: IsADirectoryError")


class Mortal:
    """A rollout actor that takes a moment, and dies on its first ``deaths`` calls."""

    def __init__(self, deaths: int):
        self.deaths = deaths

    async def ready(self):
        return True

    def sample(self, request, publication, weights):
        return self.images(), "chain"

    async def images(self):
        await self.save()
        return Images(np.zeros((1, 2, 2, 3), np.uint8), np.ones(1, bool))

    async def save(self, *_):
        await asyncio.sleep(0.02)
        self.deaths -= 1
        if self.deaths >= 0:
            raise ActorDiedError()


class Store:
    async def get(self, version):
        return WeightsVersion(version, 1, "weights")


def test_the_pool_notes_who_sampled_when_and_counts_the_lost(tmp_path):
    async def main():
        diary = Diary()
        pool = RolloutPool([Local(Mortal(1)), Local(Mortal(0))], Local(Store()), local_log(tmp_path), diary)
        begun = time.time()
        await asyncio.gather(*(pool.sample(request(), 0) for _ in range(3)))
        await pool.save(0, "best")
        spans = diary.take()
        assert pool.lost == 1 and {s.who for s in spans} == {0, 1} and {s.role for s in spans} == {"rollout"}
        assert [s.phase for s in spans] == ["sample"] * 4 + ["checkpoint"], "the lost one's too"
        assert all(s.seconds >= 0.019 and begun <= s.start and s.end <= time.time() for s in spans)

    asyncio.run(main())


def test_the_reward_client_notes_who_scored_when_and_which_replicas_were_lost(tmp_path):
    """Its handles are Serve's; here, functions in their place."""
    answers = [ActorDiedError(), ActorDiedError(), None, None]

    def method(*arguments):
        async def answer():
            await asyncio.sleep(0.01)
            error = answers.pop(0)
            if error:
                raise error
            return np.zeros(2)

        return answer()

    async def main():
        client = object.__new__(RewardClient)
        handle = SimpleNamespace(score=SimpleNamespace(remote=method), provenance=SimpleNamespace(remote=method))
        client.__dict__.update(
            rewards=SimpleNamespace(retries=0, timeout_s=5),
            diary=Diary(),
            lost=set(),
            handles={"hat": handle},
            places={"hat": asyncio.Semaphore(1)},
        )
        for _ in range(2):
            with pytest.raises(RewardError):
                await client.score("hat", np.zeros((2, 1, 1, 3)), "a hat")
        await client.score("hat", np.zeros((2, 1, 1, 3)), "a hat")
        await client.provenance("hat")
        spans = client.diary.take()
        assert [(s.role, s.who, s.phase) for s in spans] == [("reward", "hat", "score")] * 3
        assert all(s.seconds >= 0.009 for s in spans) and len(client.lost) == 1, "one replica, however many requests"

    asyncio.run(main())
