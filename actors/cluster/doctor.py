"""What ``rlproxi doctor --address`` finds on a running cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rlproxi.cli.doctor import Finding, fail, fit, ok
from rlproxi.config.loading import Config


def on_cluster(config: Config, address: str, survey: Callable[[str, str], dict]) -> Iterator[Finding]:
    """``survey`` is actors.cluster.survey.survey: it joins the cluster, asks every node about itself, and leaves again."""
    try:
        report = survey(address, str(Path(config.run.dir).absolute()))
    except (ValueError, RuntimeError) as error:
        yield fail("cluster", str(error))
        return
    yield from nodes(report["nodes"], config.run.dir)
    largest = report["largest"]
    yield ok(
        "cluster",
        "an autoscaler is there; below, the cluster is as large as it may become"
        if largest
        else "no autoscaler tells of itself: the cluster stays as it is",
    )
    yield from fit(config, largest or report["now"])


def nodes(found: list[dict], folder: str) -> Iterator[Finding]:
    """Findings from what each node said of itself (see actors.cluster.survey): versions, the shared folder, clocks."""
    silent = [n for n in found if n.get("error")]
    for n in silent:
        yield fail("node", f"{n['address']} does not answer: {n['error']}", "`ray status` and the node's logs")
    spoke = [n for n in found if not n.get("error")]
    for n in spoke:
        yield ok(
            "node",
            f"{n['address']}{' (head)' if n['head'] else ''}: {n['offers']}"
            + (f"; {', '.join(n['gpus'])}" if n["gpus"] else ""),
        )
    for package in ("torch", "rlproxi", "deepspeed"):
        versions = Counter(n["versions"].get(package) for n in spoke)
        if len(versions) > 1:
            told = ", ".join(f"{version or 'none'} on {count} node(s)" for version, count in versions.items())
            yield fail("node", f"nodes differ in {package}: {told}", "install the same version everywhere")
    if len(spoke) > 1:
        blind = [n["address"] for n in spoke if not n["sees_folder"]]
        if blind:
            yield fail(
                "storage",
                f"run.dir {folder} is not one folder on all nodes: {', '.join(blind)} do not see what "
                "this machine writes there",
                "mount shared storage under the same path on all nodes, and name it by run.dir",
            )
        else:
            yield ok("storage", f"run.dir {folder} is the same folder on all {len(spoke)} nodes")
    skew = max((abs(n["skew"]) for n in spoke), default=0.0)
    level = "ok" if skew < 1 else "warn" if skew < 10 else "fail"
    yield Finding(
        level,
        "clock",
        f"nodes' clocks are {skew:.1f} s apart at most",
        "" if level == "ok" else "run an NTP client on every node: timelines and durations mix the clocks",
    )
