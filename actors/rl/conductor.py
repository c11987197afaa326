"""The conductor: the actor that starts the rollout actors, connects all roles and runs the loop (``loop.Loop``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from rlproxi.algorithms.base import build_algorithm
from rlproxi.config.loading import Config
from rlproxi.telemetry.timeline import Diary

from ..cluster.resources import actor_options
from ..rewards.service import RewardClient
from .evaluator import Evaluator
from .loop import Loop, log_provenance
from .messages import Answer, Trained
from .observer import Observer
from .pool import RolloutPool
from .rollout_actor import RolloutActor
from .stops import Cause


# Every rank of the learner waits in a call of its own, and the first rank's commit must get through meanwhile.
@ray.remote(num_cpus=0, max_concurrency=100_000)  # type: ignore[call-overload]  # Ray's stubs lack max_concurrency
class Conductor:
    """Ray's side of the loop. Starts loading the rollout actors' models at once; ``connect`` makes the rest."""

    def __init__(self, config: Config, run_dir: str, model_folder: str, log: Any, store: Any):
        self.config, self.run_dir, self.log = config, Path(run_dir), log
        self.loop: Loop | None = None  # made by ``connect``, where the run has a stage rl
        # To a type checker it is still a plain class: it does not see what ray.remote makes of it.
        actor: Any = RolloutActor
        count, options = config.resources.rollout_actors, actor_options(config, "rollout")
        actors = [actor.options(**options).remote(config, model_folder) for _ in range(count)]
        self.pool = RolloutPool(actors, store, log, Diary(), config.faults.hang_timeout_s)

    async def connect(self, apps: dict[str, str]) -> int:
        """Connect to the deployed rewards (scorer -> Serve application), and wait until the rollout actors have loaded
        the model; returns the number of these actors."""
        config, pool = self.config, self.pool
        client = RewardClient(config.rewards, apps, pool.diary)
        self.evaluator = Evaluator(config, self.run_dir, self.log, client, pool)
        if "rl" in config.run.stages:
            algorithm = build_algorithm(config)
            lost = lambda: pool.lost + len(client.lost)  # noqa: E731
            observer = Observer(config, self.run_dir, self.log, pool.diary, lost, algorithm.needs_rollouts)
            self.loop = Loop(config, algorithm, pool, client, self.log, self.evaluator, observer)
        await log_provenance([*config.rewards.train, *config.rewards.heldout], client, self.log)
        return await pool.ready()

    async def evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float = 1.0) -> dict:
        """See ``Evaluator.evaluate``."""
        return await self.evaluator.evaluate(tag, step_counts, version, guidance_scale)

    def _running(self) -> Loop:
        if self.loop is None:
            raise RuntimeError("the conductor runs no loop: run.stages lacks rl, or connect was not called")
        return self.loop

    async def begin(self, iteration: int) -> int:
        """See ``Loop.begin``."""
        return await self._running().begin(iteration)

    async def next_batch(self, iteration: int, rank: int = 0, world: int = 1) -> Answer:
        """See ``Loop.next_batch``."""
        return await self._running().next_batch(iteration, rank, world)

    async def commit(self, trained: Trained) -> None:
        """See ``Loop.commit``."""
        await self._running().commit(trained)

    async def alive(self) -> bool:
        """False once the loop was stopped for good. Any answer shows that the process runs."""
        return self.loop is None or self.loop.stopped is None

    async def open(self) -> bool:
        """Whether a learner can begin here."""
        return self.loop is not None and self.loop.stopped is None

    async def leave(self, reason: str) -> None:
        """See ``Loop.leave``."""
        if self.loop is not None:
            await self.loop.leave(reason)

    async def stop(self, reason: str, cause: Cause = Cause.ENDED) -> None:
        """See ``Loop.stop``."""
        if self.loop is not None:
            await self.loop.stop(reason, cause)

    async def close(self) -> None:
        """End the loop and the rollout actors."""
        if self.loop is not None:
            await self.loop.close()
        self.pool.close()
