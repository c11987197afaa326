"""What the nodes of a running cluster report about themselves, for ``rlproxi doctor --address``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlproxi.errors import ConfigError

from .join import connect, current_cluster, largest_cluster
from .plan import COMPARED, Cluster, NodeReport
from .resources import describe_resources

#: Seconds to wait for a node's answer.
_TIMEOUT_S = 60.0


@ray.remote(num_cpus=0)
def _facts_of_this_node(mark: str) -> dict[str, Any]:
    """Runs on one node. ``mark`` is a file that the driver wrote into the shared folder."""
    versions, gpus = {}, []
    for name in COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if ray.cluster_resources().get("GPU"):  # torch would see none here: this task has no GPU of its own
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            gpus = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return {"versions": versions, "gpus": tuple(gpus), "sees_folder": Path(mark).is_file(), "time": time.time()}


def inspect_cluster(address: str, folder: str) -> tuple[list[NodeReport], Cluster, Cluster | None]:
    """Join the cluster at ``address`` (HOST:PORT or auto), let every node report, and leave it.

    Returns the reports, the cluster as it is, and as large as its autoscaler may make it, or None. Each node says
    whether it sees what this process writes into ``folder``, the run directory's parent.

    Raises ConfigError where the cluster cannot be joined, or the folder cannot be written.
    """
    joins = not ray.is_initialized()
    if joins:
        os.environ["RAY_ADDRESS"] = address
        connect()
    mark = Path(folder) / f".doctor-{uuid.uuid4().hex}"
    made = not Path(folder).exists()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise ConfigError(f"run.dir {folder}: {error}: give run.dir a folder that can be written") from None
    try:
        nodes = [_report(node, str(mark)) for node in ray.nodes() if node["Alive"]]
        return nodes, current_cluster(), largest_cluster()
    finally:
        mark.unlink(missing_ok=True)
        if made:
            Path(folder).rmdir()
        if joins:
            ray.shutdown()


def _report(node: dict[str, Any], mark: str) -> NodeReport:
    address, offers = node["NodeManagerAddress"], describe_resources(node["Resources"])
    head = "node:__internal_head__" in node["Resources"]
    task = _facts_of_this_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
    try:
        # Twice: the first call starts a worker process, which takes seconds. The second reads the clock.
        ray.get(task.remote(mark), timeout=_TIMEOUT_S)
        begun = time.time()
        facts = ray.get(task.remote(mark), timeout=_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return NodeReport(address, head, offers, error=problem)
    skew = facts.pop("time") - (begun + time.time()) / 2
    return NodeReport(address, head, offers, skew=skew, **facts)
