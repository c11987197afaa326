"""The conductor: which prompt goes to whom. The only one who knows all roles.

One loop serves every staleness bound: iteration i is dispatched when the policy allows it for
the newest weights, sampled, scored group by group, and handed to the learner whole.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Coroutine, Sequence

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlproxi.algorithms import registry
from rlproxi.algorithms.grpo import bytes_per_micro_batch
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config import Config
from rlproxi.memory_errors import is_out_of_memory
from rlproxi.rewards import RewardError
from rlproxi.rewards.combine import mean_present
from rlproxi.schema import Reward
from rlproxi.telemetry.timeline import Diary

from .cluster import actor_options
from .evaluator import Evaluator
from .observer import Observer, Told
from .pool import RolloutPool
from .reward_service import RewardClient
from .rollout import RolloutActor
from .staleness import ByteBudget, StalenessPolicy
from .stops import LOST, OUT_OF_MEMORY


@dataclass
class Scored:
    """A sampled and scored micro-batch, waiting for the learner; or, where the learner samples for itself, its prompts."""

    request: SampleRequest
    version: int
    chain: ray.ObjectRef | None = None
    rewards: np.ndarray | None = None  # [P, G] float32, NaN where a group could not be scored
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # scorer -> [P, G]
    seconds: dict[str, float] = field(default_factory=dict)
    images: np.ndarray | None = None  # those of its groups that are shown in a gallery
    broken: int = 0  # samples that are NaN or Inf


@ray.remote(num_cpus=0, max_concurrency=256)
class Conductor:
    """Runs rollouts and rewards ahead of the learner, as far as staleness and bytes allow."""

    observer: Observer | None = None  # from ``connect`` on

    def __init__(self, config: Config, run_dir: str, model_folder: str, scribe, store):
        self.config = config
        self.run_dir = Path(run_dir)
        self.scribe = scribe
        self.client: RewardClient | None = None
        self.evaluator: Evaluator | None = None
        self.algorithm = registry.build(config) if "rl" in config.run.stages else None
        self.policy = StalenessPolicy(config.rl.max_staleness)
        self.budget = ByteBudget(config.rl.max_bytes_in_flight)
        options = actor_options(config, "rollout")
        self.pool = RolloutPool([RolloutActor.options(**options).remote(config, model_folder)
                                 for _ in range(config.resources.rollout_actors)], store, scribe, Diary())
        self.changed = asyncio.Condition()
        self.version: int | None = None
        self.begun: int | None = None  # the iteration that the learner started from
        self.ready: dict[int, dict[int, Scored]] = {}
        self.answers: dict[int, dict | None] = {}  # what the first rank was told of an iteration, all are told
        self.stopped: str | None = None
        self.leaving = False  # what is trained so far is saved, and no more is begun
        self.end: int | None = None  # the first iteration that will not be trained; what is trained so far is saved
        self.tasks: set[asyncio.Task] = set()
        self.last_commit = time.time()

    async def connect(self, apps: dict[str, str]) -> int:
        """Takes the names of the deployed rewards; once all rollout actors have loaded the model, their number."""
        diary = self.pool.diary
        self.client = RewardClient(self.config.rewards, apps, diary)
        self.evaluator = Evaluator(self.config, self.run_dir, self.scribe, self.client,
                                   self.pool.sample, self.pool.save, diary)
        self.observer = Observer(self.config, self.run_dir, self.scribe, diary,
                                 lambda: self.pool.lost + len(self.client.lost),
                                 self.algorithm is not None and self.algorithm.needs_rollouts)
        await self._tell_provenance([*self.config.rewards.train, *self.config.rewards.heldout])
        return await self.pool.ready()

    async def _tell_provenance(self, rewards: list[Reward]) -> None:
        for reward in rewards:
            try:
                facts = await self.client.provenance(reward.name)
                self.scribe.append.remote("reward", {"name": reward.name, "scorer": reward.kind, **facts})
            except RewardError as error:  # a line of the report is missing: no reason to end a run
                message = f"reward {reward.name!r} does not tell what makes its score: {error}"
                self.scribe.append.remote("warning", {"message": message})

    # -- the learner's side ---------------------------------------------------------------

    async def begin(self, iteration: int) -> None:
        """The learner starts (again) at ``iteration`` and has published that version's weights.

        Whatever was in flight is dropped: names make the same groups again.
        """
        for task in self.tasks:
            task.cancel()
        self.tasks.clear()
        self.ready.clear()
        self.answers.clear()
        self.end = None
        self.budget.used = 0
        if self.observer is not None:
            self.observer.begun()
        self.version = self.begun = iteration
        self.last_commit = time.time()
        self.scribe.append.remote("resume", {"stage": "rl", "step": iteration})
        self._start(self._dispatch(iteration))

    async def next_batch(self, iteration: int) -> dict | None:
        """The batch of ``iteration`` once it is all scored; None when the run was stopped, {} when RL ends before it,
        {"leave": True} where a checkpoint is to be written first.

        Returns {"requests", "chains" (references), "versions", "rewards" [P, G]}, in order. Every rank gets the same
        answer, whatever happens between their calls: ranks that part wait for each other in a collective for ever.
        """
        async with self.changed:
            await self.changed.wait_for(lambda: self._has_answer(iteration))
            if iteration not in self.answers:
                self.answers[iteration] = self._answer(iteration)
            return self.answers[iteration]

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
            return {} if self.stopped is None else None
        entries = [self.ready[iteration][j] for j in range(self.config.rl.micro_batches)]
        if not self.algorithm.needs_rollouts:
            return {"requests": [e.request for e in entries], "rewards": None}
        for entry in entries:
            if not self.policy.may_train(iteration, entry.version):
                raise RuntimeError(f"iteration {iteration} was given a group of version {entry.version}")
        rewards = np.concatenate([e.rewards for e in entries])
        masked, broken, refused = float((~np.isfinite(rewards)).all(1).mean()), sum(e.broken for e in entries), None
        if masked > self.config.rewards.max_masked_fraction and broken:
            # Not the scorers' fault: the learner skips it, and goes back to better weights if that goes on.
            refused = (f"{broken} of its {rewards.size} samples are NaN or Inf, and {masked:.0%} of the groups have no score "
                       f"(rewards.max_masked_fraction = {self.config.rewards.max_masked_fraction})")
        elif masked > self.config.rewards.max_masked_fraction:
            self._mark_stopped(f"{masked:.0%} of the groups of iteration {iteration} have no score "
                               f"(rewards.max_masked_fraction = {self.config.rewards.max_masked_fraction}); "
                               "the warnings in metrics.jsonl say what the scorers answered")
            return None
        return {"requests": [e.request for e in entries], "chains": [e.chain for e in entries],
                "versions": [e.version for e in entries], "rewards": rewards, "refused": refused}

    async def commit(self, iteration: int, metrics: dict[str, float], spans: Sequence[Told] = ()) -> None:
        """Iteration done, and the weights of version ``iteration + 1`` published. ``spans``: see ``Observer``."""
        done = self.ready.pop(iteration)
        entries = list(done.values())
        self.answers.pop(iteration, None)  # every rank has trained on it, so none will ask
        now = time.time()
        record = {
            "stage": "rl", "step": iteration + 1, **metrics,
            **(self._told_of_rollouts(iteration, entries) if self.algorithm.needs_rollouts else {}),
            "seconds/step": now - self.last_commit,
            "images_per_second": sum(e.request.images for e in entries) / (now - self.last_commit),
        }
        if self.observer is not None:
            images = sum(e.request.images for e in entries)
            record |= self.observer.committed(iteration, self.last_commit, now, images, spans)
            self.observer.show(iteration, entries[0].version, [done[j] for j in sorted(done)])
        self.last_commit = now
        self.scribe.append.remote("metrics", record)
        self.budget.give_back(len(entries) * bytes_per_micro_batch(self.config))
        async with self.changed:
            self.version = iteration + 1
            self.changed.notify_all()
        if iteration == self.begun:
            # By now they have measured their micro-batch.
            await self._tell_provenance([r for r in self.config.rewards.train if r.tune_micro_batch])

    def _told_of_rollouts(self, iteration: int, entries: list[Scored]) -> dict[str, float]:
        rewards = {f"reward/{name}": mean_present(np.concatenate([e.parts[name] for e in entries])) for name in entries[0].parts}
        return {**rewards, "staleness/mean": float(np.mean([iteration - e.version for e in entries])),
                "groups": sum(len(e.request.prompts) for e in entries),
                "seconds/rollout": sum(e.seconds["rollout"] for e in entries),
                "seconds/reward": sum(e.seconds["reward"] for e in entries), "bytes_in_flight": self.budget.used}

    async def evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float = 1.0) -> dict:
        """See ``Evaluator.evaluate``."""
        return await self.evaluator.evaluate(tag, step_counts, version, guidance_scale)

    async def alive(self) -> bool:
        return True

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
            self.stopped = reason
            self.scribe.stop.remote(reason, kind)
            self.changed.notify_all()  # so the caller holds the lock

    async def close(self) -> None:
        """Ends the loop and the rollout actors."""
        for task in self.tasks:
            task.cancel()
        self.pool.close()
        if self.observer is not None:
            await self.observer.close()

    # -- rollouts and rewards -------------------------------------------------------------

    def _start(self, work: Coroutine) -> None:
        task = asyncio.create_task(self._or_stop(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _or_stop(self, work: Coroutine) -> None:
        """Turns a fault of the loop into a stop with its words, instead of a learner that waits for ever."""
        try:
            await work
        except Exception as error:
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

    async def _dispatch(self, start: int) -> None:
        every = self.config.evaluate.every
        # An iteration is admitted whole: the learner gives bytes back only when it has all of it.
        size = self.config.rl.micro_batches * bytes_per_micro_batch(self.config)
        for iteration in range(start, self.algorithm.steps):
            if not await self._until(lambda: self.policy.may_dispatch(iteration, self.version)):
                return
            if every and iteration % every == 0 and iteration > 0:
                await self.evaluate(f"step-{iteration:06d}", [self.config.sampler.num_inference_steps], self.version)
                if self.evaluator.guard.should_stop:
                    return await self._finish(iteration)
            if not await self._until(lambda: self.budget.admits(size)):
                return
            self.budget.take(size)
            for j, request in enumerate(self.algorithm.requests(iteration)):
                if self.algorithm.needs_rollouts:
                    self._start(self._produce(iteration, j, request, self.version))
                else:
                    await self._hand_over(iteration, j, Scored(request, self.version))

    async def _finish(self, end: int) -> None:
        """RL ends before iteration ``end``; what was dispatched earlier is still trained on."""
        guard = self.evaluator.guard
        self.scribe.append.remote("note", {"message": f"RL ends early: {guard.below} evaluations in a row far below "
                                                      f"iteration {guard.best.iteration} (evaluate.patience)"})
        async with self.changed:
            self.end = end
            self.changed.notify_all()

    async def _produce(self, iteration: int, j: int, request: SampleRequest, version: int) -> None:
        images, chain, seconds = await self.pool.sample(request, version)
        sampled = time.time()
        broken = np.ma.getmaskarray(images)[:, 0, 0, 0] if np.ma.is_masked(images) else None  # see GroupSampler.sample
        images = np.asarray(images)
        rewards, parts = await self._score(images, request)
        if broken is not None:
            rewards = self._without_broken(rewards, broken, request)
        shown = self.observer.keep(iteration, j, request, images) if self.observer is not None else None
        await self._hand_over(iteration, j, Scored(request, version, chain, rewards, parts,
                                                   {"rollout": seconds, "reward": time.time() - sampled}, shown,
                                                   0 if broken is None else int(broken.sum())))

    async def _hand_over(self, iteration: int, j: int, scored: Scored) -> None:
        async with self.changed:
            if self.stopped is None:  # an iteration that a stop left incomplete stays so
                self.ready.setdefault(iteration, {})[j] = scored
                self.changed.notify_all()

    async def _score(self, images: np.ndarray, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards [P, G] and their parts, each [P, G]."""
        groups = np.split(images, len(request.prompts))
        answers = await asyncio.gather(*(self._total(group, prompt, request.step)
                                         for group, prompt in zip(groups, request.prompts)))
        return (np.stack([total for total, _ in answers]),
                {name: np.stack([parts[name] for _, parts in answers]) for name in answers[0][1]})

    def _without_broken(self, rewards: np.ndarray, broken: np.ndarray, request: SampleRequest) -> np.ndarray:
        """Rewards [P, G] without those of samples that are no images: NaN, as rewards.on_failure says of a missing score."""
        broken = broken.reshape(rewards.shape)
        if self.config.rewards.on_failure != "mask_sample":
            broken = np.broadcast_to(broken.any(1, keepdims=True), rewards.shape)
        message = (f"{int(broken.sum())} samples of step {request.step} count as missing, because some of a group's are NaN "
                   "or Inf: lower the learning rate or sampler.guidance_scale, or set model.precision=float32")
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
