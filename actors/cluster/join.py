"""Join or start Ray, place each role, and check whether the cluster is large enough or has to grow."""

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

from .plan import Cluster, NodeGroup, place, problems
from .resources import RoleDemand, bundles, stage_demand, total_resources

#: What a run sets of Ray's environment variables; what the user has set stays.
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray runs its workers at nice 15. Beside any other busy process a run on this machine would hardly proceed.
    "RAY_worker_niceness": "0",
    # By default Serve's controller checks everything ten times a second, which takes an eighth of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # The control store would keep 100,000 past calls, 100 MB, and nothing here reads them (docs/reliability.md).
    "RAY_task_events_max_num_task_in_gcs": "10000",
    # Workers' output stays in Ray's log files. By default a process looks for new files ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
}


def connect() -> str:
    """Join the running cluster (RAY_ADDRESS, ``ray job submit``, ``ray start``); without one, start Ray here.

    Returns 'joined' or 'started'. Raises ConfigError where a cluster is named and cannot be joined.
    """
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    if ray.is_initialized():
        return "joined"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Roles ask for fractions of a CPU, so a laptop's two cores are enough for all of them. Ray starts one process for
    # each core at a time, and warns where a run has many more.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 2)))
    try:
        try:
            ray.init(num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, **quiet)
        except ValueError:
            # Ray found a cluster (not one that another run started for itself) and takes no CPU count then.
            ray.init(**quiet)
            return "joined"
    except (ConnectionError, AuthenticationError) as error:
        raise ConfigError(_unreachable(error)) from None
    # Ray Train's watcher for nodes about to be preempted. This node ends with the driver, and the watcher costs 3 CPU
    # seconds.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return "started"


def _unreachable(error: Exception) -> str:
    """The message for a cluster that cannot be joined. Ray's own does not mention a missing token."""
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    named = f"RAY_ADDRESS={address}" if address else "the cluster that Ray found"
    remedy = f"RAY_AUTH_MODE is {mode!r} here: it and the token have to be those that the cluster was started with"
    if mode is None:
        remedy = "if the cluster was started with a token, as `ray start` does by itself, set RAY_AUTH_MODE=token"
    message = " ".join(str(error).split())[:200]
    return (
        f"cannot join {named} ({type(error).__name__}: {message}): is its head running and reachable? {remedy} "
        "(docs/cluster.md, Tokens). To start Ray here instead, unset RAY_ADDRESS and run `ray stop`"
    )


# -- placement ----------------------------------------------------------------------------


def beside_driver() -> dict[str, Any]:
    """Return options that place an actor on the driver's node, so that no other node's preemption ends the run."""
    own = ray.get_runtime_context().get_node_id()
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)
    # Ray places an actor that needs no resources on any node, whatever its strategy. So it takes a little of this node.
    return {
        "resources": {f"node:{address}": 0.001},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(own, soft=True),
    }


# -- size ---------------------------------------------------------------------------------


def current_cluster() -> Cluster:
    """Return the cluster as it is now: every live node is a group of one."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple(NodeGroup(node["NodeID"][:8], dict(node["Resources"]), 1, 1, head=True) for node in alive), 0)


def largest_cluster() -> Cluster | None:
    """Return the cluster as large as its autoscaler may make it; None without an autoscaler that reports its groups."""
    try:
        from ray._private.state import state

        reported = state.get_cluster_config()
        groups = [] if reported is None else [group for group in reported.node_group_configs if group.max_count]
        most = [10**6 if group.max_count < 0 else group.max_count for group in groups]
        found = [NodeGroup(g.name, dict(g.resources), g.min_count, m) for g, m in zip(groups, most, strict=True)]
    except Exception:  # half private, and only gives a better message: without it the run waits until its timeout
        return None
    now = [node for node in current_cluster().groups if not _of_a_group(node, found)]
    return Cluster((*now, *found), sum(g.most for g in found)) if found else None


def _of_a_group(node: NodeGroup, groups: list[NodeGroup]) -> bool:
    """Whether a live node is of a group that the autoscaler may start, and so is counted already."""
    return any(
        all(node.resources.get(kind) == amount for kind, amount in g.resources.items() if kind != "memory")
        for g in groups
    )


def check_size(config: Config) -> None:
    """Raise ConfigError where the run's roles do not fit: now, or with autoscaling on the largest possible cluster."""
    if not set(config.run.stages) & {"pretrain", "before", "rl", "after"}:
        return
    for stage in config.run.stages:
        wanted = stage_demand(config, stage)
        if config.resources.autoscaling:
            largest = largest_cluster()
            short = problems(wanted, largest) if largest else []
        else:
            short = _beyond(wanted) if stage in ("pretrain", "before", "rl", "after") else []
        if short:
            raise ConfigError("\n       ".join(short))


def _beyond(wanted: list[RoleDemand]) -> list[str]:
    """What the cluster lacks as it is. Sums come first where they are too small: they are easier to understand."""
    have = ray.cluster_resources()
    remedy = "add nodes, or set resources.autoscaling=true if the cluster grows on demand"
    for kind, amount in total_resources(wanted).items():
        if amount > have.get(kind, 0) + 1e-9 and kind in ("CPU", "GPU"):
            return [
                f"this run asks for {amount:g} {kind}s (all roles together) and the cluster has {have.get(kind, 0):g}: "
                f"lower resources.* or rewards.num_{kind.lower()}s, {remedy}"
            ]
        if amount and not have.get(kind):
            return [
                f"this run places roles by the custom resource {kind!r}, and no node of the cluster offers it: start "
                f"nodes with it (ray start --resources='{{\"{kind}\": 1}}'), set resources.placement=any, or {remedy}"
            ]
    return [f"{problem}; {remedy}" for problem in problems(wanted, current_cluster())]


class Capacity:
    """Requests nodes from the autoscaler for each stage and returns them. Does nothing unless resources.autoscaling.

    Ray keeps one request for the whole cluster, the newest. Once the nodes have started, the actors on them keep them.
    """

    def __init__(self, config: Config):
        self.config, self.on = config, config.resources.autoscaling
        self.asked = False

    def hold(self, stage: str) -> None:
        """Request what ``stage`` needs and wait until it fits; print what it waits for.

        Raises ConfigError after resources.autoscaling_timeout_s.
        """
        wanted = stage_demand(self.config, stage) if self.on else []
        begun, last_printed, timeout = time.monotonic(), -1e9, self.config.resources.autoscaling_timeout_s
        while wanted:
            # Repeated: Ray Train and Ray Data request their own nodes every 20 s, which replaces this request.
            request(bundles(wanted))
            self.asked = True
            short = place(wanted, current_cluster())[1]
            waited = time.monotonic() - begun
            if not short:
                if last_printed > 0:
                    print(f"cluster        ready for {stage} after {waited:.0f} s", flush=True)
                return
            missing = "; ".join(map(str, short))
            if waited > timeout:
                raise ConfigError(
                    f"after {timeout:g} s (resources.autoscaling_timeout_s) the cluster still has no place for "
                    f"{missing}: look at `ray status` on the head (quota, spot capacity, a group's maximum), "
                    "or check the cluster file with `rlproxi doctor CONFIG --cluster FILE`"
                )
            if time.monotonic() - last_printed > 60:
                last_printed = time.monotonic()
                print(f"cluster        waiting for {missing} ({waited:.0f} s of {timeout:g})", flush=True)
            time.sleep(1.0)

    def give_back(self) -> None:
        """Withdraw the request: idle nodes stop after the cluster's idle timeout. Never raises."""
        if not self.asked:
            return
        self.asked = False
        try:
            request([])
        except Exception as error:  # the cluster is gone, and the request with it
            logging.getLogger(__name__).warning("could not give back the cluster's nodes: %s", error)


def request(resources: list[dict[str, float]]) -> None:
    """Replace the request of the whole cluster: one resource dictionary for each actor; [] requests nothing."""
    from ray.autoscaler import sdk

    sdk.request_resources(bundles=resources)
