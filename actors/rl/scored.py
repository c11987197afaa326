"""A scored micro-batch on its way to the learner, and what the log is told of rollouts and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.sections import Reward
from rlproxi.rewards import RewardError
from rlproxi.rewards.combine import mean_present

from ..rewards.service import RewardClient
from .staleness import Stamp


@dataclass
class Scored:
    """A sampled and scored micro-batch that waits for the learner; or just its prompts, where the learner samples."""

    request: SampleRequest
    stamp: Stamp
    chain: Any = None  # a reference; its tensors go from the rollout actor to the learner
    rewards: np.ndarray | None = None  # [P, G] float32, NaN where a group could not be scored
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # scorer -> [P, G]
    seconds: dict[str, float] = field(default_factory=dict)
    images: np.ndarray | None = None  # those of its groups that are shown in a gallery
    broken: int = 0  # samples that are NaN or Inf

    @property
    def version(self) -> int:
        return self.stamp.version


def told_of_rollouts(entries: list[Scored], in_flight: int) -> dict[str, float]:
    """Metrics of an iteration's rollouts. ``in_flight``: bytes, before the iteration's are given back."""
    rewards = {
        f"reward/{name}": mean_present(np.concatenate([e.parts[name] for e in entries])) for name in entries[0].parts
    }
    return {
        **rewards,
        "staleness/mean": float(np.mean([e.stamp.iteration - e.version for e in entries])),
        "groups": sum(len(e.request.prompts) for e in entries),
        "seconds/rollout": sum(e.seconds["rollout"] for e in entries),
        "seconds/reward": sum(e.seconds["reward"] for e in entries),
        "bytes_in_flight": in_flight,
    }


async def tell_provenance(rewards: list[Reward], client: RewardClient, scribe: Any) -> None:
    """Logs what makes each reward's scores."""
    for reward in rewards:
        try:
            facts = await client.provenance(reward.name)
            scribe.append.remote("reward", {"name": reward.name, "scorer": reward.kind, **facts})
        except RewardError as error:  # a line of the report is missing: no reason to end a run
            message = f"reward {reward.name!r} does not tell what makes its score: {error}"
            scribe.append.remote("warning", {"message": message})
