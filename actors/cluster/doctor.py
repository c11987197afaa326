"""What ``rlproxi doctor`` finds out about clusters: one described by a file, and one that is running.

Ray is imported only where a running cluster is joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlproxi.config.loading import Config
from rlproxi.planning.findings import Finding, fail, ok, warn

from .plan import COMPARED, Cluster, NodeReport, place, placeholders, problems, read_cluster
from .resources import ROLES, run_demand


def check_file(config: Config, path: str) -> Iterator[Finding]:
    """Check whether the run fits on the groups of a cluster file, and whether Ray takes the file."""
    try:
        cluster = read_cluster(path)
    except (FileNotFoundError, ValueError) as error:
        yield fail("cluster", str(error))
        return
    lines = ", ".join(map(str, placeholders(path)))
    if lines:
        yield warn("cluster", f"{path}: REPLACE_ME stands in line {lines}", "fill them in before use")
    for warning in cluster.warnings:
        yield warn("cluster", f"{path}: {warning}")
    yield from check_fit(config, cluster)


def check_running(config: Config, address: str) -> Iterator[Finding]:
    """Check whether the run fits on the running cluster at ``address``, and whether its nodes agree."""
    from .inspection import inspect_cluster

    try:
        nodes, now, largest = inspect_cluster(address, str(Path(config.run.dir).absolute()))
    except (ValueError, RuntimeError) as error:
        yield fail("cluster", str(error))
        return
    yield from check_nodes(nodes, config.run.dir)
    if largest:
        yield ok("cluster", "it has an autoscaler; the checks below count every node that it may start")
    else:
        yield ok("cluster", "no autoscaler reports itself: the cluster stays as it is")
    yield from check_fit(config, largest or now)


def check_nodes(nodes: Sequence[NodeReport], folder: str) -> Iterator[Finding]:
    """Compare what the nodes report: versions, the shared folder ``folder``, clocks."""
    for n in nodes:
        if n.error:
            yield fail("node", f"{n.address} does not answer: {n.error}", "`ray status` and the node's logs")
    answered = [n for n in nodes if not n.error]
    for n in answered:
        gpus = f"; {', '.join(n.gpus)}" if n.gpus else ""
        yield ok("node", f"{n.address}{' (head)' if n.head else ''}: {n.offers}{gpus}")
    for package in COMPARED:
        versions = Counter(n.versions.get(package) for n in answered)
        if len(versions) > 1:
            listed = ", ".join(f"{version or 'none'} on {count} node(s)" for version, count in versions.items())
            yield fail("node", f"nodes differ in {package}: {listed}", "install the same version everywhere")
    if len(answered) > 1:
        blind = [n.address for n in answered if not n.sees_folder]
        if blind:
            text = (
                f"run.dir {folder} is not one folder on all nodes: {', '.join(blind)} do not see this machine's files"
            )
            yield fail("storage", text, "mount shared storage under the same path on all nodes, and name it by run.dir")
        else:
            yield ok("storage", f"run.dir {folder} is the same folder on all {len(answered)} nodes")
    skew = max((abs(n.skew) for n in answered), default=0.0)
    level = "ok" if skew < 1 else "warn" if skew < 10 else "fail"
    remedy = "" if level == "ok" else "run an NTP client on every node: timelines and durations mix the clocks"
    yield Finding(level, "clock", f"nodes' clocks are {skew:.1f} s apart at most", remedy)


def check_fit(config: Config, cluster: Cluster) -> Iterator[Finding]:
    """Report for each role whether it fits with the cluster at its largest, and what does not."""
    demands = run_demand(config)
    if not any(group.resources for group in cluster.groups):
        return
    offered = {kind for group in cluster.groups for kind in group.resources} & set(ROLES)
    asked = {kind for demand in demands for kind in demand.resources}
    if offered and not offered & asked:
        text = f"its groups offer {', '.join(sorted(offered))}, and no role asks for one: they go wherever they fit"
        yield warn("cluster", text, "add resources.placement=roles")
    used, short = place(demands, cluster)
    for text in problems(demands, cluster):
        yield fail("cluster", text)
    unplaced = {s.role for s in short}
    for role in dict.fromkeys(demand.role for demand in demands if demand.role not in unplaced):
        parts = "; ".join(str(demand) for demand in demands if demand.role == role)
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
        text = "nodes come on demand, but resources.autoscaling=false refuses a run larger than the cluster is now"
        yield warn("cluster", text, "add resources.autoscaling=true")
