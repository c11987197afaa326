"""Rewards behind Ray Serve: a deployment for each scorer; one request carries one group."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from ray import serve

from rlproxi.config import Reward, Rewards
from rlproxi.rewards import RewardError, build, checked_scores


class RewardReplica:
    """Loads its scorer once and scores whole groups."""

    def __init__(self, name: str, params: dict[str, Any]):
        import torch

        torch.set_num_threads(1)
        self.name = name
        self.scorer = build(name, params)

    async def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [G, H, W, 3] -> float32 [G]. A failure is raised, never a number."""
        return await asyncio.to_thread(checked_scores, self.scorer, self.name, images, prompts)

    async def details(self, images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """The scorer's parts, where it tells them; else {}."""
        if not hasattr(self.scorer, "details"):
            return {}
        return await asyncio.to_thread(self.scorer.details, images, prompts)


def deploy(rewards: Rewards, run_id: str) -> dict[str, str]:
    """Starts one Serve application for each scorer of the config, side by side; returns scorer -> application name.

    Blocks until all replicas are up. Raises RuntimeError with the scorer's own words if one cannot start.
    """
    apps, targets = {}, []
    for reward in [*rewards.train, *rewards.heldout]:
        build(reward.name, reward.params)  # A bad parameter fails here, in the driver's own words.
        deployment = serve.deployment(
            RewardReplica, name="RewardReplica", num_replicas=rewards.replicas, max_ongoing_requests=4,
            ray_actor_options={"num_cpus": rewards.num_cpus, "num_gpus": rewards.num_gpus})
        apps[reward.name] = f"{run_id}-{reward.name}"
        targets.append(serve.RunTarget(deployment.bind(reward.name, reward.params), apps[reward.name], route_prefix=None))
    serve.start(proxy_location="Disabled")
    serve.run_many(targets)
    return apps


def withdraw(apps: dict[str, str]) -> None:
    """Has the applications taken down; Serve's controller sees to it, and the caller need not wait."""
    for app in apps.values():
        serve.delete(app, _blocking=False)


class RewardClient:
    """Scores groups against the deployments from inside an asyncio loop, with retries and timeouts."""

    def __init__(self, rewards: Rewards, apps: dict[str, str]):
        self.rewards = rewards
        self.handles = {name: serve.get_app_handle(app) for name, app in apps.items()}

    async def score(self, name: str, images: np.ndarray, prompt: str) -> np.ndarray:
        """float32 [G] of one scorer for one group. Raises RewardError when retries are used up."""
        last: Exception | None = None
        for _ in range(self.rewards.retries + 1):
            response = self.handles[name].score.remote(images, [prompt] * len(images))
            try:
                return await asyncio.wait_for(response, self.rewards.timeout_s)
            except asyncio.TimeoutError:
                last = RewardError(f"reward {name!r} took longer than rewards.timeout_s = {self.rewards.timeout_s}")
            except Exception as error:  # Serve wraps what the replica raised, and its own faults, in many classes.
                last = error
        raise RewardError(str(getattr(last, "cause", None) or last).strip().splitlines()[-1])

    async def details(self, name: str, images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        return await self.handles[name].details.remote(images, [prompt] * len(images))

    async def total(self, images: np.ndarray, prompt: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(weighted sum [G], {scorer: [G]}) over the training rewards of one group."""
        scorers = self.rewards.train
        parts = await asyncio.gather(*(self.score(r.name, images, prompt) for r in scorers))
        total = sum(r.weight * part for r, part in zip(scorers, parts))
        return np.asarray(total, np.float32), {r.name: part for r, part in zip(scorers, parts)}
