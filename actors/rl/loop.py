"""The loop of the stage rl, apart from Ray: it knows the other roles by what it can ask of them.

One loop serves every staleness bound: iteration i is dispatched when the policy allows it for
the newest weights, sampled, scored group by group, and handed to the learner whole.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from rlproxi.algorithms.base import Algorithm, share
from rlproxi.algorithms.requests import SampleRequest, no_images
from rlproxi.config.loading import Config
from rlproxi.errors import is_out_of_memory
from rlproxi.rewards import RewardError

from ..rewards.service import RewardClient
from .evaluator import Evaluator
from .observer import Observer, Told
from .pool import RolloutPool
from .scored import Scored, tell_provenance, told_of_rollouts
from .staleness import Ledger, StalenessPolicy, Stamp
from .stops import LOST, OUT_OF_MEMORY


class Loop:
    """Runs rollouts and rewards ahead of the learner, as far as staleness and bytes allow.

    Args:
        pool: samples (``sample``), and forgets what it knew of the learner before (``begin``). client: scores
            (``total``, ``provenance``). scribe: an actor's handle, for ``append`` and ``stop``. evaluator:
            ``evaluate``, ``guard``. observer: None where nothing is told beside the numbers.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        pool: RolloutPool,
        client: RewardClient,
        scribe: Any,
        evaluator: Evaluator | None = None,
        observer: Observer | None = None,
    ):
        self.config, self.algorithm, self.pool, self.client = config, algorithm, pool, client
        self.scribe, self.evaluator, self.observer = scribe, evaluator, observer
        # What the learner samples for itself is sampled with the weights it has.
        bound = config.rl.max_staleness if algorithm.needs_rollouts else 0
        self.ledger = Ledger(
            StalenessPolicy(bound),
            config.rl.max_bytes_in_flight,
            config.rl.micro_batches * algorithm.bytes_per_micro_batch(),
        )
        self.changed = asyncio.Condition()
        self.begun: int | None = None  # the iteration that the learner started from
        self.ready: dict[int, dict[int, Scored]] = {}
        self.answers: dict[int, dict | None] = {}  # what the first rank was told of an iteration, all are told
        self.stopped: str | None = None
        self.lost = False  # stopped because a role is lost that the driver replaces
        self.leaving = False  # what is trained so far is saved, and no more is begun
        self.end: int | None = None  # the first iteration that will not be trained; what is trained so far is saved
        self.tasks: set[asyncio.Task] = set()
        self.last_commit = time.time()

    @property
    def version(self) -> int:
        """That of the newest weights."""
        return self.ledger.version

    # -- the learner's side ---------------------------------------------------------------

    async def begin(self, iteration: int) -> int:
        """The learner starts (again) at ``iteration`` and has published that version's weights. Returns its life.

        Whatever was in flight is dropped: names make the same groups again.
        """
        self._drop_tasks()
        self.ready.clear()
        self.answers.clear()
        self.end = None
        self.begun = iteration
        life = self.ledger.begin(iteration)
        self.pool.begin()
        if self.observer is not None:
            self.observer.begun()
        self.last_commit = time.time()
        self.scribe.append.remote("resume", {"stage": "rl", "step": iteration})
        self._start(self._dispatch())
        return life

    async def next_batch(self, iteration: int, rank: int = 0, world: int = 1) -> dict | None:
        """The batch of ``iteration`` once it is all scored; None when the run was stopped, {} when RL ends before it,
        {"leave": True} where a checkpoint is to be written first, {"lost": why} where the learner is to begin anew with others.

        Returns {"requests" (pickled once, for all ranks), "rewards" [P, G] of all micro-batches in order, "versions",
        "chains": {j: reference} of those that ``rank`` trains on, "refused": why nothing of it is, or None}; where the
        learner samples, the requests, and None as rewards. Every rank is told the same of an iteration, whatever happens
        between their calls: ranks that part wait for each other in a collective for ever.
        """
        async with self.changed:
            await self.changed.wait_for(lambda: self._has_answer(iteration))
            if iteration not in self.answers:
                self.answers[iteration] = self._answer(iteration)
            answer = self.answers[iteration]
        return self._share(answer, rank, world) if answer and "chains" in answer else answer

    def _share(self, answer: dict, rank: int, world: int) -> dict:
        """One rank's part. With all of it for all ranks, the conductor would serialise, and count references to, the
        square of their number (docs/scaling.md)."""
        updates, count = self.config.rl.updates_per_step, self.config.rl.micro_batches
        mine = [j for update in range(updates) for j in share(count, updates, world, update, rank)]
        return {**answer, "chains": {j: answer["chains"][j] for j in mine}}

    def _complete(self, iteration: int) -> bool:
        return len(self.ready.get(iteration, {})) == self.config.rl.micro_batches

    def _has_answer(self, iteration: int) -> bool:
        ended = self.end is not None and iteration >= self.end
        return iteration in self.answers or self.stopped is not None or ended or self._complete(iteration)

    def _answer(self, iteration: int) -> dict | None:
        """What every rank is told of ``iteration``. What was complete when the run was stopped is still trained on."""
        if self.leaving:
            return {"leave": True}
        if not self._complete(iteration):
            return {} if self.stopped is None else {"lost": self.stopped} if self.lost else None
        entries = [self.ready[iteration][j] for j in range(self.config.rl.micro_batches)]
        self.ledger.check(iteration, (e.stamp for e in entries))
        requests = pickle.dumps([e.request for e in entries], protocol=pickle.HIGHEST_PROTOCOL)
        if not self.algorithm.needs_rollouts:
            return {"requests": requests, "rewards": None}
        rewards = np.concatenate([e.rewards for e in entries])
        masked, broken, refused = float((~np.isfinite(rewards)).all(1).mean()), sum(e.broken for e in entries), None
        if masked > self.config.rewards.max_masked_fraction and broken:
            # Not the scorers' fault: the learner skips it, and goes back to better weights if that goes on.
            refused = (
                f"{broken} of its {rewards.size} samples are NaN or Inf, and {masked:.0%} of the groups have no score "
                f"(rewards.max_masked_fraction = {self.config.rewards.max_masked_fraction})"
            )
        elif masked > self.config.rewards.max_masked_fraction:
            self._mark_stopped(
                f"{masked:.0%} of the groups of iteration {iteration} have no score "
                f"(rewards.max_masked_fraction = {self.config.rewards.max_masked_fraction}); "
                "the warnings in metrics.jsonl say what the scorers answered"
            )
            return None
        return {
            "requests": requests,
            "chains": {j: e.chain for j, e in enumerate(entries)},
            "versions": [e.version for e in entries],
            "rewards": rewards,
            "refused": refused,
        }

    async def commit(
        self, iteration: int, metrics: dict[str, float], spans: Sequence[Told] = (), life: int | None = None
    ) -> None:
        """Iteration done, and the weights of version ``iteration + 1`` published. ``spans``: see ``Observer``.

        Raises RuntimeError where it is not this iteration's turn, or not this learner's: ``life`` is what ``begin``
        told it.
        """
        if self.answers.get(iteration) is None:
            raise RuntimeError(f"iteration {iteration} is committed, and no learner of this life was given it")
        in_flight = self.ledger.budget.used
        self.ledger.commit(iteration, life)
        done = self.ready.pop(iteration)
        self.answers.pop(iteration)  # every rank has trained on it, so none will ask
        async with self.changed:
            self.changed.notify_all()
        # Waited for: the learner goes on to write the checkpoint that has this step behind it.
        await self._tell(iteration, [done[j] for j in sorted(done)], metrics, spans, in_flight)
        if iteration == self.begun:
            # By now they have measured their micro-batch.
            tuned = [reward for reward in self.config.rewards.train if reward.tune_micro_batch]
            await tell_provenance(tuned, self.client, self.scribe)

    def _tell(
        self, iteration: int, entries: list[Scored], metrics: dict[str, float], spans: Sequence[Told], in_flight: int
    ) -> Awaitable[None]:
        """The iteration's record, and what the observer adds to it."""
        now = time.time()
        images = sum(e.request.images for e in entries)
        record = {
            "stage": "rl",
            "step": iteration + 1,
            **metrics,
            **(told_of_rollouts(entries, in_flight) if self.algorithm.needs_rollouts else {}),
            "seconds/step": now - self.last_commit,
            "images_per_second": images / max(now - self.last_commit, 1e-9),
        }
        if self.observer is not None:
            record |= self.observer.committed(iteration, self.last_commit, now, images, spans)
            self.observer.show(iteration, entries[0].version, entries)
        self.last_commit = now
        return self.scribe.append.remote("metrics", record)

    async def leave(self, reason: str) -> None:
        """Ends the run with the iteration under way, whose weights the learner saves as a checkpoint."""
        async with self.changed:
            self.leaving = True
            self._mark_stopped(reason)

    async def stop(self, reason: str, kind: str = "") -> None:
        """Ends the run with a message for the user (``kind``: see Scribe); an incomplete batch is None from now on."""
        async with self.changed:
            self._mark_stopped(reason, kind)

    def _mark_stopped(self, reason: str, kind: str = "") -> None:
        if self.stopped is None:  # told once: a later fault must not end what the driver may have started again
            self.stopped, self.lost = reason, kind == LOST
            self.scribe.stop.remote(reason, kind)
            self.changed.notify_all()  # so the caller holds the lock

    async def close(self) -> None:
        """Drops what is in flight and waits until all is written."""
        self._drop_tasks()
        if self.observer is not None:
            await self.observer.close()

    # -- rollouts and rewards -------------------------------------------------------------

    def _drop_tasks(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.tasks.clear()

    def _start(self, work: Coroutine) -> None:
        task = asyncio.create_task(self._or_stop(work, self.ledger.life))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _or_stop(self, work: Coroutine, life: int) -> None:
        """Turns a fault of the loop into a stop with its words, instead of a learner that waits for ever."""
        try:
            await work
        except Exception as error:
            if life != self.ledger.life:
                return  # of work that was dropped
            if is_out_of_memory(error):
                await self.stop(f"out of memory: {getattr(error, 'cause', None) or error}", OUT_OF_MEMORY)
            elif isinstance(error, RayActorError):  # rollout actors are asked again, so it was the weight store
                await self.stop(f"the weight store is lost ({' '.join(str(error).split())[:200]})", LOST)
            else:
                await self.stop(f"{type(error).__name__}: {error}")

    async def _until(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition; False when the run was stopped, now or meanwhile."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.stopped is not None or condition())
        return self.stopped is None

    async def _dispatch(self) -> None:
        every = self.config.evaluate.every
        for iteration in range(self.begun, self.algorithm.steps):
            if not await self._until(self.ledger.within_bound):
                return
            if every and iteration % every == 0 and iteration > 0:
                await self.evaluator.evaluate(
                    f"step-{iteration:06d}", [self.config.sampler.num_inference_steps], self.version
                )
                if self.evaluator.guard.should_stop:
                    return await self._finish(iteration)
            if not await self._until(self.ledger.has_room):
                return
            stamp = self.ledger.dispatch()
            for j, request in enumerate(self.algorithm.requests(iteration)):
                if self.algorithm.needs_rollouts:
                    self._start(self._produce(j, request, stamp))
                else:
                    await self._hand_over(j, Scored(request, stamp))

    async def _finish(self, end: int) -> None:
        """RL ends before iteration ``end``; what was dispatched earlier is still trained on."""
        guard = self.evaluator.guard
        self.scribe.append.remote(
            "note",
            {
                "message": f"RL ends early: {guard.below} evaluations in a row far below "
                f"iteration {guard.best.iteration} (evaluate.patience)"
            },
        )
        async with self.changed:
            self.end = end
            self.changed.notify_all()

    async def _produce(self, j: int, request: SampleRequest, stamp: Stamp) -> None:
        images, chain, seconds = await self.pool.sample(request, stamp.version)
        sampled = time.time()
        broken = no_images(images)
        images = np.asarray(images)
        rewards, parts = await self._score(images, request)
        if broken.any():
            rewards = self._without_broken(rewards, broken, request)
        shown = self.observer.keep(stamp.iteration, j, request, images) if self.observer is not None else None
        await self._hand_over(
            j,
            Scored(
                request,
                stamp,
                chain,
                rewards,
                parts,
                {"rollout": seconds, "reward": time.time() - sampled},
                shown,
                int(broken.sum()),
            ),
        )

    async def _hand_over(self, j: int, scored: Scored) -> None:
        async with self.changed:
            # An iteration that a stop left incomplete stays so. What was cancelled may yet come: its answer was there.
            if self.stopped is None and self.ledger.in_flight(scored.stamp):
                entries = self.ready.setdefault(scored.stamp.iteration, {})
                entries[j] = scored
                if self._complete(scored.stamp.iteration):
                    self.changed.notify_all()

    async def _score(self, images: np.ndarray, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards [P, G] and their parts, each [P, G]."""
        groups = np.split(images, len(request.prompts))
        answers = await asyncio.gather(
            *(self._total(group, prompt, request.step) for group, prompt in zip(groups, request.prompts))
        )
        return (
            np.stack([total for total, _ in answers]),
            {name: np.stack([parts[name] for _, parts in answers]) for name in answers[0][1]},
        )

    def _without_broken(self, rewards: np.ndarray, broken: np.ndarray, request: SampleRequest) -> np.ndarray:
        """Rewards [P, G] without those of samples that are no images: NaN, as rewards.on_failure says of a missing score."""
        broken = broken.reshape(rewards.shape)
        if self.config.rewards.on_failure != "mask_sample":
            broken = np.broadcast_to(broken.any(1, keepdims=True), rewards.shape)
        message = (
            f"{int(broken.sum())} samples of step {request.step} count as missing, because some of a group's are NaN "
            "or Inf: lower the learning rate or sampler.guidance_scale, or set model.precision=float32"
        )
        self.scribe.append.remote("warning", {"message": message})
        return np.where(broken, np.float32("nan"), rewards)

    async def _total(self, images: np.ndarray, prompt: str, step: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards [G] of a group and their parts; one that cannot be scored is NaN, logged, and counted later."""
        try:
            return await self.client.total(images, prompt)
        except RewardError as error:
            message = f"group {prompt!r} of step {step} has no score: {error}"
            self.scribe.append.remote("warning", {"message": message})
            if self.config.rewards.on_failure == "stop":
                await self.stop(f"{error} (rewards.on_failure = stop)")
            missing = np.full(len(images), np.nan, np.float32)
            return missing, {r.name: missing for r in self.config.rewards.train}
