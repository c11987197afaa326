"""Rewards behind Ray Serve: one deployment for each scorer, one request for each group."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.exceptions import RayActorError

from rlproxi.config.sections import Reward, Rewards
from rlproxi.errors import last_error_line
from rlproxi.rewards import RewardError, build, checked_scores, provenance
from rlproxi.rewards.combine import combine
from rlproxi.rewards.tuning import MicroBatched, tune_micro_batch
from rlproxi.telemetry.timeline import Diary

from ..cluster.resources import replica_options

Result = TypeVar("Result")


class RewardReplica:
    """Loads its scorer once and scores whole groups, one at a time, so that its memory does not grow with the load.

    Args:
        name: the reward's name in the config, for messages.
        kind: the scorer: a registered name, or package.module:Class.
        params: of the scorer's constructor.
        timeout_s: seconds; a call that takes twice as long means that the scorer hangs, and Serve replaces the replica.
        partial: return NaN for single missing scores instead of failing the group.
        tune: measure the fastest micro-batch on the first group.
        threads: torch threads of the replica.
    """

    def __init__(
        self, name: str, kind: str, params: dict[str, Any], timeout_s: float, partial: bool, tune: bool, threads: int
    ):
        import torch

        torch.set_num_threads(threads)
        self.name, self.timeout_s, self.partial = name, timeout_s, partial
        self.scorer = build(kind, params)
        self.tune = tune
        self.rates: dict[int, float] = {}  # images per second by micro-batch size
        self.busy_since: float | None = None
        self.executor = ThreadPoolExecutor(1)

    async def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [G, H, W, 3] and their prompts -> float32 [G]. Raises RewardError where the scorer fails."""
        return await self._run(self._score, images, prompts)

    async def details(self, images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """The parts of the scores, name -> [G]; {} for a scorer without a method ``details``."""
        details = getattr(self.scorer, "details", None)
        return {} if details is None else await self._run(details, images, prompts)

    async def provenance(self) -> dict[str, Any]:
        """The scorer's class, the SHA-256 of its files and, where measured, images/s at each micro-batch size."""
        facts = await asyncio.to_thread(provenance, self.scorer)
        return {**facts, **({"images_per_second": self.rates} if self.rates else {})}

    def check_health(self) -> None:
        """Raises RuntimeError where the scorer hangs; Serve calls this every few seconds."""
        since = self.busy_since
        if since is not None and time.monotonic() - since > 2 * self.timeout_s:
            raise RuntimeError(f"reward {self.name!r} hangs: one call has taken {time.monotonic() - since:.0f} s")

    async def _run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.executor, self._timed, function, arguments)

    def _timed(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        self.busy_since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self.busy_since = None

    def _score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        if self.tune and isinstance(self.scorer, MicroBatched):
            self.tune = False
            self.rates = tune_micro_batch(self.scorer, images, prompts)
        return checked_scores(self.scorer, self.name, images, prompts, self.partial)


def app_names(rewards: Rewards, run_id: str) -> dict[str, str]:
    """Reward -> the name of its Serve application."""
    return {reward.name: f"{run_id}-{reward.name}" for reward in rewards.all}


def deploy(rewards: Rewards, run_id: str, placement: str = "any", hang_timeout_s: float = 90.0) -> dict[str, str]:
    """Starts one Serve application for each reward and returns reward -> application name; blocks until all are up.

    Args:
        rewards: the config's section.
        run_id: makes the names of the applications unique on the cluster.
        placement: ``resources.placement`` of the run.
        hang_timeout_s: seconds, 90 at most, after which Serve replaces a replica that does not answer.

    Raises RuntimeError with the scorer's message where one cannot start.
    """
    apps, targets = app_names(rewards, run_id), []
    for reward in rewards.all:
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
        # The error says which application failed; the scorer's message is in the status of its deployment.
        running = serve.status().applications
        messages = [d.message for app in apps.values() if app in running for d in running[app].deployments.values()]
        withdraw(apps)
        raise RuntimeError(last_error_line("\n".join([str(error), *messages]))) from None
    return apps


def _deployment(rewards: Rewards, reward: Reward, placement: str, hang_timeout_s: float) -> serve.Deployment:
    replicas = rewards.replicas_of(reward)
    count: dict[str, Any] = {"num_replicas": replicas.least}
    if reward.max_replicas:
        limits = {"min_replicas": replicas.least, "max_replicas": replicas.most, "target_ongoing_requests": 2}
        count = {"autoscaling_config": limits}
    actor = replica_options(rewards, reward, placement)
    if reward.runtime_env:
        actor["runtime_env"] = reward.runtime_env
    # The client limits the requests under way, so that Serve's limit is never reached: its router polls a full replica.
    # Health checks are frequent, because a scorer that hangs delays a whole step. Serve replaces a replica after three
    # checks without an answer.
    deployment: Any = serve.deployment(  # its types take it for a decorator with arguments
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
    return deployment


def withdraw(apps: dict[str, str]) -> None:
    """Asks Serve's controller to take the applications down, and does not wait for it."""
    for app in apps.values():
        serve.delete(app, _blocking=False)


class RewardClient:
    """Scores groups against the deployments from inside an asyncio loop, with retries and timeouts.

    Args:
        rewards: the config's section.
        apps: reward -> the name of its application, as ``deploy`` returns it.
        diary: records when each scorer was at work.

    ``lost`` holds the ids of replicas that died over a request.
    """

    def __init__(self, rewards: Rewards, apps: dict[str, str], diary: Diary | None = None):
        self.rewards, self.diary = rewards, diary or Diary()
        self.lost: set[Any] = set()  # ActorID, or its hex digits, as Ray has it
        self.handles = {name: serve.get_app_handle(app) for name, app in apps.items()}
        # Two requests under way for each replica: while one is scored, the next arrives. More would wait inside the
        # replica, and rewards.timeout_s would include that wait.
        self.places = {r.name: asyncio.Semaphore(2 * rewards.replicas_of(r).most) for r in rewards.all}

    async def score(self, name: str, images: np.ndarray, prompt: str) -> np.ndarray:
        """Scores of one group, images uint8 [G, H, W, 3] of one prompt -> float32 [G].

        Raises RewardError when ``rewards.retries`` are used up.
        """
        return await self._ask(name, "score", images, [prompt] * len(images))

    async def details(self, name: str, images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        """The parts of one group's scores, part -> [G]; raises as ``score``."""
        return await self._ask(name, "details", images, [prompt] * len(images))

    async def provenance(self, name: str) -> dict[str, Any]:
        """What made the scores: see ``RewardReplica.provenance``; raises as ``score``."""
        return await self._ask(name, "provenance")

    async def _ask(self, name: str, method: str, *arguments) -> Any:
        """Calls ``method`` of a replica. A call changes nothing there, so it can be repeated, on any replica."""
        last: Exception | None = None
        for attempt in range(self.rewards.retries + 1):
            if attempt:
                await asyncio.sleep(0.5 * 2 ** (attempt - 1))
            try:
                # Calls other than ``score`` are too short to be worth a span.
                scoring = self.diary.span("reward", name, "score") if method == "score" else contextlib.nullcontext()
                async with self.places[name]:
                    with scoring:
                        response = getattr(self.handles[name], method).remote(*arguments)
                        return await asyncio.wait_for(response, self.rewards.timeout_s)
            except asyncio.TimeoutError:
                last = RewardError(f"reward {name!r} took longer than rewards.timeout_s = {self.rewards.timeout_s}")
            except Exception as error:  # Serve wraps the replica's errors, and its own, in many classes
                last = error
                if isinstance(error, RayActorError):
                    self.lost.add(error.actor_id)
        text = str(getattr(last, "cause", None) or last)
        raise RewardError(last_error_line(text) or type(last).__name__)

    async def total(self, images: np.ndarray, prompt: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(weighted sum [G], reward -> [G]) of the training rewards of one group; NaN is a missing score."""
        scorers = self.rewards.train
        answers = await asyncio.gather(*(self.score(r.name, images, prompt) for r in scorers))
        parts = {r.name: answer for r, answer in zip(scorers, answers, strict=True)}
        rows = {name: part[None] for name, part in parts.items()}
        return combine(rows, {r.name: r.weight for r in scorers}, self.rewards.normalize)[0], parts
