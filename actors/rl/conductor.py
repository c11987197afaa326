"""The conductor: the only one who knows all roles. It makes the rollout actors, connects the parts, and lends them its
process; which prompt goes to whom is decided in ``loop``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray

from rlproxi.algorithms.base import build_algorithm
from rlproxi.config.loading import Config
from rlproxi.telemetry.timeline import Diary

from ..cluster.join import actor_options
from ..rewards.service import RewardClient
from .evaluator import Evaluator
from .loop import Loop
from .observer import Observer, Told
from .pool import RolloutPool
from .rollout_actor import RolloutActor
from .scored import tell_provenance


# Every rank of the learner waits in a call of its own, and while they wait another must get through: the first rank's
# commit, without which the next batch never comes.
@ray.remote(num_cpus=0, max_concurrency=100_000)
class Conductor:
    """Ray's side of the loop: its calls are the loop's, one for one."""

    def __init__(self, config: Config, run_dir: str, model_folder: str, scribe, store):
        self.config, self.run_dir, self.scribe = config, Path(run_dir), scribe
        self.loop: Loop | None = None  # from ``connect`` on, where there is a stage rl
        options = actor_options(config, "rollout")
        self.pool = RolloutPool(
            [
                RolloutActor.options(**options).remote(config, model_folder)
                for _ in range(config.resources.rollout_actors)
            ],
            store,
            scribe,
            Diary(),
            config.faults.hang_timeout_s,
        )

    async def connect(self, apps: dict[str, str]) -> int:
        """Takes the names of the deployed rewards; once all rollout actors have loaded the model, their number."""
        config, pool = self.config, self.pool
        client = RewardClient(config.rewards, apps, pool.diary)
        self.evaluator = Evaluator(config, self.run_dir, self.scribe, client, pool.sample, pool.save, pool.diary)
        if "rl" in config.run.stages:
            algorithm = build_algorithm(config)
            observer = Observer(
                config,
                self.run_dir,
                self.scribe,
                pool.diary,
                lambda: pool.lost + len(client.lost),
                algorithm.needs_rollouts,
            )
            self.loop = Loop(config, algorithm, pool, client, self.scribe, self.evaluator, observer)
        await tell_provenance([*config.rewards.train, *config.rewards.heldout], client, self.scribe)
        return await pool.ready()

    async def evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float = 1.0) -> dict:
        """See ``Evaluator.evaluate``."""
        return await self.evaluator.evaluate(tag, step_counts, version, guidance_scale)

    async def begin(self, iteration: int) -> int:
        """See ``Loop.begin``, as for the others."""
        return await self.loop.begin(iteration)

    async def next_batch(self, iteration: int, rank: int = 0, world: int = 1) -> dict | None:
        return await self.loop.next_batch(iteration, rank, world)

    async def commit(
        self, iteration: int, metrics: dict[str, float], spans: Sequence[Told] = (), life: int | None = None
    ) -> None:
        await self.loop.commit(iteration, metrics, spans, life)

    async def alive(self) -> bool:
        """False once the loop has stopped for good; that there is an answer tells that this process lives."""
        return self.loop is None or self.loop.stopped is None

    async def open(self) -> bool:
        """Whether a learner can begin here."""
        return self.loop is not None and self.loop.stopped is None

    async def leave(self, reason: str) -> None:
        if self.loop is not None:
            await self.loop.leave(reason)

    async def stop(self, reason: str, kind: str = "") -> None:
        if self.loop is not None:
            await self.loop.stop(reason, kind)

    async def close(self) -> None:
        """Ends the loop and the rollout actors."""
        if self.loop is not None:
            await self.loop.close()
        self.pool.close()
