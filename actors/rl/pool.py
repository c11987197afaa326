"""The rollout actors as one: whoever is idle is asked, and who dies is asked again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, RayActorError

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.telemetry.timeline import Diary

#: Seconds until an actor that is gone is looked after again; twice as long each time, up to the second.
_LOOK_AFTER = 0.5, 10.0
#: Ray says that an actor has died, and not that it is away for a while, so many times in a row: it does not come back.
_DEAD_FOR_GOOD = 5


class RolloutPool:
    """Gives each request to an idle actor, with the weights it asks for. For use inside an asyncio loop.

    An actor that dies is restarted by Ray, and its request made again by another: names make the same groups again.
    Until it has loaded the model it is asked for nothing: a call to an actor that is being restarted fails, which is no
    second death, or waits for it where another is idle.

    Args:
        actors: handles of ``RolloutActor``. store: handle of the ``WeightStore``. scribe: is told of lost actors.
        diary: of what each actor did when.
        hang_timeout_s: an actor that has been at a request for so many seconds hangs, and is started again; None: never.

    ``lost`` counts the actors that died.
    """

    def __init__(
        self, actors: list, store: Any, scribe: Any, diary: Diary | None = None, hang_timeout_s: float | None = None
    ):
        self.actors, self.store, self.scribe = actors, store, scribe
        self.diary, self.lost, self.hang_timeout_s = diary or Diary(), 0, hang_timeout_s
        self.idle: asyncio.Queue = asyncio.Queue()
        self.left = len(actors)  # those that have not died for good
        self.looked_for: dict[int, asyncio.Future] = {}  # version -> the store's answer that is under way
        self.busy: set[asyncio.Future] = set()
        for place in enumerate(actors):
            self.idle.put_nowait(place)

    async def ready(self) -> int:
        """The number of actors that have loaded the model, once none is on its way. Raises RuntimeError where none comes, and
        the RayActorError of one that cannot load it."""
        loaded = sum(await asyncio.gather(*(self._loaded(actor, again=False) for actor in self.actors)))
        if not loaded:
            raise RuntimeError(
                f"all {len(self.actors)} rollout actors died while they loaded the model, and do not come back"
            )
        return loaded

    def begin(self) -> None:
        """A learner begins: a version's weights are now its own, whoever published that number before."""
        self.looked_for.clear()

    async def sample(self, request: SampleRequest, version: int) -> tuple[np.ndarray, Any, float]:
        """Images, a reference to the chain, and the seconds an actor was busy with them."""

        async def ask(actor, weights, publication):
            begun = time.time()
            images, chain = actor.sample.remote(request, publication, weights)
            return await images, chain, time.time() - begun

        return await self._ask(version, "request", "sample", ask)

    async def save(self, version: int, folder: str) -> None:
        """Writes the model with the weights of ``version``, on an actor because it has the model."""
        await self._ask(
            version,
            "saving",
            "checkpoint",
            lambda actor, weights, publication: actor.save.remote(publication, weights, folder),
        )

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    async def _ask(self, version: int, what: str, phase: str, ask: Callable[[Any, Any, int], Awaitable]) -> Any:
        # Outside the loop: a store that has died stays dead, and is a fault of the run.
        weights, publication = await self._weights(version)
        while True:
            number, actor = await self._idle()
            try:
                with self.diary.span("rollout", number, phase):
                    call = asyncio.ensure_future(ask(actor, weights, publication))
                    self._busy(call, number, actor, what)
                    # The call goes on where this task is cancelled: what an actor has begun it ends, and is idle then.
                    return await asyncio.shield(call)
            except RayActorError:
                pass  # told of where the actor is looked after

    async def _weights(self, version: int) -> tuple[Any, int]:
        """A version's weights by reference, and the number of their publication; asked for once where many ask."""
        call = self.looked_for.get(version)
        if call is None:
            call = self.looked_for[version] = asyncio.ensure_future(_answer(self.store.get.remote(version)))
            call.add_done_callback(lambda _: self.looked_for.get(version) is call and self.looked_for.pop(version))
        weights, publication = await asyncio.shield(call)
        return weights, publication

    async def _idle(self) -> tuple[int, Any]:
        place = await self.idle.get()
        if place is None:
            self.idle.put_nowait(None)  # for the next one who asks
            raise RuntimeError(f"all {len(self.actors)} rollout actors have died and do not come back")
        return place

    def _busy(self, call: asyncio.Future, number: int, actor: Any, what: str) -> None:
        self.busy.add(call)

        def ended(_: asyncio.Future) -> None:
            self.busy.discard(call)
            error = None if call.cancelled() else call.exception()
            if isinstance(error, RayActorError):
                self.lost += 1
                self._tell(f"rollout actor lost, {what} repeated: {error}")
                follow = asyncio.ensure_future(self._look_after(number, actor))
                self.busy.add(follow)
                follow.add_done_callback(self.busy.discard)
            else:
                self.idle.put_nowait((number, actor))

        call.add_done_callback(ended)
        if self.hang_timeout_s is not None:
            late = asyncio.get_running_loop().call_later(self.hang_timeout_s, self._start_again, number, actor)
            call.add_done_callback(lambda _: late.cancel())

    def _start_again(self, number: int, actor: Any) -> None:
        """Kills an actor that hangs: its call fails then as if it had died."""
        self._tell(
            f"rollout actor {number} has not answered for {self.hang_timeout_s:g} s (faults.hang_timeout_s) and is "
            "started again"
        )
        ray.kill(actor, no_restart=False)

    async def _look_after(self, number: int, actor: Any) -> None:
        """Waits until a lost actor has loaded the model again, and asks it again from then on."""
        if await self._loaded(actor):
            return self.idle.put_nowait((number, actor))
        self.left -= 1
        self._tell(f"rollout actor {number} does not come back; {self.left} left")
        if not self.left:
            self.idle.put_nowait(None)

    async def _loaded(self, actor: Any, again: bool = True) -> bool:
        """Waits until an actor has loaded the model, however often it dies on the way; False where it does not come back.

        Unless it has loaded it before (``again``), an error of its own while it does is raised: it would come each time.
        """
        pause, died = _LOOK_AFTER[0], 0
        while died < _DEAD_FOR_GOOD:
            try:
                await actor.ready.remote()
                return True
            except RayActorError as error:
                if error.actor_init_failed and not again:
                    raise
                died = died + 1 if isinstance(error, ActorDiedError) else 0
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LOOK_AFTER[1])
        return False

    def _tell(self, message: str) -> None:
        self.scribe.append.remote("warning", {"message": message})


async def _answer(call: Awaitable) -> Any:
    return await call
