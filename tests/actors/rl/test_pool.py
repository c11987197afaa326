"""The rollout actors as one, in this process: one that hangs."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from actors.rl import pool
from fixtures.local_actors import Local, local_scribe
from rlproxi.telemetry.runlog import read


class Hanging:
    """A rollout actor whose first call never ends, unless it is killed."""

    def __init__(self):
        self.calls, self.killed = 0, asyncio.Event()

    async def ready(self):
        return True

    async def save(self, *_):
        self.calls += 1
        if self.calls == 1:
            await self.killed.wait()
            raise ActorDiedError()


class Store:
    async def get(self, version):
        return "weights", 1


def test_an_actor_that_hangs_is_started_again_and_asked_again(tmp_path, monkeypatch):
    async def main() -> Hanging:
        actor, kept = Hanging(), []

        def kill(handle, no_restart):
            kept.append(no_restart)
            handle.thing.killed.set()

        monkeypatch.setattr(pool, "ray", SimpleNamespace(kill=kill))
        rollouts = pool.RolloutPool([Local(actor)], Local(Store()), local_scribe(tmp_path), hang_timeout_s=0.05)
        await asyncio.wait_for(rollouts.save(0, "best"), 5)
        assert kept == [False] and rollouts.lost == 1
        return actor

    assert asyncio.run(main()).calls == 2
    told = [r["message"] for r in read(tmp_path) if r["event"] == "warning"]
    assert "rollout actor 0 has not answered for 0.05 s (faults.hang_timeout_s)" in told[0] and "repeated" in told[1]


class Loading:
    """An actor that dies twice while it loads the model; or for ever."""

    def __init__(self, deaths=2, error=ActorDiedError):
        self.deaths, self.error = deaths, error

    async def ready(self):
        self.deaths -= 1
        if self.deaths >= 0:
            raise self.error()
        return True


def test_who_dies_while_it_loads_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_LOOK_AFTER", (0.001, 0.01))

    def ready(*actors):
        return asyncio.run(
            pool.RolloutPool([Local(actor) for actor in actors], Local(Store()), local_scribe(tmp_path)).ready()
        )

    assert ready(Loading(), Loading(0)) == 2 and ready(Loading(1000), Loading(0)) == 1
    with pytest.raises(RuntimeError, match="all 1 rollout actors died while they loaded the model"):
        ready(Loading(1000))
    with pytest.raises(ActorDiedError):
        ready(Loading(1, lambda: Broken()))


class Broken(ActorDiedError):
    actor_init_failed = True
