"""The rollout actors as a pool: it asks one that is idle, and asks again where an actor dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.telemetry.timeline import Diary

from .messages import Images, Sampled, WeightsVersion

#: How often in a row Ray may answer that an actor has died before the pool gives the actor up.
_DEAD_FOR_GOOD = 5


class RolloutPool:
    """Gives each request to an idle actor, with the weights it asks for. For use inside an asyncio loop.

    Ray restarts an actor that dies, and the pool repeats its request on another: names make the same groups again. The
    pool asks a restarted actor for nothing until it has loaded the model: a call before that would fail or wait.

    Args:
        actors, store, log: handles. diary: takes the spans of each actor.
        hang_timeout_s: an actor that has worked on a request for so many seconds hangs, and is restarted; None: never.
        look_after_s: seconds between two looks at an actor that is gone: the first, which doubles up to the second.

    ``lost`` counts the actors that died.
    """

    def __init__(
        self,
        actors: list[Any],
        store: Any,
        log: Any,
        diary: Diary | None = None,
        hang_timeout_s: float | None = None,
        look_after_s: tuple[float, float] = (0.5, 10.0),
    ):
        self.actors, self.store, self.log = actors, store, log
        self.diary, self.lost = diary or Diary(), 0
        self.hang_timeout_s, self.look_after_s = hang_timeout_s, look_after_s
        self.idle: asyncio.Queue[tuple[int, Any] | None] = asyncio.Queue()  # None: no actor is left
        self.left = len(actors)  # those that have not died for good
        self.fetching: dict[int, asyncio.Future[WeightsVersion]] = {}  # version -> the store's answer on its way
        self.busy: set[asyncio.Future] = set()
        for place in enumerate(actors):
            self.idle.put_nowait(place)

    async def ready(self) -> int:
        """Wait until every actor has loaded the model or is given up; returns how many have.

        Raises RuntimeError where none has, and the RayActorError of one that fails to load it.
        """
        loaded = sum(await asyncio.gather(*(self._loaded(actor, again=False) for actor in self.actors)))
        if not loaded:
            raise RuntimeError(
                f"all {len(self.actors)} rollout actors died while they loaded the model, and do not come back"
            )
        return loaded

    def begin(self) -> None:
        """A learner begins: forget what an earlier learner published as a version that has the same number."""
        self.fetching.clear()

    async def sample(self, request: SampleRequest, version: int) -> Sampled:
        """The samples of a request, by the weights of ``version``. Their chain stays where it is, as a reference."""

        async def ask(actor: Any, held: WeightsVersion) -> Sampled:
            begun = time.time()
            answer, chain = actor.sample.remote(request, held.publication, held.weights)
            made: Images = await answer
            return Sampled(made.images, made.finite, chain, time.time() - begun)

        return await self._ask(version, "request", "sample", ask)

    async def save(self, version: int, folder: str) -> None:
        """Write the model with the weights of ``version`` to ``folder``, on an actor because it holds the model."""

        async def ask(actor: Any, held: WeightsVersion) -> None:
            await actor.save.remote(held.publication, held.weights, folder)

        await self._ask(version, "saving", "checkpoint", ask)

    def close(self) -> None:
        """Kill all actors."""
        for actor in self.actors:
            ray.kill(actor)

    async def _ask(
        self, version: int, what: str, phase: str, ask: Callable[[Any, WeightsVersion], Awaitable[Any]]
    ) -> Any:
        # Outside the loop: a store that has died stays dead, and is a fault of the run.
        weights = await self._weights(version)
        while True:
            number, actor = await self._idle()
            try:
                with self.diary.span("rollout", number, phase):
                    call = asyncio.ensure_future(ask(actor, weights))
                    self._busy(call, number, actor, what)
                    # The call goes on where this task is cancelled: the actor finishes it, and is idle then.
                    return await asyncio.shield(call)
            except RayActorError:
                pass  # ``_busy`` warns of it

    async def _weights(self, version: int) -> WeightsVersion:
        """Where a version's weights are; one call to the store serves all who ask at the same time."""
        call = self.fetching.get(version)
        if call is None:
            call = self.fetching[version] = asyncio.ensure_future(self.store.get.remote(version))
            call.add_done_callback(lambda _: self.fetching.get(version) is call and self.fetching.pop(version))
        return await asyncio.shield(call)

    async def _idle(self) -> tuple[int, Any]:
        place = await self.idle.get()
        if place is None:
            self.idle.put_nowait(None)  # for the next caller
            raise RuntimeError(f"all {len(self.actors)} rollout actors have died and do not come back")
        return place

    def _busy(self, call: asyncio.Future, number: int, actor: Any, what: str) -> None:
        self.busy.add(call)

        def ended(_: asyncio.Future) -> None:
            self.busy.discard(call)
            error = None if call.cancelled() else call.exception()
            if isinstance(error, RayActorError):
                self.lost += 1
                self.log.warn.remote(f"rollout actor lost, {what} repeated: {error}")
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
        """Kill an actor that hangs: its call then fails as if the actor had died."""
        self.log.warn.remote(
            f"rollout actor {number} has not answered for {self.hang_timeout_s:g} s (faults.hang_timeout_s) and is "
            "started again"
        )
        ray.kill(actor, no_restart=False)

    async def _look_after(self, number: int, actor: Any) -> None:
        """Wait until a lost actor has loaded the model again; it is idle from then on."""
        if await self._loaded(actor):
            return self.idle.put_nowait((number, actor))
        self.left -= 1
        self.log.warn.remote(f"rollout actor {number} does not come back; {self.left} left")
        if not self.left:
            self.idle.put_nowait(None)

    async def _loaded(self, actor: Any, again: bool = True) -> bool:
        """Wait until an actor has loaded the model, however often it dies meanwhile; False where it does not come back.

        ``again``: the actor has loaded it before. Else an error in its constructor is raised: it would come each time.
        """
        (pause, longest), died = self.look_after_s, 0
        while died < _DEAD_FOR_GOOD:
            try:
                await actor.ready.remote()
                return True
            except RayActorError as error:
                if error.actor_init_failed and not again:
                    raise
                died = died + 1 if isinstance(error, ActorDiedError) else 0
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        return False
