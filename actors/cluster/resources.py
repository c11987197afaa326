"""What a config asks of a cluster, role by role: the one place where Ray's resource dictionaries are made.

A node offers amounts of named resources (CPU, GPU, and whatever it was started with); an actor or a rank goes where
its own amounts fit. ``resources.placement = roles`` adds a small amount of a custom resource of the role's name, so
that the role fits only on nodes that were started with that resource.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlproxi.config.loading import Config
from rlproxi.config.sections import Reward, Rewards
from rlproxi.errors import ConfigError

ROLES = ("rollout", "learner", "reward")
#: How much of its role's resource an actor takes of a node that offers 1: GPUs and CPUs bound the number, not this.
SHARE = 0.001
#: Roles that a stage keeps busy. ``before`` is followed by ``rl`` within minutes: the learner's nodes may come already.
_BUSY = {"encode": ("learner",), "pretrain": ("learner",), "before": ROLES, "rl": ROLES, "after": ("rollout", "reward")}
_OWN_KEYS = {
    "CPU": "num_cpus, rollout_cpus or learner_cpus",
    "GPU": "num_gpus, rollout_gpus or learner_gpus",
    "memory": "the node",
    "object_store_memory": "the node",
}


@dataclass(frozen=True)
class Ask:
    """``count`` actors or ranks of one kind. resources: what each takes of its node, {"CPU": 1.0, "GPU": 0.5, ...}."""

    role: str
    name: str
    resources: dict[str, float]
    count: int

    def total(self, kind: str) -> float:
        return self.count * self.resources.get(kind, 0.0)


def role_resources(config: Config, role: str) -> dict[str, float]:
    """The custom resources of a rollout actor or a learner rank, {} where it may go anywhere. Raises ConfigError."""
    r = config.resources
    own = {"rollout": r.rollout_resources, "learner": r.learner_resources}[role]
    return _custom(f"resources.{role}_resources", own, role, r.placement)


def replica_options(rewards: Rewards, reward: Reward, placement: str = "any") -> dict[str, Any]:
    """num_cpus, num_gpus and resources of one replica of a scorer, as Serve's ``ray_actor_options`` takes them.

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


def asks(config: Config, stage: str = "rl", largest: bool = False) -> list[Ask]:
    """What ``stage`` holds at once; [] for a stage that takes whatever is there.

    Args:
        largest: with as many replicas of each scorer as ``max_replicas`` allows, instead of what it starts with.
    """
    r, w = config.resources, config.rewards
    if stage == "prepare":
        return [Ask("prepare", "classifiers", {"CPU": 1.0}, 1)]
    if stage == "curate":
        c = config.curate
        return [Ask("curate", "curation workers", _resources(c.num_cpus, c.num_gpus, {}), c.workers)]
    learns = stage != "before" or "rl" in config.run.stages
    busy = [role for role in _BUSY.get(stage, ()) if role != "learner" or learns]
    found = []
    if "rollout" in busy:
        found.append(
            Ask(
                "rollout",
                "rollout actors",
                _resources(r.rollout_cpus, r.rollout_gpus, role_resources(config, "rollout")),
                r.rollout_actors,
            )
        )
    if "learner" in busy:
        found.append(
            Ask(
                "learner",
                "learner ranks",
                _resources(r.learner_cpus, r.learner_gpus, role_resources(config, "learner")),
                r.learner_workers,
            )
        )
    if "reward" in busy:
        for x in w.all:
            o, replicas = replica_options(w, x, r.placement), w.replicas_of(x)
            each = _resources(o["num_cpus"], o["num_gpus"], o.get("resources", {}))
            count = replicas.most if largest else replicas.least
            found.append(Ask("reward", f"replicas of {x.name}", each, count))
    return found


def of_run(config: Config, largest: bool = False) -> list[Ask]:
    """What the most demanding of the configured stages holds at once."""
    stages = [
        stage
        for stage in ("rl", "before", "after", "pretrain", "encode", "prepare", "curate")
        if stage in config.run.stages
    ]
    found = [asks(config, stage, largest) for stage in stages]
    return max(found, key=lambda each: [sum(a.total(kind) for a in each) for kind in ("GPU", "CPU")], default=[])


def totals(found: list[Ask]) -> dict[str, float]:
    """{"CPU": ..., "GPU": ..., custom...}: the sums over all."""
    kinds = dict.fromkeys(["CPU", "GPU", *(kind for ask in found for kind in ask.resources)])
    return {kind: sum(ask.total(kind) for ask in found) for kind in kinds}


def bundles(found: list[Ask]) -> list[dict[str, float]]:
    """One resource dictionary for each actor or rank, as ``ray.autoscaler.sdk.request_resources`` takes them."""
    return [dict(ask.resources) for ask in found for _ in range(ask.count) if ask.resources]
