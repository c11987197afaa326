"""The rollout actors as one: whoever is idle is asked, and who dies is asked again."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Awaitable, Callable

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.telemetry.timeline import Diary


class RolloutPool:
    """Gives each request to an idle actor, with the weights it asks for. For use inside an asyncio loop.

    An actor that dies is restarted by Ray, and its request made again: names make the same groups again.

    Args:
        actors: handles of ``RolloutActor``. store: handle of the ``WeightStore``. scribe: is told of lost actors.
        diary: of what each actor did when.

    ``lost`` counts the actors that died.
    """

    def __init__(self, actors: list, store: Any, scribe: Any, diary: Diary | None = None):
        self.actors, self.store, self.scribe = actors, store, scribe
        self.diary, self.lost = diary or Diary(), 0
        self.given: dict[int, tuple[int, str]] = {}  # actor -> the version it was asked for last, and which weights those were
        self.idle: asyncio.Queue = asyncio.Queue()
        for place in enumerate(actors):
            self.idle.put_nowait(place)

    async def ready(self) -> int:
        """The number of actors, once all have loaded the model."""
        return len(await asyncio.gather(*(actor.ready.remote() for actor in self.actors)))

    async def sample(self, request: SampleRequest, version: int) -> tuple[np.ndarray, ray.ObjectRef, float]:
        """Images, a reference to the chain, and the seconds an actor was busy with them."""
        async def ask(actor, weights):
            begun = time.time()
            images, chain = actor.sample.remote(request, version, weights)
            return await images, chain, time.time() - begun

        return await self._ask(version, "request", "sample", ask)

    async def save(self, version: int, folder: str) -> None:
        """Writes the model with the weights of ``version``, on an actor because it has the model."""
        await self._ask(version, "saving", "checkpoint", lambda actor, weights: actor.save.remote(version, weights, folder))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    async def _ask(self, version: int, what: str, phase: str, ask: Callable[[Any, ray.ObjectRef], Awaitable]) -> Any:
        # Outside the loop: a store that has died stays dead, and is a fault of the run.
        (weights,) = await self.store.get.remote(version)
        while True:
            number, actor = await self.idle.get()
            try:
                if self.given.get(number, (None,))[0] == version and self.given[number][1] != repr(weights):
                    actor.forget.remote()  # after a rollback a version is made anew, of other weights
                self.given[number] = (version, repr(weights))
                with self.diary.span("rollout", number, phase):
                    return await ask(actor, weights)
            except RayActorError as error:
                self.lost += 1
                self.scribe.append.remote("warning", {"message": f"rollout actor lost, {what} repeated: {error}"})
            finally:
                self.idle.put_nowait((number, actor))
