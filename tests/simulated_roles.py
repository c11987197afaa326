"""Rollout actors, a weight store and a log for the conductor's real loop and pool, on virtual time.

What they make says who made it: an image's pixels and a chain carry the weights and the request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Awaitable, Callable
from unittest import mock

import numpy as np
from local_actors import Local, undecorated
from ray.exceptions import ActorUnavailableError

from actors.rollout import RolloutActor
from actors.weights import WeightStore
from rlproxi.algorithms.requests import SampleRequest


@dataclass
class Chain:
    """In place of a reference: which weights sampled which request."""

    weights: Any = None
    request: SampleRequest | None = None


class Rollout:
    """The actor's own code, without a network. ``work(request)`` takes a call's time,
    ``fresh(weights)`` that of new weights.

    When it dies its calls fail, and so does every call until it is back, at once. (Ray fails the first few of them,
    and holds the others until it is back.)
    """

    def __init__(self, work: Callable[[SampleRequest], Awaitable[None]], restart_s: float = 5.0,
                 fresh: Callable[[Any], Awaitable[None]] | None = None, pixels: int = 1):
        self.work, self.fresh, self.restart_s, self.pixels = work, fresh, restart_s, pixels
        self.calls, self.deaths = 0, 0
        self.alive = asyncio.Event()
        self.under_way: asyncio.Future | None = None
        self._start()

    def _start(self) -> None:
        self.code = object.__new__(undecorated(RolloutActor))
        self.code.publication = None
        self.code.sampler = SimpleNamespace(take=lambda weights: setattr(self, "weights", weights), sample=self._made)
        self.alive.set()

    def _made(self, request: SampleRequest) -> tuple[np.ndarray, Any]:
        return made_of(request, self.pixels), self.weights

    def die(self) -> None:
        """The process ends; Ray starts another."""
        if not self.alive.is_set():
            return
        self.deaths += 1
        self.alive.clear()
        if self.under_way is not None and not self.under_way.done():
            self.under_way.set_exception(ActorUnavailableError("the actor died", None))
        asyncio.get_running_loop().call_later(self.restart_s, self._start)

    async def ready(self) -> bool:
        self._or_fail()
        return True

    def sample(self, request: SampleRequest, publication: int, weights: Any) -> tuple[Awaitable[np.ndarray], Chain]:
        chain = Chain()
        return asyncio.ensure_future(self._sample(request, publication, weights, chain)), chain

    async def _sample(self, request, publication, weights, chain: Chain) -> np.ndarray:
        self._or_fail()
        self.calls += 1
        died = self.under_way = asyncio.get_running_loop().create_future()
        work = asyncio.ensure_future(self._work(request, publication, weights))
        await asyncio.wait([died, work], return_when=asyncio.FIRST_COMPLETED)
        self.under_way = None
        if died.done():
            work.cancel()
            return died.result()
        images, chain.weights = self.code.sample(request, publication, weights)
        chain.request = request
        return images

    async def _work(self, request: SampleRequest, publication: int, weights: Any) -> None:
        if self.fresh is not None and publication != self.code.publication:
            await self.fresh(weights)
        await self.work(request)

    def _or_fail(self) -> None:
        if not self.alive.is_set():
            raise ActorUnavailableError("the actor is being restarted", None)


class Store:
    """The weight store's own code; what Ray would keep it keeps itself."""

    def __init__(self, keep: int):
        self.code, self.asked = undecorated(WeightStore)(keep), 0

    def publish(self, version: int, weights: Any) -> None:
        with mock.patch("actors.weights.ray.put", lambda weights: weights):
            self.code.publish(version, weights)

    async def get(self, version: int) -> tuple[Any, int]:
        self.asked += 1
        await asyncio.sleep(0)
        return self.code.get(version)


@dataclass(frozen=True)
class Weights:
    """What a learner of one life published; ``nbytes`` as an array has."""

    life: int
    version: int
    nbytes: int = 0


class Log:
    """A scribe that keeps what it is told."""

    def __init__(self):
        self.records: list[tuple[str, dict]] = []
        self.stopped: str | None = None

    def append(self, event: str, fields: dict) -> None:
        self.records.append((event, fields))

    def stop(self, reason: str, kind: str = "") -> None:
        self.stopped = self.stopped or reason


def made_of(request: SampleRequest, pixels: int = 1) -> np.ndarray:
    """Images uint8 [P * G, pixels, pixels, 3], each as bright as its name says: the same group is the same again."""
    values = np.uint8([sum(name) % 251 for name in request.names(0)])
    return np.broadcast_to(values[:, None, None, None], (len(values), pixels, pixels, 3))


def brightness(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).mean(1, dtype=np.float32)


def handles(things: list) -> list[Local]:
    return [Local(thing) for thing in things]
