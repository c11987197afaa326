"""A cluster's groups of nodes, read from its file, and whether a run fits on them.

``read_cluster`` reads a ``ray up`` file or a KubeRay RayCluster or RayJob. ``place`` assigns a run's actors to nodes
and returns those that fit nowhere.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from .resources import RoleDemand, describe_resources

_CLOUD = ("type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips")
#: Provider keys that Ray 2.60 reads. Ray's own validation lets every other key pass, and then ignores it.
PROVIDER_KEYS = {
    "aws": {*_CLOUD, "key_pair", "security_group", "aws_credentials", "cloudwatch"},
    "gcp": {*_CLOUD, "project_id", "gcp_credentials"},
    "local": {"type", "head_ip", "worker_ips", "coordinator_address", "use_external_head_ip", "external_head_ip"},
    "fake_multinode": {"type", "gcs_address", "head_node_id", "launch_multiple", "use_node_id_as_ip"},
}
_ANY_PROVIDER = {"module", "disable_node_updaters", "disable_launch_config_check", "foreground_node_launch"}
_ANY_PROVIDER |= {"worker_liveness_check", "worker_rpc_drain"}
#: Suffix of a Kubernetes quantity -> its factor.
_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_TINY = 1e-9


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind. resources: of one node. least, most: the nodes that the cluster keeps and may have."""

    name: str
    resources: dict[str, float]
    least: int
    most: int
    head: bool = False


@dataclass(frozen=True)
class Cluster:
    """groups: the head's among them. max_workers: all groups together, the head not counted. warnings: for the user."""

    groups: tuple[NodeGroup, ...]
    max_workers: int
    warnings: tuple[str, ...] = ()


#: Packages that have to have one version on all nodes.
COMPARED = ("torch", "rlproxi", "deepspeed")


@dataclass(frozen=True)
class NodeReport:
    """What one node of a running cluster reports.

    offers: its resources in words. error: why it did not answer, else "". sees_folder: it sees the driver's run.dir.
    skew: its clock minus the driver's, in seconds.
    """

    address: str
    head: bool
    offers: str
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    sees_folder: bool = False
    skew: float = 0.0


# -- reading ------------------------------------------------------------------------------


def read_cluster(path: str | Path) -> Cluster:
    """Read the groups of a ``ray up`` file or of a KubeRay manifest (the first RayCluster or RayJob in it).

    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a cluster file is one for `ray up` or KubeRay, as in cluster/")
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if isinstance(d, dict)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        for document in documents:
            if document.get("kind") in ("RayCluster", "RayJob"):
                return _kuberay(document)
            if "available_node_types" in document or "provider" in document:
                return _ray_up(document)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        problem = f"{path}: {type(error).__name__} {error} while reading its groups"
        raise ValueError(f"{problem}; compare it with the files in cluster/") from None
    raise ValueError(
        f"{path} is neither a `ray up` file (provider, available_node_types) nor a KubeRay RayCluster or RayJob"
    )


def placeholders(path: str | Path) -> list[int]:
    """Return the numbers of the lines in which a value is still to be filled in; comments do not count."""
    lines = Path(path).read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if "REPLACE_ME" in line.split("#")[0]]


def _ray_up(document: dict) -> Cluster:
    provider = document.get("provider") or {}
    warnings = []
    known = PROVIDER_KEYS.get(provider.get("type") or "", set())
    unknown = sorted(set(provider) - known - _ANY_PROVIDER) if known else []
    if unknown:
        listed = ", ".join(sorted(known - {"type"}))
        warnings.append(f"Ray ignores {', '.join(unknown)} of a provider {provider['type']}, which has: {listed}")
    if provider.get("type") == "local":
        # Each machine counts what it offers when it starts, or has it in its start command.
        counted = "what its machines offer is known once they run: see `rlproxi doctor CONFIG --address auto`"
        workers = len(provider.get("worker_ips") or [])
        machines = (NodeGroup("head", {}, 1, 1, head=True), NodeGroup("workers", {}, workers, workers))
        return Cluster(machines, workers, (*warnings, counted))
    most = document.get("max_workers")
    most = 2 if most is None else int(most)  # Ray's default
    head, groups = document.get("head_node_type"), []
    for name, node in (document.get("available_node_types") or {}).items():
        resources = {kind: float(amount) for kind, amount in (node.get("resources") or {}).items()}
        if name == head:
            groups.append(NodeGroup(name, resources, 1, 1, head=True))
            continue
        own_most = int(node.get("max_workers", most))
        groups.append(NodeGroup(name, resources, int(node.get("min_workers", 0)), min(own_most, most)))
        if not resources:
            warnings.append(f"group {name} names no resources, so what it offers is not known before it is started")
    return Cluster(tuple(groups), most, tuple(warnings))


def _kuberay(document: dict) -> Cluster:
    spec = document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]
    grows = bool(spec.get("enableInTreeAutoscaling"))
    head = spec["headGroupSpec"]
    groups = [NodeGroup("head", _pod_resources(head), 1, 1, head=True)]
    for group in spec.get("workerGroupSpecs") or []:
        hosts = int(group.get("numOfHosts", 1))
        least, most = int(group["minReplicas"]) * hosts, int(group["maxReplicas"]) * hosts
        if not grows:
            least = most = int(group.get("replicas", group["minReplicas"])) * hosts
        groups.append(NodeGroup(group["groupName"], _pod_resources(group), least, most))
    warnings = () if grows else ("enableInTreeAutoscaling is off, so each group stays at its `replicas`",)
    return Cluster(tuple(groups), sum(g.most for g in groups if not g.head), warnings)


def _pod_resources(group: dict) -> dict[str, float]:
    """Return what Ray sees on a pod: the group's `resources`, else `rayStartParams`, else its container's limits."""
    own, start = group.get("resources") or {}, group.get("rayStartParams") or {}
    asked = group["template"]["spec"]["containers"][0].get("resources") or {}
    limits = {**(asked.get("requests") or {}), **(asked.get("limits") or {})}
    gpus = next((amount for kind, amount in limits.items() if kind.endswith("gpu")), None)
    found = {
        "CPU": own.get("CPU", start.get("num-cpus", limits.get("cpu"))),
        "GPU": own.get("GPU", start.get("num-gpus", gpus)),
    }
    custom = {kind: amount for kind, amount in own.items() if kind not in ("CPU", "GPU", "memory")}
    if not own and start.get("resources"):
        # A shell quotes the value once more: '"{\"rollout\": 1}"'.
        custom = json.loads(str(start["resources"]).strip("'\"").replace("\\", ""))
    offered = {kind: amount for kind, amount in {**found, **custom}.items() if amount is not None}
    return {kind: float(math.ceil(_quantity(amount) - _TINY)) for kind, amount in offered.items()}


def _quantity(value: Any) -> float:
    """Parse a Kubernetes quantity: '500m' is 0.5, '2' is 2, '64Gi' is in bytes."""
    match = re.fullmatch(r"([0-9.]+)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is not a quantity such as 2, 500m or 64Gi")
    return float(match[1]) * (_UNITS[match[2]] if match[2] else 1)


# -- placing ------------------------------------------------------------------------------


def place(demands: list[RoleDemand], cluster: Cluster) -> tuple[dict[str, int], list[RoleDemand]]:
    """Assign all actors to nodes, with every group as large as it may become.

    Greedy, as Ray's autoscaler is. The largest actors come first. Each goes on a node in use where it fits, else on a
    new node that offers as little as possible that the actor does not use.

    Returns:
        ({worker group: nodes in use}, the demands whose actors fit nowhere, with the number of these).
    """
    nodes: list[tuple[NodeGroup, dict[str, float]]] = [(g, dict(g.resources)) for g in cluster.groups if g.head]
    used = {group.name: 0 for group in cluster.groups if not group.head}
    short = []
    for demand in sorted(
        demands, key=lambda d: (-len(d.resources), -d.resources.get("GPU", 0), -d.resources.get("CPU", 0))
    ):
        missing = 0
        for _ in range(demand.count):
            fitting = [(group, free) for group, free in nodes if _fits(demand, free)]
            starts = not fitting and sum(used.values()) < cluster.max_workers
            if starts:
                startable = [g for g in cluster.groups if not g.head and used[g.name] < g.most]
                fitting = [(g, dict(g.resources)) for g in startable if _fits(demand, g.resources)]
            if not fitting:
                missing += 1
                continue
            group, free = min(fitting, key=lambda node: _waste(demand, node[0].resources))
            if starts:
                used[group.name] += 1
                nodes.append((group, free))
            for kind, amount in demand.resources.items():
                free[kind] -= amount
        if missing:
            short.append(replace(demand, count=missing))
    return used, short


def _fits(demand: RoleDemand, free: dict[str, float]) -> bool:
    return all(free.get(kind, 0.0) >= amount - _TINY for kind, amount in demand.resources.items())


def _waste(demand: RoleDemand, resources: dict[str, float]) -> tuple[bool, int, float, float]:
    """The sort key of a node: first the nodes with few resources, GPUs above all, that the actor does not use."""
    return (
        "GPU" in resources and "GPU" not in demand.resources,
        sum(kind not in demand.resources for kind in resources),
        resources.get("GPU", 0.0),
        resources.get("CPU", 0.0),
    )


def problems(demands: list[RoleDemand], cluster: Cluster) -> list[str]:
    """Return a sentence for each role that does not fit: what it asks for, what the cluster has, what to do."""
    roles = dict.fromkeys(short.role for short in place(demands, cluster)[1])
    return [_explain(role, [demand for demand in demands if demand.role == role], cluster) for role in roles]


def _total(demands: list[RoleDemand], kind: str | None) -> float:
    """The amount of a resource that the actors take together; without one, their number."""
    return sum(demand.total(kind) if kind else demand.count for demand in demands)


def _explain(role: str, mine: list[RoleDemand], cluster: Cluster) -> str:
    kind = next((k for k in ("GPU", "CPU") if any(k in demand.resources for demand in mine)), None)
    asked = _total(mine, kind)
    wanted = f"this run asks for {asked:g} {role} {kind or 'actor'}{'s' * (asked != 1)}"
    too_large = [demand for demand in mine if not any(_fits(demand, g.resources) for g in cluster.groups)]
    if too_large:
        offers = "; ".join(f"{g.name}: {describe_resources(g.resources)}" for g in cluster.groups)
        return (
            f"{wanted}, and no node of the cluster offers {describe_resources(too_large[0].resources)}, which each of "
            f"the {too_large[0].name} takes ({offers}): change {_KEYS[role]}, resources.placement, or the groups"
        )
    alone = place(mine, cluster)[1]
    if not alone:
        return (
            f"{wanted}: they fit alone, but not beside the other roles: raise max_workers (now "
            f"{cluster.max_workers} for all groups together) or the maximum of a group"
        )
    top = asked - _total(alone, kind)
    groups = ", ".join(g.name for g in cluster.groups if not g.head and any(_fits(d, g.resources) for d in mine))
    return (
        f"{wanted}, the cluster tops out at {top:g}: raise the maximum of {groups or 'a group'} "
        f"(max_workers is {cluster.max_workers}), or lower {_KEYS[role]}"
    )


_KEYS = {
    "rollout": "resources.rollout_actors",
    "learner": "resources.learner_workers",
    "reward": "rewards.replicas",
    "prepare": "run.stages",
    "curate": "curate.workers",
}
