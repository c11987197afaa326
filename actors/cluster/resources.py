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
_OWN_KEYS = {
    "CPU": "num_cpus, rollout_cpus or learner_cpus",
    "GPU": "num_gpus, rollout_gpus or learner_gpus",
    "memory": "the node",
    "object_store_memory": "the node",
}


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


def role_resources(config: Config, role: str) -> dict[str, float]:
    """Return the custom resources of a rollout actor or a learner rank, {} where Ray may place it anywhere.

    Raises ConfigError where the config names one of Ray's own resources.
    """
    r = config.resources
    own = {"rollout": r.rollout_resources, "learner": r.learner_resources}[role]
    return _custom(f"resources.{role}_resources", own, role, r.placement)


def replica_options(rewards: Rewards, reward: Reward, placement: str = "any") -> dict[str, Any]:
    """Return num_cpus, num_gpus and resources of one replica of a scorer, as Serve's ``ray_actor_options`` takes them.

    Args:
        placement: ``resources.placement`` of the run.
    """
    key = "rewards.resources" if reward.resources is None else f"resources of reward {reward.name!r}"
    replicas = rewards.replicas_of(reward)
    custom = _custom(key, replicas.resources, "reward", placement)
    options: dict[str, Any] = {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}
    return {**options, **({"resources": custom} if custom else {})}


def _custom(key: str, own: dict[str, float] | None, role: str, placement: str) -> dict[str, float]:
    if own is None:
        return {role: SHARE} if placement == "roles" else {}
    for name in own:
        if name in _OWN_KEYS:
            raise ConfigError(
                f"{key} names {name!r}, which is set by {_OWN_KEYS[name]}: list custom resources only, "
                f"such as {{{role}: {SHARE}}}"
            )
    return dict(own)


def _resources(cpus: float, gpus: float, custom: dict[str, float]) -> dict[str, float]:
    return {name: float(amount) for name, amount in {"CPU": cpus, "GPU": gpus, **custom}.items() if amount}


def stage_demand(config: Config, stage: str = "rl", largest: bool = False) -> list[RoleDemand]:
    """Return what ``stage`` holds at once; [] for a stage that needs nothing of its own.

    Args:
        largest: count as many replicas of each scorer as ``max_replicas`` allows, instead of those it starts with.
    """
    r, w = config.resources, config.rewards
    if stage == "prepare":
        return [RoleDemand("prepare", "classifiers", {"CPU": 1.0}, 1)]
    if stage == "curate":
        c = config.curate
        return [RoleDemand("curate", "curation workers", _resources(c.num_cpus, c.num_gpus, {}), c.workers)]
    learns = stage != "before" or "rl" in config.run.stages
    busy = [role for role in _ROLES_OF_STAGE.get(stage, ()) if role != "learner" or learns]
    found = []
    if "rollout" in busy:
        each = _resources(r.rollout_cpus, r.rollout_gpus, role_resources(config, "rollout"))
        found.append(RoleDemand("rollout", "rollout actors", each, r.rollout_actors))
    if "learner" in busy:
        each = _resources(r.learner_cpus, r.learner_gpus, role_resources(config, "learner"))
        found.append(RoleDemand("learner", "learner ranks", each, r.learner_workers))
    if "reward" in busy:
        for x in w.all:
            o, replicas = replica_options(w, x, r.placement), w.replicas_of(x)
            each = _resources(o["num_cpus"], o["num_gpus"], o.get("resources", {}))
            count = replicas.most if largest else replicas.least
            found.append(RoleDemand("reward", f"replicas of {x.name}", each, count))
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
