"""The conductor: which prompt goes to whom. The only one who knows all roles.

One loop serves every staleness bound: iteration i is dispatched when the policy allows it for
the newest weights, sampled, scored group by group, and handed to the learner whole.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlproxi.algorithms import grpo
from rlproxi.algorithms.guard import Evaluated, OverOptimisation
from rlproxi.algorithms.requests import SampleRequest, split_request
from rlproxi.config import Config, Reward
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation import heldout
from rlproxi.rewards import RewardError
from rlproxi.rewards.combine import mean_present

from .reward_service import RewardClient
from .rollout import RolloutActor
from .staleness import ByteBudget, StalenessPolicy


@dataclass
class Scored:
    """A sampled and scored micro-batch, waiting for the learner."""

    request: SampleRequest
    version: int
    chain: ray.ObjectRef
    rewards: np.ndarray  # [P, G] float32, NaN where a group could not be scored
    parts: dict[str, np.ndarray]  # scorer -> [P, G]
    seconds: dict[str, float]


@ray.remote(num_cpus=0, max_concurrency=256)
class Conductor:
    """Runs rollouts and rewards ahead of the learner, as far as staleness and bytes allow."""

    def __init__(self, config: Config, run_dir: str, model_folder: str, scribe, store):
        self.config = config
        self.run_dir = Path(run_dir)
        self.scribe, self.store = scribe, store
        self.client: RewardClient | None = None
        self.algorithm = grpo.build(config) if "rl" in config.run.stages else None
        self.policy = StalenessPolicy(config.grpo.max_staleness)
        self.budget = ByteBudget(config.grpo.max_bytes_in_flight)
        r = config.resources
        self.rollouts = [RolloutActor.options(num_cpus=r.rollout_cpus, num_gpus=r.rollout_gpus)
                         .remote(config, model_folder) for _ in range(r.rollout_actors)]
        self.idle: asyncio.Queue = asyncio.Queue()
        for actor in self.rollouts:
            self.idle.put_nowait(actor)
        self.changed = asyncio.Condition()
        self.version: int | None = None
        self.begun: int | None = None  # the iteration that the learner started from
        self.ready: dict[int, dict[int, Scored]] = {}
        self.stopped: str | None = None
        self.finished = False  # held-out rewards have fallen for too long; what is trained so far is saved
        self.guard = self._guard_of(config.grpo.steps)
        self.loop: asyncio.Task | None = None
        self.tasks: set[asyncio.Task] = set()
        self.last_commit = time.time()

    async def connect(self, apps: dict[str, str]) -> int:
        """Takes the names of the deployed rewards; returns the number of rollout actors once all have loaded the model."""
        self.client = RewardClient(self.config.rewards, apps)
        await self._tell_provenance([*self.config.rewards.train, *self.config.rewards.heldout])
        await asyncio.gather(*(actor.ready.remote() for actor in self.rollouts))
        return len(self.rollouts)

    async def _tell_provenance(self, rewards: list[Reward]) -> None:
        for reward in rewards:
            facts = await self.client.provenance(reward.name)
            self.scribe.append.remote("reward", {"name": reward.name, "scorer": reward.kind, **facts})

    # -- the learner's side ---------------------------------------------------------------

    async def begin(self, iteration: int) -> None:
        """The learner starts (again) at ``iteration`` and has published that version's weights.

        Whatever was in flight is dropped: names make the same groups again.
        """
        for task in [self.loop, *self.tasks]:
            if task is not None:
                task.cancel()
        self.tasks.clear()
        self.ready.clear()
        self.budget.used = 0
        self.version = self.begun = iteration
        self.guard = self._guard_of(iteration)
        self.last_commit = time.time()
        self.scribe.append.remote("resume", {"stage": "rl", "step": iteration})
        self.loop = asyncio.create_task(self._guard(self._dispatch(iteration)))

    async def next_batch(self, iteration: int) -> dict | None:
        """Blocks until every micro-batch of ``iteration`` is scored; None when the run was stopped, {} when it is
        finished before its time.

        Returns {"requests", "chains" (references), "versions", "rewards" [P, G]}, in order, the same for every rank.
        """
        wanted = self.config.grpo.micro_batches
        async with self.changed:
            await self.changed.wait_for(lambda: self.stopped or self.finished or len(self.ready.get(iteration, {})) == wanted)
        if self.stopped:
            return None
        if self.finished:
            return {}
        entries = [self.ready[iteration][j] for j in range(wanted)]
        for entry in entries:
            if not self.policy.may_train(iteration, entry.version):
                raise RuntimeError(f"iteration {iteration} was given a group of version {entry.version}")
        rewards = np.concatenate([e.rewards for e in entries])
        masked = float(np.isnan(rewards).all(1).mean())
        if masked > self.config.rewards.max_masked_fraction:
            await self._stop(f"{masked:.0%} of the groups of iteration {iteration} have no score "
                             f"(rewards.max_masked_fraction = {self.config.rewards.max_masked_fraction}); "
                             "the warnings in metrics.jsonl say what the scorers answered")
            return None
        return {"requests": [e.request for e in entries], "chains": [e.chain for e in entries],
                "versions": [e.version for e in entries], "rewards": rewards}

    async def commit(self, iteration: int, metrics: dict[str, float]) -> None:
        """Iteration done and the weights of version ``iteration + 1`` published."""
        entries = list(self.ready.pop(iteration).values())
        now = time.time()
        images = sum(e.request.images for e in entries)
        record = {
            "stage": "rl", "step": iteration + 1, **metrics,
            **{f"reward/{name}": mean_present(np.concatenate([e.parts[name] for e in entries]))
               for name in entries[0].parts},
            "staleness/mean": float(np.mean([iteration - e.version for e in entries])),
            "seconds/rollout": sum(e.seconds["rollout"] for e in entries),
            "seconds/reward": sum(e.seconds["reward"] for e in entries),
            "seconds/step": now - self.last_commit,
            "images_per_second": images / (now - self.last_commit),
            "bytes_in_flight": self.budget.used,
        }
        self.last_commit = now
        self.scribe.append.remote("metrics", record)
        if iteration == self.begun:
            # By now they have measured their micro-batch.
            await self._tell_provenance([r for r in self.config.rewards.train if r.tune_micro_batch])
        self.budget.give_back(len(entries) * grpo.bytes_per_micro_batch(self.config))
        async with self.changed:
            self.version = iteration + 1
            self.changed.notify_all()
        del entries

    async def stop(self, reason: str) -> None:
        """Ends the run with a message for the user; the learner's next batch is None."""
        await self._stop(reason)

    async def _stop(self, reason: str) -> None:
        self.scribe.stop.remote(reason)
        async with self.changed:
            self.stopped = self.stopped or reason
            self.changed.notify_all()

    async def close(self) -> None:
        """Ends the loop and the rollout actors."""
        for task in [self.loop, *self.tasks]:
            if task is not None:
                task.cancel()
        for actor in self.rollouts:
            ray.kill(actor)

    # -- rollouts and rewards -------------------------------------------------------------

    async def _guard(self, work) -> None:
        """Turns a fault of the loop into a stop with its words, instead of a learner that waits for ever."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._stop(f"{type(error).__name__}: {error}")

    async def _dispatch(self, start: int) -> None:
        every = self.config.evaluate.every
        # An iteration is admitted whole: the learner gives bytes back only when it has all of it.
        size = self.config.grpo.micro_batches * grpo.bytes_per_micro_batch(self.config)
        for iteration in range(start, self.config.grpo.steps):
            async with self.changed:
                await self.changed.wait_for(lambda: self.policy.may_dispatch(iteration, self.version))
            if every and iteration % every == 0 and iteration > 0:
                await self.evaluate(f"step-{iteration:06d}", [self.config.sampler.num_inference_steps], self.version)
                if self.guard.should_stop:
                    await self._finish()
                    return
            async with self.changed:
                await self.changed.wait_for(lambda: self.budget.admits(size))
            self.budget.take(size)
            for j, request in enumerate(grpo.requests(self.config, self.algorithm, iteration)):
                task = asyncio.create_task(self._guard(self._produce(iteration, j, request, self.version)))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def _produce(self, iteration: int, j: int, request: SampleRequest, version: int) -> None:
        images, chain, seconds = await self._sample(request, version)
        sampled = time.time()
        rewards, parts = await self._score(images, request)
        scored = Scored(request, version, chain, rewards, parts,
                        {"rollout": seconds, "reward": time.time() - sampled})
        async with self.changed:
            self.ready.setdefault(iteration, {})[j] = scored
            self.changed.notify_all()

    async def _sample(self, request: SampleRequest, version: int) -> tuple[np.ndarray, ray.ObjectRef, float]:
        """Images, a reference to the chain, and the seconds an actor was busy with them.

        An actor that dies is restarted by Ray, and the request made again.
        """
        while True:
            actor = await self.idle.get()
            begun = time.time()
            try:
                (weights,) = await self.store.get.remote(version)
                images, chain = actor.sample.remote(request, version, weights)
                return await images, chain, time.time() - begun
            except RayActorError as error:
                self.scribe.append.remote("warning", {"message": f"rollout actor lost, request repeated: {error}"})
            finally:
                self.idle.put_nowait(actor)

    async def _score(self, images: np.ndarray, request: SampleRequest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards [P, G] and their parts; a group that cannot be scored is NaN, logged, and counted later."""
        groups = np.split(images, len(request.prompts))
        answers = await asyncio.gather(*(self.client.total(group, prompt)
                                         for group, prompt in zip(groups, request.prompts)), return_exceptions=True)
        missing = np.full(request.group_size, np.nan, np.float32)
        names = [r.name for r in self.config.rewards.train]
        rows, parts = [], {name: [] for name in names}
        for prompt, answer in zip(request.prompts, answers):
            if isinstance(answer, RewardError):
                self.scribe.append.remote("warning", {"message": f"group {prompt!r} of step {request.step} has no "
                                                                 f"score: {answer}"})
                if self.config.rewards.on_failure == "stop":
                    await self._stop(f"{answer} (rewards.on_failure = stop)")
                answer = (missing, {name: missing for name in names})
            elif isinstance(answer, BaseException):
                raise answer
            rows.append(answer[0])
            for name in names:
                parts[name].append(answer[1][name])
        return np.stack(rows), {name: np.stack(values) for name, values in parts.items()}

    # -- evaluation -----------------------------------------------------------------------

    async def evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float = 1.0) -> dict:
        """Held-out prompts at each step count; writes and returns the evaluation (see evaluation.heldout)."""
        e = self.config.evaluate
        indices, prompts = heldout_prompts(self.config)
        steps = self.config.sampler.num_inference_steps
        scorers = [r.name for r in [*self.config.rewards.train, *self.config.rewards.heldout]]
        judges = [r.name for r in self.config.rewards.heldout]
        result = {"tag": tag, "iteration": version, "prompts": prompts, "samples": e.samples, "guidance_scale": guidance_scale,
                  "headline_steps": steps, "by_steps": {}}
        pictures, judged, correct = {}, {}, {}
        groups = max(1, self.config.grpo.groups_per_micro_batch * self.config.grpo.group_size // e.samples)
        for count in step_counts:
            whole = SampleRequest("heldout", 0, tuple(prompts), tuple(indices), e.samples,
                                  num_steps=count, guidance_scale=guidance_scale)
            pieces = await asyncio.gather(*(self._sample(r, version) for r in split_request(whole, groups)))
            images = np.concatenate([piece[0] for piece in pieces])
            rows = list(zip(np.split(images, len(prompts)), prompts))
            scores = {name: np.concatenate(await asyncio.gather(*(self._evaluated(name, g, p) for g, p in rows)))
                      for name in scorers}
            details = {}
            for name in judges:
                parts = await asyncio.gather(*(self._details(name, g, p) for g, p in rows))
                known = next((list(part) for part in parts if part), [])
                details[name] = {key: np.concatenate([part.get(key, np.full(e.samples, np.nan)) for part in parts])
                                 for key in known}
            result["by_steps"][str(count)] = heldout.summarise(scores, details, judges, e.samples)
            pictures[count] = images
            judged[count] = scores[judges[0]] if judges else scores[scorers[0]]
            correct[count] = details[judges[0]] if judges else {}
            self.scribe.append.remote("evaluation", {"stage": "rl", "tag": tag, "step": version, "steps": count,
                                                     **result["by_steps"][str(count)]})
        await self._watch(heldout.headline(result, self.config))
        heldout.write(self.run_dir, tag, result, pictures, judged, correct)
        return result

    async def _evaluated(self, name: str, images: np.ndarray, prompt: str) -> np.ndarray:
        """Scores of one prompt's samples; NaN, with a warning, where they cannot be had: an evaluation ends no run."""
        try:
            return await self.client.score(name, images, prompt)
        except RewardError as error:
            self.scribe.append.remote("warning", {"message": f"evaluation: {prompt!r} has no score: {error}"})
            return np.full(len(images), np.nan, np.float32)

    async def _details(self, name: str, images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        try:
            return await self.client.details(name, images, prompt)
        except RewardError:
            return {}  # the same prompt's missing score was told of already

    # -- over-optimisation ----------------------------------------------------------------

    def _guard_of(self, upto: int) -> OverOptimisation:
        """A guard that has seen what the run directory holds up to iteration ``upto``: a resumed run's knows the best."""
        guard = OverOptimisation(self.config.evaluate.alarm_sigmas, self.config.evaluate.patience)
        for seen in heldout.evaluated(self.run_dir, self.config, upto):
            guard.see(seen)
        return guard

    async def _watch(self, now: Evaluated | None) -> None:
        """Shows an evaluation to the guard; keeps the best model and passes an alarm on."""
        if now is None:
            return
        alarm = self.guard.see(now)
        if alarm:
            self.scribe.append.remote("alarm", {"stage": "rl", "step": now.iteration, "message": alarm,
                                                "best": self.guard.best.iteration})
        if self.guard.best is now and now.iteration > 0:
            await self._keep(now.iteration)
            self.scribe.append.remote("best", {"stage": "rl", "step": now.iteration, "heldout": now.heldout})

    async def _keep(self, version: int) -> None:
        """Writes the weights of ``version`` as models/best, on a rollout actor, which has the model."""
        while True:
            actor = await self.idle.get()
            try:
                (weights,) = await self.store.get.remote(version)
                return await actor.save.remote(version, weights, str(self.run_dir / "models" / "best"))
            except RayActorError as error:
                self.scribe.append.remote("warning", {"message": f"rollout actor lost, saving repeated: {error}"})
            finally:
                self.idle.put_nowait(actor)

    async def _finish(self) -> None:
        self.scribe.append.remote("note", {"message": f"RL ends early: {self.guard.below} evaluations in a row far below "
                                                      f"iteration {self.guard.best.iteration} (evaluate.patience)"})
        async with self.changed:
            self.finished = True
            self.changed.notify_all()
