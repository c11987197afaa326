"""Joining or starting Ray, where each role goes, and whether the cluster is large enough or has to grow."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlproxi.config.loading import Config
from rlproxi.errors import ConfigError

from . import resources as demand
from .plan import Cluster, Group, place, problems, told


def connect() -> str:
    """Joins the running cluster where there is one (RAY_ADDRESS, ``ray job submit``, ``ray start``), else starts
    Ray on this machine. Returns 'joined' or 'started'."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs its workers at nice 15: beside any other busy process a run on this machine would all but stand still.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Serve's controller looks at everything ten times a second unless told otherwise, an eighth of a core.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Of 100,000 calls that its control store would remember, 100 MB, nobody here asks for one (docs/reliability.md).
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")
    if ray.is_initialized():
        return "joined"
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        return _join_or_start(quiet)
    except (ConnectionError, AuthenticationError) as error:
        raise ConfigError(_unreachable(error)) from None


def _join_or_start(quiet: dict[str, Any]) -> str:
    try:
        # Roles ask for fractions of a CPU; a laptop's two cores are enough for all of them. Ray would warn that so many processes are a
        # multiple of what it starts at a time, one for each core.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 2)))
        ray.init(num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, **quiet)
        # Train's watcher of nodes about to be taken away: this one goes with the driver, and the process costs 3 CPU seconds.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        return "started"
    except ValueError:
        # Ray found a cluster (not another run's own, which dies with it) and wants no CPU count for that.
        ray.init(**quiet)
        return "joined"


def _unreachable(error: Exception) -> str:
    """Ray's own words say nothing of tokens where the cluster wants one and this side sends none."""
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    named = f"RAY_ADDRESS={address}" if address else "the cluster that Ray found"
    remedy = (
        "RAY_AUTH_MODE is not set: if the cluster was started with a token (Ray 2.60's `ray start` does so where "
        "~/.ray/auth_token exists), set RAY_AUTH_MODE=token"
        if mode is None
        else f"RAY_AUTH_MODE is {mode!r} here: it has to be what the cluster was started with, and the token the same"
    )
    said = " ".join(str(error).split())[:200]
    return (
        f"cannot join {named} ({type(error).__name__}: {said}): is its head running and reachable? {remedy} "
        "(docs/cluster.md, Tokens). To start Ray on this machine instead, unset RAY_ADDRESS and end what `ray start` "
        "began with `ray stop`"
    )


# -- placement ----------------------------------------------------------------------------


def actor_options(config: Config, role: str) -> dict[str, Any]:
    """What ``.options()`` of a rollout actor takes: CPUs, GPUs, and the custom resources that place it."""
    r = config.resources
    cpus, gpus = {"rollout": (r.rollout_cpus, r.rollout_gpus), "learner": (r.learner_cpus, r.learner_gpus)}[role]
    custom = demand.role_resources(config, role)
    return {"num_cpus": cpus, "num_gpus": gpus, **({"resources": custom} if custom else {})}


def beside_driver() -> dict[str, Any]:
    """Options of the actors that a run cannot do without (log, weights, conductor): on the driver's node. With a rollout
    node that is taken away the run would be lost."""
    own = ray.get_runtime_context().get_node_id()
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)
    # Ray puts an actor that asks for nothing on any node, whatever its strategy says: so it asks for a grain of this one.
    return {
        "resources": {f"node:{address}": 0.001},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(own, soft=True),
    }


# -- size ---------------------------------------------------------------------------------


def nodes() -> Cluster:
    """The cluster as it is now: every live node a group of one."""
    groups = tuple(
        Group(node["NodeID"][:8], dict(node["Resources"]), 1, 1, dict(node.get("Labels") or {}), head=True)
        for node in ray.nodes()
        if node["Alive"]
    )
    return Cluster("the cluster", groups, 0)


def ceiling() -> Cluster | None:
    """The cluster as large as its autoscaler may make it; None where there is none, or it does not tell."""
    try:
        from ray._private.state import state

        told_of = state.get_cluster_config()
        groups = [] if told_of is None else list(told_of.node_group_configs)
        found = [
            Group(g.name, dict(g.resources), g.min_count, 10**6 if g.max_count < 0 else g.max_count)
            for g in groups
            if g.max_count
        ]
    except Exception:  # half private, and only a better message: without it the run waits until its timeout
        return None
    now = tuple(Group(g.name, g.resources, 1, 1, g.labels, True) for g in nodes().groups if not _of_a_group(g, found))
    return Cluster("the cluster", (*now, *found), sum(g.most for g in found)) if found else None


def _of_a_group(node: Group, groups: list[Group]) -> bool:
    """Whether a live node is one of those that the autoscaler may start, and so counted already."""
    return any(
        all(node.resources.get(kind) == amount for kind, amount in g.resources.items() if kind != "memory")
        for g in groups
    )


def check_size(config: Config) -> None:
    """Raises ConfigError where the run's roles do not fit: now, or, with autoscaling, on the largest cluster possible."""
    if not set(config.run.stages) & {"pretrain", "before", "rl", "after"}:
        return
    for stage in config.run.stages:
        wanted = demand.asks(config, stage)
        if config.resources.autoscaling:
            largest = ceiling()
            short = problems(wanted, largest) if largest else []
        else:
            short = _beyond(wanted) if stage in ("pretrain", "before", "rl", "after") else []
        if short:
            raise ConfigError("\n       ".join(short))


def _beyond(wanted: list[demand.Ask]) -> list[str]:
    """What the cluster lacks as it is. Told in sums where the sums are too small, which is easier to understand."""
    have = ray.cluster_resources()
    remedy = "add nodes, or set resources.autoscaling=true if the cluster grows on demand"
    for kind, amount in demand.totals(wanted).items():
        if amount > have.get(kind, 0) + 1e-9 and kind in ("CPU", "GPU"):
            return [
                f"this run asks for {amount:g} {kind}s (rollout actors, learner ranks and reward replicas together) "
                f"and the cluster has {have.get(kind, 0):g}: lower resources.* or rewards.num_{kind.lower()}s, "
                f"{remedy}"
            ]
        if amount and not have.get(kind):
            return [
                f"this run places roles by the custom resource {kind!r}, and no node of the cluster offers it: start "
                f"nodes with it (ray start --resources='{{\"{kind}\": 1}}'), set resources.placement=any, or {remedy}"
            ]
    return [f"{problem}; {remedy}" for problem in problems(wanted, nodes())]


class Capacity:
    """Asks the autoscaler for the nodes of each stage and gives them back. Does nothing unless resources.autoscaling.

    What a run asks for is asked of the whole cluster: Ray keeps one such request, the newest. Once the nodes are there,
    the actors on them hold them.
    """

    def __init__(self, config: Config):
        self.config, self.on = config, config.resources.autoscaling
        self.asked = False

    def hold(self, stage: str) -> float:
        """Asks for what ``stage`` needs and waits until it fits; the seconds waited. Tells the user what it waits for.

        Raises ConfigError after resources.autoscaling_timeout_s.
        """
        wanted = demand.asks(self.config, stage) if self.on else []
        if not wanted:
            return 0.0
        begun, last_told, timeout = time.monotonic(), -1e9, self.config.resources.autoscaling_timeout_s
        while True:
            # Again and again: Ray Train and Ray Data ask for their own every 20 s, and the newest request replaces others.
            request(demand.bundles(wanted))
            self.asked = True
            short = place(wanted, nodes())[1]
            waited = time.monotonic() - begun
            if not short:
                if last_told > 0:
                    print(f"cluster        ready for {stage} after {waited:.0f} s", flush=True)
                return waited
            if waited > timeout:
                raise ConfigError(
                    f"after {timeout:g} s (resources.autoscaling_timeout_s) the cluster still has no place for "
                    f"{_missing(short)}: look at `ray status` on the head (quota, spot capacity, a group's maximum), or "
                    "check the cluster file with `rlproxi doctor CONFIG --cluster FILE`"
                )
            if time.monotonic() - last_told > 60:
                last_told = time.monotonic()
                print(f"cluster        waiting for {_missing(short)} ({waited:.0f} s of {timeout:g})", flush=True)
            time.sleep(1.0)

    def give_back(self) -> None:
        """Asks for nothing any more: idle nodes go after the cluster's idle timeout. Never raises."""
        if not self.asked:
            return
        self.asked = False
        try:
            request([])
        except Exception as error:  # the cluster is gone, and with it the request
            logging.getLogger(__name__).warning("could not give back the cluster's nodes: %s", error)


def request(bundles: list[dict[str, float]]) -> None:
    """Replaces what the cluster is asked to have room for; [] asks for nothing."""
    from ray.autoscaler import sdk

    sdk.request_resources(bundles=bundles)


def _missing(short: list) -> str:
    return "; ".join(f"{s.missing} {s.ask.name} ({told(s.ask.resources)} each)" for s in short)
