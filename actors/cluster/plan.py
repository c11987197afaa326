"""A cluster's groups of nodes, read from its file, and whether a run fits on them.

``read_cluster`` reads a ``ray up`` file or a KubeRay RayCluster or RayJob. ``place`` assigns a run's actors to nodes
and returns those that fit nowhere.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .resources import RoleDemand


def _keys(text: str) -> set[str]:
    return set(text.split())


_CLOUD = "type region availability_zone cache_stopped_nodes use_internal_ips"
#: Provider keys that Ray 2.60 reads. Ray's own validation lets every other key pass, and then ignores it.
PROVIDER_KEYS = {
    "aws": _keys(f"{_CLOUD} key_pair security_group aws_credentials cloudwatch"),
    "gcp": _keys(f"{_CLOUD} project_id gcp_credentials"),
    "local": _keys("type head_ip worker_ips coordinator_address use_external_head_ip external_head_ip"),
    "fake_multinode": _keys("type gcs_address head_node_id launch_multiple use_node_id_as_ip"),
}
_ANY_PROVIDER = _keys(
    "module disable_node_updaters disable_launch_config_check foreground_node_launch worker_liveness_check "
    "worker_rpc_drain"
)
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
    labels: dict[str, str] = field(default_factory=dict)
    head: bool = False


@dataclass(frozen=True)
class Cluster:
    """groups: the head's among them. max_workers: all groups together, the head not counted. warnings: for the user."""

    source: str
    groups: tuple[NodeGroup, ...]
    max_workers: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shortfall:
    """``missing`` of a demand's actors fit on no node."""

    demand: RoleDemand
    missing: int


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
    versions: dict[str, str | None] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    sees_folder: bool = False
    skew: float = 0.0


@dataclass(frozen=True)
class ClusterReport:
    """A running cluster: its nodes, the cluster as it is, and as large as its autoscaler may make it, or None."""

    nodes: tuple[NodeReport, ...]
    now: Cluster
    largest: Cluster | None


# -- reading ------------------------------------------------------------------------------


def read_cluster(path: str | Path) -> Cluster:
    """Read the groups of a ``ray up`` file or of a KubeRay manifest (the first RayCluster or RayJob in it).

    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a cluster file is one that `ray up` takes, or a KubeRay "
            "RayCluster or RayJob (cluster/ has one of each)"
        )
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if isinstance(d, dict)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        for document in documents:
            if document.get("kind") in ("RayCluster", "RayJob"):
                return _kuberay(path, document)
            if "available_node_types" in document or "provider" in document:
                return _ray_up(path, document)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__} {error} while reading its groups; compare it with the files in cluster/"
        ) from None
    raise ValueError(
        f"{path} is neither a `ray up` file (provider, available_node_types) nor a KubeRay RayCluster or RayJob"
    )


def placeholders(path: str | Path) -> list[int]:
    """Return the numbers of the lines in which a value is still to be filled in; comments do not count."""
    lines = Path(path).read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if "REPLACE_ME" in line.split("#")[0]]


def _ray_up(path: Path, document: dict) -> Cluster:
    provider = document.get("provider") or {}
    warnings = []
    known = PROVIDER_KEYS.get(provider.get("type") or "", set())
    unknown = sorted(set(provider) - known - _ANY_PROVIDER) if known else []
    if unknown:
        warnings.append(
            f"provider of type {provider['type']} has no key {', '.join(unknown)}: Ray ignores it; known "
            f"are {', '.join(sorted(known - {'type'}))}"
        )
    most = document.get("max_workers")
    if provider.get("type") == "local":
        return _by_address(path, document, warnings)
    most = 2 if most is None else int(most)  # Ray's default
    head, groups = document.get("head_node_type"), []
    for name, node in (document.get("available_node_types") or {}).items():
        resources = {kind: float(amount) for kind, amount in (node.get("resources") or {}).items()}
        labels = node.get("labels") or {}
        if name == head:
            groups.append(NodeGroup(name, resources, 1, 1, labels, True))
            continue
        own_most = int(node.get("max_workers", most))
        groups.append(NodeGroup(name, resources, int(node.get("min_workers", 0)), min(own_most, most), labels))
        if not resources:
            warnings.append(f"group {name} names no resources, so what it offers is not known before it is started")
    return Cluster(str(path), tuple(groups), most, tuple(warnings))


def _by_address(path: Path, document: dict, warnings: list[str]) -> Cluster:
    """A cluster of machines given by address. Each counts what it offers when it starts, or has it in its command."""
    workers = document["provider"].get("worker_ips") or []
    counted = (
        "what its machines offer is known once they run: `rlproxi doctor CONFIG --address auto` checks the "
        "cluster itself"
    )
    groups = (NodeGroup("head", {}, 1, 1, head=True), NodeGroup("workers", {}, len(workers), len(workers)))
    return Cluster(str(path), groups, len(workers), (*warnings, counted))


def _kuberay(path: Path, document: dict) -> Cluster:
    spec = document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]
    grows = bool(spec.get("enableInTreeAutoscaling"))
    head = spec["headGroupSpec"]
    groups = [NodeGroup("head", _pod_resources(head), 1, 1, head.get("labels") or {}, True)]
    for group in spec.get("workerGroupSpecs") or []:
        hosts = int(group.get("numOfHosts", 1))
        least, most = int(group["minReplicas"]) * hosts, int(group["maxReplicas"]) * hosts
        if not grows:
            least = most = int(group.get("replicas", group["minReplicas"])) * hosts
        groups.append(NodeGroup(group["groupName"], _pod_resources(group), least, most, group.get("labels") or {}))
    warnings = () if grows else ("enableInTreeAutoscaling is off, so each group stays at its `replicas`",)
    return Cluster(str(path), tuple(groups), sum(g.most for g in groups if not g.head), warnings)


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
    return {
        kind: math.ceil(_quantity(amount) - _TINY) * 1.0
        for kind, amount in {**found, **custom}.items()
        if amount is not None
    }


def _quantity(value: Any) -> float:
    """Parse a Kubernetes quantity: '500m' is 0.5, '2' is 2, '64Gi' is in bytes."""
    match = re.fullmatch(r"([0-9.]+)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(value).strip())
    if not match:
        raise ValueError(f"{value!r} is not a quantity such as 2, 500m or 64Gi")
    return float(match[1]) * (_UNITS[match[2]] if match[2] else 1)


# -- placing ------------------------------------------------------------------------------


def place(demands: list[RoleDemand], cluster: Cluster) -> tuple[dict[str, int], list[Shortfall]]:
    """Assign all actors to nodes, with every group as large as it may become.

    Greedy, as Ray's autoscaler is. The largest actors come first. Each goes on a node in use where it fits, else on a
    new node that offers as little as possible that the actor does not use.

    Returns:
        ({worker group: nodes in use}, the actors that fit nowhere).
    """
    nodes: list[tuple[NodeGroup, dict[str, float]]] = [(g, dict(g.resources)) for g in cluster.groups if g.head]
    used = {group.name: 0 for group in cluster.groups if not group.head}
    short = []
    for demand in sorted(
        demands, key=lambda d: (-len(d.resources), -d.resources.get("GPU", 0), -d.resources.get("CPU", 0))
    ):
        missing = 0
        for _ in range(demand.count):
            free = _node_for(demand, nodes) or _new_node(demand, cluster, used, nodes)
            if free is None:
                missing += 1
            else:
                for kind, amount in demand.resources.items():
                    free[kind] -= amount
        if missing:
            short.append(Shortfall(demand, missing))
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


def _node_for(demand: RoleDemand, nodes: list[tuple[NodeGroup, dict[str, float]]]) -> dict[str, float] | None:
    """What is free on the best node in use, or None."""
    fitting = [(group, free) for group, free in nodes if _fits(demand, free)]
    return min(fitting, key=lambda node: _waste(demand, node[0].resources))[1] if fitting else None


def _new_node(
    demand: RoleDemand, cluster: Cluster, used: dict[str, int], nodes: list[tuple[NodeGroup, dict[str, float]]]
) -> dict[str, float] | None:
    """What is free on a node that is added to ``nodes``, or None where the cluster may not grow."""
    if sum(used.values()) >= cluster.max_workers:
        return None
    open_groups = [g for g in cluster.groups if not g.head and used[g.name] < g.most and _fits(demand, g.resources)]
    if not open_groups:
        return None
    group = min(open_groups, key=lambda g: _waste(demand, g.resources))
    used[group.name] += 1
    nodes.append((group, dict(group.resources)))
    return nodes[-1][1]


def problems(demands: list[RoleDemand], cluster: Cluster) -> list[str]:
    """Return a sentence for each role that does not fit: what it asks for, what the cluster has, what to do."""
    roles = dict.fromkeys(short.demand.role for short in place(demands, cluster)[1])
    return [_explain(role, [demand for demand in demands if demand.role == role], cluster) for role in roles]


def _explain(role: str, mine: list[RoleDemand], cluster: Cluster) -> str:
    kind = next((k for k in ("GPU", "CPU") if any(k in demand.resources for demand in mine)), None)
    asked = sum(demand.total(kind) if kind else demand.count for demand in mine)
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
    top = asked - sum(short.missing * (short.demand.resources.get(kind, 0.0) if kind else 1) for short in alone)
    groups = ", ".join(g.name for g in cluster.groups if not g.head and any(_fits(d, g.resources) for d in mine))
    return (
        f"{wanted}, the cluster tops out at {top:g}: raise the maximum of {groups or 'a group'} "
        f"(max_workers is {cluster.max_workers}), or lower {_KEYS[role]}"
    )


def describe_resources(resources: dict[str, float]) -> str:
    """Return for example '1 GPU, 0.001 rollout', without what every node has: its address and its memory."""
    own = [f"{amount:g} {kind}" for kind, amount in resources.items() if ":" not in kind and "memory" not in kind]
    return ", ".join(own) or "nothing"


_KEYS = {
    "rollout": "resources.rollout_actors",
    "learner": "resources.learner_workers",
    "reward": "rewards.replicas",
    "prepare": "run.stages",
    "curate": "curate.workers",
}
