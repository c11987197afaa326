"""The loop of the stage rl: it dispatches iterations, has them sampled and scored, and hands them to the learner.

It dispatches iteration i once the staleness bound allows the newest weights to sample it, scores it group by group, and
hands it to the learner as a whole. It needs no Ray, only objects that answer as the other roles do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from rlproxi.algorithms.base import Algorithm, share
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import Config
from rlproxi.config.sections import Reward, Rewards
from rlproxi.errors import is_out_of_memory
from rlproxi.rewards import RewardError
from rlproxi.rewards.combine import combine, mean_present

from ..rewards.service import RewardClient
from .evaluator import Evaluator
from .messages import Answer, Dispatched, Ended, Leave, Lost, Ready, Sampled, Scored, Stopped, Trained
from .observer import Observer
from .pool import RolloutPool
from .staleness import Ledger, Stamp
from .stops import Cause


class Loop:
    """Runs rollouts and rewards ahead of the learner, as far as staleness and bytes allow.

    ``pool`` samples, ``client`` scores; ``log`` is the handle of the run-log actor.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        pool: RolloutPool,
        client: RewardClient,
        log: Any,
        evaluator: Evaluator,
        observer: Observer,
    ):
        self.config, self.algorithm, self.pool, self.client = config, algorithm, pool, client
        self.log, self.evaluator, self.observer = log, evaluator, observer
        # Where the learner samples, it does so with its newest weights.
        bound = config.rl.max_staleness if algorithm.needs_rollouts else 0
        size = config.rl.micro_batches * algorithm.bytes_per_micro_batch()
        self.ledger = Ledger(bound, config.rl.max_bytes_in_flight, size)
        self.changed = asyncio.Condition()
        self.begun: int | None = None  # the iteration that the learner started from
        self.ready: dict[int, dict[int, Dispatched]] = {}  # iteration -> number of a micro-batch -> micro-batch
        self.answers: dict[int, Answer] = {}  # iteration -> the first rank's answer, which all ranks get
        self.stopped: str | None = None
        self.lost = False  # stopped because a role is lost that the driver replaces
        self.leaving = False  # the learner is to write a checkpoint and end
        self.end: int | None = None  # the first iteration that will not be trained
        self.tasks: set[asyncio.Task] = set()
        self.last_commit = time.time()

    # -- the learner's side ---------------------------------------------------------------

    async def begin(self, iteration: int) -> int:
        """The learner starts at ``iteration``, with that version published; returns the number of its attempt.

        Drops all that is in flight: names make the same groups again.
        """
        self._drop_tasks()
        self.ready.clear()
        self.answers.clear()
        self.end, self.begun = None, iteration
        attempt = self.ledger.begin(iteration)
        self.pool.begin()
        self.observer.begun()
        self.last_commit = time.time()
        self.log.append.remote("resume", {"stage": "rl", "step": iteration})
        self._start(self._dispatch, iteration)
        return attempt

    async def next_batch(self, iteration: int, rank: int = 0, world: int = 1) -> Answer:
        """What ``rank`` of ``world`` is to do: train on the batch of ``iteration``, once all of it is scored, or end.

        Every rank gets the same answer for an iteration: else they would wait for each other in a collective for ever.
        """
        async with self.changed:
            await self.changed.wait_for(lambda: self._has_answer(iteration))
            answer = self.answers.get(iteration) or self._answer(iteration)
            self.answers[iteration] = answer
        if not (isinstance(answer, Ready) and answer.chains):
            return answer
        # If each rank got all chains, the conductor would serialise the square of their number (docs/scaling.md).
        updates, count = self.config.rl.updates_per_step, self.config.rl.micro_batches
        mine = [j for update in range(updates) for j in share(count, updates, world, update, rank)]
        return replace(answer, chains={j: answer.chains[j] for j in mine})

    def _complete(self, iteration: int) -> bool:
        return len(self.ready.get(iteration, {})) == self.config.rl.micro_batches

    def _has_answer(self, iteration: int) -> bool:
        ended = self.end is not None and iteration >= self.end
        return iteration in self.answers or self.stopped is not None or ended or self._complete(iteration)

    def _answer(self, iteration: int) -> Answer:
        """The answer for every rank. A batch that was complete when the run stopped is still trained on."""
        if self.leaving:
            return Leave()
        if not self._complete(iteration):
            if self.stopped is None:
                return Ended()
            return Lost(self.stopped) if self.lost else Stopped()
        entries = [self.ready[iteration][j] for j in range(self.config.rl.micro_batches)]
        self.ledger.check(iteration, (e.stamp for e in entries))
        pickled = Ready.pickle([e.request for e in entries])
        scored = [e for e in entries if isinstance(e, Scored)]
        if not scored:
            return Ready(pickled)
        limit = self.config.rewards.max_masked_fraction
        rewards = np.concatenate([e.rewards for e in scored])
        masked, broken, refused = float((~np.isfinite(rewards)).all(1).mean()), sum(e.broken for e in scored), None
        if masked > limit:
            setting = f"(rewards.max_masked_fraction = {limit})"
            if not broken:
                self._mark_stopped(
                    f"{masked:.0%} of the groups of iteration {iteration} have no score {setting}; "
                    "the warnings in metrics.jsonl say what the scorers answered"
                )
                return Stopped()
            # Not the scorers' fault: the learner skips it, and goes back to better weights if that goes on.
            samples = f"{broken} of its {rewards.size} samples are NaN or Inf"
            refused = f"{samples}, and {masked:.0%} of the groups have no score {setting}"
        versions, chains = tuple(e.stamp.version for e in scored), {j: e.chain for j, e in enumerate(scored)}
        return Ready(pickled, versions, rewards, chains, refused)

    async def commit(self, trained: Trained) -> None:
        """Take an iteration as done, once the next version is published; returns when its record is in the log.

        Raises RuntimeError where it is another iteration's turn, or where the learner that sends it was replaced.
        """
        iteration = trained.iteration
        if not isinstance(self.answers.get(iteration), Ready):
            raise RuntimeError(f"iteration {iteration} is committed, and no learner of this attempt was given it")
        in_flight = self.ledger.used
        self.ledger.commit(iteration, trained.attempt)
        done = self.ready.pop(iteration)
        self.answers.pop(iteration)  # every rank has trained on it, so none will ask
        async with self.changed:
            self.changed.notify_all()
        # Waited for: the learner goes on to write the checkpoint that has this step behind it.
        await self._log(trained, [done[j] for j in sorted(done)], in_flight)
        if iteration == self.begun:
            # By now the replicas have measured their micro-batch.
            tuned = [reward for reward in self.config.rewards.train if reward.tune_micro_batch]
            await log_provenance(tuned, self.client, self.log)

    def _log(self, trained: Trained, entries: list[Dispatched], in_flight: int) -> Awaitable[None]:
        """Write the iteration's record; ``in_flight``: bytes, before the iteration's were given back."""
        now, iteration = time.time(), trained.iteration
        images = sum(e.request.images for e in entries)
        scored = [e for e in entries if isinstance(e, Scored)]
        record = {
            "stage": "rl",
            "step": iteration + 1,
            **trained.metrics,
            **(rollout_metrics(scored, in_flight, self.config.rewards) if scored else {}),
            "seconds/step": now - self.last_commit,
            "images_per_second": images / max(now - self.last_commit, 1e-9),
            **self.observer.committed(trained, self.last_commit, now, images),
        }
        self.observer.show(iteration, scored)
        self.last_commit = now
        return self.log.append.remote("metrics", record)

    async def leave(self, reason: str) -> None:
        """End the run after the iteration under way; the learner saves its weights as a checkpoint."""
        async with self.changed:
            self.leaving = True
            self._mark_stopped(reason)

    async def stop(self, reason: str, cause: Cause = Cause.ENDED) -> None:
        """End the run with a message for the user. Ranks get no incomplete batch from now on."""
        async with self.changed:
            self._mark_stopped(reason, cause)

    def _mark_stopped(self, reason: str, cause: Cause = Cause.ENDED) -> None:
        if self.stopped is None:  # reported once: a later fault must not end what the driver may have started again
            self.stopped, self.lost = reason, cause is Cause.LOST
            self.log.stop.remote(reason, cause)
            self.changed.notify_all()  # so the caller holds the lock

    async def close(self) -> None:
        """Drop what is in flight, and wait until all is written."""
        self._drop_tasks()
        await self.observer.close()

    # -- rollouts and rewards -------------------------------------------------------------

    def _drop_tasks(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.tasks.clear()

    def _start(self, work: Callable[..., Coroutine], *arguments: Any) -> None:
        task = asyncio.create_task(self._or_stop(self.ledger.attempt, work, *arguments))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _or_stop(self, attempt: int, work: Callable[..., Coroutine], *arguments: Any) -> None:
        """Turns a fault of the loop into a stop with its message, instead of a learner that waits for ever."""
        try:
            await work(*arguments)  # called here: a task that is cancelled before it begins leaves no coroutine behind
        except Exception as error:
            if attempt != self.ledger.attempt:
                return  # an error of work that was dropped
            if is_out_of_memory(error):
                await self.stop(f"out of memory: {getattr(error, 'cause', None) or error}", Cause.OUT_OF_MEMORY)
            elif isinstance(error, RayActorError):  # rollout actors are asked again, so it was the weight store
                await self.stop(f"the weight store is lost ({' '.join(str(error).split())[:200]})", Cause.LOST)
            else:
                await self.stop(f"{type(error).__name__}: {error}")

    async def _until(self, condition: Callable[[], bool]) -> bool:
        """Waits for the condition; False when the run was stopped, now or meanwhile."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.stopped is not None or condition())
        return self.stopped is None

    async def _dispatch(self, start: int) -> None:
        every = self.config.evaluate.every
        for iteration in range(start, self.algorithm.steps):
            if not await self._until(self.ledger.within_bound):
                return
            if every and iteration % every == 0 and iteration > 0:
                steps = [self.config.sampler.num_inference_steps]
                await self.evaluator.evaluate(f"step-{iteration:06d}", steps, self.ledger.version)
                reason = self.evaluator.early_end
                if reason is not None:
                    return await self.end_before(iteration, reason)
            if not await self._until(self.ledger.has_room):
                return
            stamp = self.ledger.dispatch()
            for j, request in enumerate(self.algorithm.requests(iteration)):
                if self.algorithm.needs_rollouts:
                    self._start(self._produce, j, request, stamp)
                else:
                    await self.hand_over(j, Dispatched(request, stamp))

    async def end_before(self, iteration: int, reason: str) -> None:
        """End RL before ``iteration``; the learner still trains on what was dispatched earlier."""
        self.log.append.remote("note", {"message": reason})
        async with self.changed:
            self.end = iteration
            self.changed.notify_all()

    async def _produce(self, j: int, request: SampleRequest, stamp: Stamp) -> None:
        sampled = await self.pool.sample(request, stamp.version)
        begun = time.time()
        rewards, parts = await self._score(sampled, request)
        shown = self.observer.keep(stamp.iteration, j, request, sampled.images)
        broken = int((~sampled.finite).sum())
        seconds = sampled.seconds, time.time() - begun
        await self.hand_over(j, Scored(request, stamp, sampled.chain, rewards, parts, *seconds, broken, shown))

    async def hand_over(self, j: int, entry: Dispatched) -> None:
        """Take micro-batch ``j`` of an iteration for the learner; drop it where it is of no use any more."""
        async with self.changed:
            # An iteration that a stop left incomplete stays so. A cancelled task may come here: its answer was there.
            if self.stopped is None and self.ledger.in_flight(entry.stamp):
                self.ready.setdefault(entry.stamp.iteration, {})[j] = entry
                if self._complete(entry.stamp.iteration):
                    self.changed.notify_all()

    async def _score(self, sampled: Sampled, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards [P, G] and their parts, each [P, G]."""
        groups = np.split(sampled.images, len(request.prompts))
        answers = await asyncio.gather(
            *(self._total(group, prompt, request.step) for group, prompt in zip(groups, request.prompts, strict=True))
        )
        rewards = np.stack([total for total, _ in answers])
        if not sampled.finite.all():
            rewards = self._without_broken(rewards, ~sampled.finite, request)
        return rewards, {name: np.stack([parts[name] for _, parts in answers]) for name in answers[0][1]}

    def _without_broken(self, rewards: np.ndarray, broken: np.ndarray, request: SampleRequest) -> np.ndarray:
        """Rewards [P, G], NaN for broken samples (for their whole groups, unless rewards.on_failure = mask_sample)."""
        broken = broken.reshape(rewards.shape)
        if self.config.rewards.on_failure != "mask_sample":
            broken = np.broadcast_to(broken.any(1, keepdims=True), rewards.shape)
        self.log.warn.remote(
            f"{int(broken.sum())} samples of step {request.step} count as missing, because some of a group's are NaN "
            "or Inf: lower the learning rate or sampler.guidance_scale, or set model.precision=float32"
        )
        return np.where(broken, np.float32("nan"), rewards)

    async def _total(self, images: np.ndarray, prompt: str, step: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards [G] of a group and their parts; NaN, with a warning, where the group cannot be scored."""
        try:
            return await self.client.total(images, prompt)
        except RewardError as error:
            self.log.warn.remote(f"group {prompt!r} of step {step} has no score: {error}")
            if self.config.rewards.on_failure == "stop":
                await self.stop(f"{error} (rewards.on_failure = stop)")
            missing = np.full(len(images), np.nan, np.float32)
            return missing, {r.name: missing for r in self.config.rewards.train}


def rollout_metrics(scored: Sequence[Scored], in_flight: int, rewards: Rewards) -> dict[str, float]:
    """Metrics of an iteration's rollouts. ``in_flight``: bytes, before the iteration's were given back.

    With ``rewards.normalize`` "group" the mean of what the learner gets is always 0. Then reward/mean is that of the
    weighted rewards as the scorers gave them, which shows whether they rise.
    """
    columns = {name: np.concatenate([e.parts[name] for e in scored]) for name in scored[0].parts}
    means = {f"reward/{name}": mean_present(column) for name, column in columns.items()}
    if rewards.normalize == "group":
        means["reward/mean"] = mean_present(combine(columns, {r.name: r.weight for r in rewards.train}))
    return {
        **means,
        "staleness/mean": float(np.mean([e.stamp.iteration - e.stamp.version for e in scored])),
        "groups": sum(len(e.request.prompts) for e in scored),
        "seconds/rollout": sum(e.rollout_seconds for e in scored),
        "seconds/reward": sum(e.reward_seconds for e in scored),
        "bytes_in_flight": in_flight,
    }


async def log_provenance(rewards: Sequence[Reward], client: RewardClient, log: Any) -> None:
    """Log where each reward's scores come from: the scorer's class and the checksums of its files."""
    for reward in rewards:
        try:
            facts = await client.provenance(reward.name)
            log.append.remote("reward", {"name": reward.name, "scorer": reward.kind, **facts})
        except RewardError as error:  # the report lacks a line: no reason to end a run
            log.warn.remote(f"reward {reward.name!r} does not say where its scores come from: {error}")
