"""Rewards behind Ray Serve: a deployment for each scorer; one request carries one group."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError

from rlproxi.config.sections import Reward, Rewards
from rlproxi.rewards import RewardError, build, checked_scores, provenance
from rlproxi.rewards.combine import combine
from rlproxi.telemetry.timeline import Diary

from ..cluster.resources import replica_options


class RewardReplica:
    """Loads its scorer once and scores whole groups, one after the other: what fits once always fits.

    Args:
        name: what logs call it. kind, params: the registered scorer.
        timeout_s: a call that takes twice as long means that the scorer hangs; Serve then replaces the replica.
        partial: single missing scores come back as NaN instead of failing the group.
        tune: whether to measure the fastest micro-batch on the first group. threads: torch threads of the replica.
    """

    def __init__(
        self, name: str, kind: str, params: dict[str, Any], timeout_s: float, partial: bool, tune: bool, threads: int
    ):
        import torch

        torch.set_num_threads(threads)
        self.name, self.timeout_s, self.partial = name, timeout_s, partial
        self.scorer = build(kind, params)
        self.tune = tune
        self.rates: dict[int, float] = {}
        self.busy_since: float | None = None
        self.one = ThreadPoolExecutor(1)

    async def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [G, H, W, 3] -> float32 [G]. A failure is raised, never a number."""
        return await self._run(self._score, images, prompts)

    async def details(self, images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """The scorer's parts, where it tells them; else {}."""
        if not hasattr(self.scorer, "details"):
            return {}
        return await self._run(self.scorer.details, images, prompts)

    async def provenance(self) -> dict[str, Any]:
        """Class, checkpoint hashes and, where it was measured, images/s at each micro-batch size."""
        facts = await asyncio.to_thread(provenance, self.scorer)
        return {**facts, **({"images_per_second": self.rates} if self.rates else {})}

    def check_health(self) -> None:
        """Asked by Serve every few seconds."""
        since = self.busy_since
        if since is not None and time.monotonic() - since > 2 * self.timeout_s:
            raise RuntimeError(f"reward {self.name!r} hangs: one call has taken {time.monotonic() - since:.0f} s")

    async def _run(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.one, self._timed, function, arguments)

    def _timed(self, function, arguments):
        self.busy_since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self.busy_since = None

    def _score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        if self.tune:
            from rlproxi.rewards.tuning import tune_micro_batch

            self.tune = False
            self.rates = tune_micro_batch(self.scorer, images, prompts)
        return checked_scores(self.scorer, self.name, images, prompts, self.partial)


def app_names(rewards: Rewards, run_id: str) -> dict[str, str]:
    """Scorer -> the name of its Serve application."""
    return {reward.name: f"{run_id}-{reward.name}" for reward in [*rewards.train, *rewards.heldout]}


def deploy(rewards: Rewards, run_id: str, placement: str = "any", hang_timeout_s: float = 90.0) -> dict[str, str]:
    """Starts one Serve application for each scorer of the config, side by side; returns scorer -> application name.

    ``placement`` is resources.placement; a replica that does not answer for about ``hang_timeout_s``, 90 at most, is
    replaced. Blocks until all replicas are up. Raises RuntimeError with the scorer's own words if one cannot start.
    """
    apps, targets = app_names(rewards, run_id), []
    for reward in [*rewards.train, *rewards.heldout]:
        app = _deployment(rewards, reward, placement, hang_timeout_s).bind(
            reward.name,
            reward.kind,
            reward.params,
            rewards.timeout_s,
            rewards.on_failure == "mask_sample",
            reward.tune_micro_batch,
            max(1, int(replica_options(rewards, reward)["num_cpus"])),
        )
        targets.append(serve.RunTarget(app, apps[reward.name], route_prefix=None))
    serve.start(proxy_location="Disabled")
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        # The error says which application failed; what its scorer said is in the status of its deployment.
        running = serve.status().applications
        told = [d.message for app in apps.values() if app in running for d in running[app].deployments.values()]
        withdraw(apps)
        raise RuntimeError(_own_words(RuntimeError("\n".join([str(error), *told])))) from None
    return apps


def _deployment(rewards: Rewards, reward: Reward, placement: str, hang_timeout_s: float):
    low = reward.replicas or rewards.replicas
    count: dict[str, Any] = {"num_replicas": low}
    if reward.max_replicas:
        count = {
            "autoscaling_config": {
                "min_replicas": low,
                "max_replicas": reward.max_replicas,
                "target_ongoing_requests": 2,
            }
        }
    actor = replica_options(rewards, reward, placement)
    if reward.runtime_env:
        actor["runtime_env"] = reward.runtime_env
    # The client limits what is under way, not Serve: a replica that is full makes its router ask again and again. A
    # replica's health is asked often, because a scorer that hangs holds back a whole step; Serve gives it up at the third
    # question without an answer.
    return serve.deployment(
        RewardReplica,
        name="RewardReplica",
        max_ongoing_requests=16,
        ray_actor_options=actor,
        health_check_period_s=2,
        health_check_timeout_s=min(30.0, hang_timeout_s / 3),
        graceful_shutdown_timeout_s=5,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **count,
    )


def _own_words(error: BaseException) -> str:
    """The last line that says something: Serve and Ray wrap what a scorer raised in their tracebacks."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line]
    return (told or lines or [type(error).__name__])[-1]


def withdraw(apps: dict[str, str]) -> None:
    """Has the applications taken down; Serve's controller sees to it, and the caller need not wait."""
    for app in apps.values():
        serve.delete(app, _blocking=False)


class RewardClient:
    """Scores groups against the deployments from inside an asyncio loop, with retries and timeouts.

    ``diary``: of when each scorer was at work. ``lost``: the ids of replicas that died over a request.
    """

    def __init__(self, rewards: Rewards, apps: dict[str, str], diary: Diary | None = None):
        self.rewards, self.diary, self.lost = rewards, diary or Diary(), set()
        self.handles = {name: serve.get_app_handle(app) for name, app in apps.items()}
        # Two requests under way for each replica: while one is scored, the next arrives. More would only wait inside the
        # replica, and rewards.timeout_s would count the waiting.
        self.places = {
            r.name: asyncio.Semaphore(2 * (r.max_replicas or r.replicas or rewards.replicas))
            for r in [*rewards.train, *rewards.heldout]
        }

    async def score(self, name: str, images: np.ndarray, prompt: str) -> np.ndarray:
        """float32 [G] of one scorer for one group. Raises RewardError when retries are used up."""
        return await self._ask(name, "score", images, [prompt] * len(images))

    async def details(self, name: str, images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        return await self._ask(name, "details", images, [prompt] * len(images))

    async def provenance(self, name: str) -> dict[str, Any]:
        return await self._ask(name, "provenance")

    async def _ask(self, name: str, method: str, *arguments) -> Any:
        """A request changes nothing on the replica, so it can be made again: to another one, or to the same restarted."""
        last: Exception | None = None
        for attempt in range(self.rewards.retries + 1):
            if attempt:
                await asyncio.sleep(0.5 * 2 ** (attempt - 1))
            try:
                # What is asked for beside scores takes no time that is worth a span.
                scoring = self.diary.span("reward", name, "score") if method == "score" else contextlib.nullcontext()
                async with self.places[name]:
                    with scoring:
                        response = getattr(self.handles[name], method).remote(*arguments)
                        return await asyncio.wait_for(response, self.rewards.timeout_s)
            except asyncio.TimeoutError:
                last = RewardError(f"reward {name!r} took longer than rewards.timeout_s = {self.rewards.timeout_s}")
            except Exception as error:  # Serve wraps what the replica raised, and its own faults, in many classes.
                last = error
                if isinstance(error, RayActorError):
                    self.lost.add(error.actor_id)
        raise RewardError(_own_words(last))

    async def total(self, images: np.ndarray, prompt: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(combined reward [G], {scorer: [G]}) over the training rewards of one group; NaN is a missing score."""
        scorers = self.rewards.train
        answers = await asyncio.gather(*(self.score(r.name, images, prompt) for r in scorers))
        parts = {r.name: answer for r, answer in zip(scorers, answers)}
        rows = {name: part[None] for name, part in parts.items()}
        return combine(rows, {r.name: r.weight for r in scorers}, self.rewards.normalize)[0], parts
