"""The resources that a run needs, role by role. Ray's resource dictionaries are made here and nowhere else.

A node offers amounts of named resources: CPU, GPU, and custom ones that it was started with. Ray places an actor or a
rank where its amounts fit. ``resources.placement = roles`` adds a small amount of a custom resource named after the
role, so that the role fits only on nodes that were started with that resource.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlproxi.config.loading import Config
from rlproxi.config.sections import Reward, Rewards
from rlproxi.errors import ConfigError

ROLES = ("rollout", "learner", "reward")
#: The amount of its role's resource that an actor takes; a node offers 1. GPUs and CPUs bound the number, not this.
SHARE = 0.001
#: Stage -> roles that it uses. ``rl`` follows ``before`` within minutes, so the learner's nodes may start already.
_ROLES_OF_STAGE = {
    "encode": ("learner",),
    "pretrain": ("learner",),
    "before": ROLES,
    "rl": ROLES,
    "after": ("rollout", "reward"),
}
#: Ray's own resources, which other keys of the config set.
_OWN = {"CPU", "GPU", "memory", "object_store_memory"}


@dataclass(frozen=True)
class RoleDemand:
    """``count`` actors or ranks of one kind. resources: what each takes of its node, {"CPU": 1.0, "GPU": 0.5, ...}."""

    role: str
    name: str
    resources: dict[str, float]
    count: int

    def total(self, kind: str) -> float:
        """Return the amount of one resource that all of them take together."""
        return self.count * self.resources.get(kind, 0.0)

    def __str__(self) -> str:
        return f"{self.count} {self.name} ({describe_resources(self.resources)} each)"


def describe_resources(resources: dict[str, float]) -> str:
    """Return for example '1 GPU, 0.001 rollout', without what every node has: its address and its memory."""
    own = [f"{amount:g} {kind}" for kind, amount in resources.items() if ":" not in kind and "memory" not in kind]
    return ", ".join(own) or "nothing"


def actor_options(config: Config, role: str) -> dict[str, Any]:
    """Return num_cpus, num_gpus and resources of a rollout actor or a learner rank, as ``.options()`` takes them.

    Raises ConfigError where the config names one of Ray's own resources.
    """
    r = config.resources
    cpus, gpus, own = {
        "rollout": (r.rollout_cpus, r.rollout_gpus, r.rollout_resources),
        "learner": (r.learner_cpus, r.learner_gpus, r.learner_resources),
    }[role]
    custom = _custom(f"resources.{role}_resources", own, role, r.placement)
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": custom}


def replica_options(rewards: Rewards, reward: Reward, placement: str = "any") -> dict[str, Any]:
    """Return the same of one replica of a scorer, as Serve's ``ray_actor_options``, on ``resources.placement``."""
    key = "rewards.resources" if reward.resources is None else f"resources of reward {reward.name!r}"
    replicas = rewards.replicas_of(reward)
    custom = _custom(key, replicas.resources, "reward", placement)
    return {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus, "resources": custom}


def _custom(key: str, own: dict[str, float] | None, role: str, placement: str) -> dict[str, float]:
    if own is None:
        return {role: SHARE} if placement == "roles" else {}
    for name in sorted(_OWN & set(own)):
        raise ConfigError(
            f"{key} names {name!r}: list custom resources only, such as {{{role}: {SHARE}}}; CPUs and GPUs have keys "
            "of their own, such as rollout_gpus, learner_gpus and num_gpus"
        )
    return dict(own)


def _amounts(num_cpus: float, num_gpus: float, resources: dict[str, float]) -> dict[str, float]:
    found = {"CPU": num_cpus, "GPU": num_gpus, **resources}
    return {name: float(amount) for name, amount in found.items() if amount}


def stage_demand(config: Config, stage: str = "rl", largest: bool = False) -> list[RoleDemand]:
    """Return what ``stage`` holds at once; [] for a stage that needs nothing of its own.

    Args:
        largest: count as many replicas of each scorer as ``max_replicas`` allows, instead of those it starts with.
    """
    r, c = config.resources, config.curate
    if stage == "prepare":
        return [RoleDemand("prepare", "classifiers", {"CPU": 1.0}, 1)]
    if stage == "curate":
        return [RoleDemand("curate", "curation workers", _amounts(c.num_cpus, c.num_gpus, {}), c.workers)]
    learns = stage != "before" or "rl" in config.run.stages
    busy = [role for role in _ROLES_OF_STAGE.get(stage, ()) if role != "learner" or learns]
    found = [
        RoleDemand(role, name, _amounts(**actor_options(config, role)), count)
        for role, name, count in (
            ("rollout", "rollout actors", r.rollout_actors),
            ("learner", "learner ranks", r.learner_workers),
        )
        if role in busy
    ]
    for reward in config.rewards.all if "reward" in busy else []:
        replicas = config.rewards.replicas_of(reward)
        each = _amounts(**replica_options(config.rewards, reward, r.placement))
        count = replicas.most if largest else replicas.least
        found.append(RoleDemand("reward", f"replicas of {reward.name}", each, count))
    return found


def run_demand(config: Config, largest: bool = False) -> list[RoleDemand]:
    """Return what the most demanding of the config's stages holds at once."""
    stages = ("rl", "before", "after", "pretrain", "encode", "prepare", "curate")
    found = [stage_demand(config, stage, largest) for stage in stages if stage in config.run.stages]
    return max(found, key=lambda each: [sum(a.total(kind) for a in each) for kind in ("GPU", "CPU")], default=[])


def total_resources(demands: list[RoleDemand]) -> dict[str, float]:
    """Return the sums over all: {"CPU": ..., "GPU": ..., custom resources ...}."""
    kinds = dict.fromkeys(["CPU", "GPU", *(kind for demand in demands for kind in demand.resources)])
    return {kind: sum(demand.total(kind) for demand in demands) for kind in kinds}


def bundles(demands: list[RoleDemand]) -> list[dict[str, float]]:
    """Return one resource dictionary for each actor or rank, as ``ray.autoscaler.sdk.request_resources`` takes them."""
    return [dict(demand.resources) for demand in demands for _ in range(demand.count) if demand.resources]
