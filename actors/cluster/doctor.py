"""What ``rlproxi doctor`` finds out about clusters: one described by a file, and one that is running.

Ray is imported only where a running cluster is joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlproxi.config.loading import Config
from rlproxi.planning.findings import Finding, fail, ok, warn

from .plan import Cluster, ClusterReport, NodeReport, describe_resources, place, placeholders, problems, read_cluster
from .resources import ROLES, run_demand


def check_file(config: Config, path: str) -> Iterator[Finding]:
    """Check whether the run fits on the groups of a cluster file, and whether Ray takes the file."""
    try:
        cluster = read_cluster(path)
    except (FileNotFoundError, ValueError) as error:
        yield fail("cluster", str(error))
        return
    lines = placeholders(path)
    if lines:
        where = ", ".join(map(str, lines))
        yield warn("cluster", f"{path}: REPLACE_ME stands in line {where}", "fill them in before use")
    for warning in cluster.warnings:
        yield warn("cluster", f"{path}: {warning}")
    yield from check_fit(config, cluster)


def check_running(
    config: Config, address: str, inspect: Callable[[str, str], ClusterReport] | None = None
) -> Iterator[Finding]:
    """Check whether the run fits on the running cluster at ``address``, and whether its nodes agree.

    Args:
        inspect: asks the nodes; by default ``actors.cluster.inspection.inspect_cluster``, which joins the cluster.
    """
    if inspect is None:
        from .inspection import inspect_cluster

        inspect = inspect_cluster
    try:
        report = inspect(address, str(Path(config.run.dir).absolute()))
    except (ValueError, RuntimeError) as error:
        yield fail("cluster", str(error))
        return
    yield from check_nodes(report.nodes, config.run.dir)
    yield ok(
        "cluster",
        "it has an autoscaler; the checks below count every node that it may start"
        if report.largest
        else "no autoscaler reports itself: the cluster stays as it is",
    )
    yield from check_fit(config, report.largest or report.now)


def check_nodes(nodes: Sequence[NodeReport], folder: str) -> Iterator[Finding]:
    """Compare what the nodes report: versions, the shared folder ``folder``, clocks."""
    for n in nodes:
        if n.error:
            yield fail("node", f"{n.address} does not answer: {n.error}", "`ray status` and the node's logs")
    answered = [n for n in nodes if not n.error]
    for n in answered:
        gpus = f"; {', '.join(n.gpus)}" if n.gpus else ""
        yield ok("node", f"{n.address}{' (head)' if n.head else ''}: {n.offers}{gpus}")
    for package in ("torch", "rlproxi", "deepspeed"):
        versions = Counter(n.versions.get(package) for n in answered)
        if len(versions) > 1:
            listed = ", ".join(f"{version or 'none'} on {count} node(s)" for version, count in versions.items())
            yield fail("node", f"nodes differ in {package}: {listed}", "install the same version everywhere")
    if len(answered) > 1:
        blind = [n.address for n in answered if not n.sees_folder]
        if blind:
            yield fail(
                "storage",
                f"run.dir {folder} is not one folder on all nodes: {', '.join(blind)} do not see what this machine "
                "writes there",
                "mount shared storage under the same path on all nodes, and name it by run.dir",
            )
        else:
            yield ok("storage", f"run.dir {folder} is the same folder on all {len(answered)} nodes")
    skew = max((abs(n.skew) for n in answered), default=0.0)
    level = "ok" if skew < 1 else "warn" if skew < 10 else "fail"
    yield Finding(
        level,
        "clock",
        f"nodes' clocks are {skew:.1f} s apart at most",
        "" if level == "ok" else "run an NTP client on every node: timelines and durations mix the clocks",
    )


def check_fit(config: Config, cluster: Cluster) -> Iterator[Finding]:
    """Report for each role whether it fits with the cluster at its largest, and what does not."""
    demands = run_demand(config)
    if not any(group.resources for group in cluster.groups):
        return
    offered = {kind for group in cluster.groups for kind in group.resources} & set(ROLES)
    asked = {kind for demand in demands for kind in demand.resources}
    if offered and not offered & asked:
        yield warn(
            "cluster",
            f"its groups offer {', '.join(sorted(offered))}, and the run asks for none of them, so "
            "roles go wherever their CPUs and GPUs fit",
            "add resources.placement=roles",
        )
    used, short = place(demands, cluster)
    for text in problems(demands, cluster):
        yield fail("cluster", text)
    unplaced = {s.demand.role for s in short}
    for role in dict.fromkeys(demand.role for demand in demands if demand.role not in unplaced):
        parts = "; ".join(
            f"{d.count} {d.name} ({describe_resources(d.resources)} each)" for d in demands if d.role == role
        )
        yield ok("cluster", f"{role}: {parts}: fits")
    for group in cluster.groups:
        if group.head:
            continue
        count = used[group.name]
        text = f"group {group.name}: {count} of at most {group.most} nodes used, {group.least} kept at all times"
        if group.least > count:
            yield warn("cluster", text, "lower its minimum: this run pays for nodes it does not use")
        else:
            yield ok("cluster", text)
    largest = run_demand(config, largest=True)
    if not short and largest != demands:
        for text in problems(largest, cluster):
            yield warn("cluster", f"with every scorer at its max_replicas: {text}")
    if any(not g.head and g.least < used[g.name] for g in cluster.groups) and not config.resources.autoscaling:
        yield warn(
            "cluster",
            "nodes come on demand, and resources.autoscaling is false: a run that is larger than "
            "the cluster is at its start is refused",
            "add resources.autoscaling=true",
        )
