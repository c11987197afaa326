"""The pool of rollout actors, in this process: actors that hang, or die while they load."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from actors.rl import pool
from actors.rl.messages import WeightsVersion
from fixtures.local_actors import Local, local_log
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
        return WeightsVersion(version, 1, "weights")


def test_an_actor_that_hangs_is_started_again_and_asked_again(tmp_path, monkeypatch):
    async def main() -> Hanging:
        actor, kept = Hanging(), []

        def kill(handle, no_restart):
            kept.append(no_restart)
            handle.thing.killed.set()

        monkeypatch.setattr(pool, "ray", SimpleNamespace(kill=kill))
        rollouts = pool.RolloutPool([Local(actor)], Local(Store()), local_log(tmp_path), hang_timeout_s=0.05)
        await asyncio.wait_for(rollouts.save(0, "best"), 5)
        assert kept == [False] and rollouts.lost == 1
        return actor

    assert asyncio.run(main()).calls == 2
    warnings = [r["message"] for r in read(tmp_path) if r["event"] == "warning"]
    assert (
        "rollout actor 0 has not answered for 0.05 s (faults.hang_timeout_s)" in warnings[0]
        and "repeated" in warnings[1]
    )


class Loading:
    """An actor that dies twice while it loads the model; or for ever."""

    def __init__(self, deaths=2, error=ActorDiedError):
        self.deaths, self.error = deaths, error

    async def ready(self):
        self.deaths -= 1
        if self.deaths >= 0:
            raise self.error()
        return True


def test_the_pool_waits_for_an_actor_that_dies_while_it_loads(tmp_path):
    def ready(*actors):
        handles, log = [Local(actor) for actor in actors], local_log(tmp_path)
        return asyncio.run(pool.RolloutPool(handles, Local(Store()), log, look_after_s=(0.001, 0.01)).ready())

    assert ready(Loading(), Loading(0)) == 2 and ready(Loading(1000), Loading(0)) == 1
    with pytest.raises(RuntimeError, match="all 1 rollout actors died while they loaded the model"):
        ready(Loading(1000))
    with pytest.raises(ActorDiedError):
        ready(Loading(1, lambda: Broken()))


class Broken(ActorDiedError):
    actor_init_failed = True
