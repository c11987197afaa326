"""What every node of a running cluster says of itself, for ``rlproxi doctor --address``."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlproxi.errors import ConfigError

from . import join as cluster
from .plan import told


@ray.remote(num_cpus=0)
def _look(mark: str) -> dict[str, Any]:
    """Runs on one node. ``mark`` is a file that the driver wrote into the shared folder."""
    import importlib.metadata

    versions = {}
    for name in ("torch", "rlproxi", "deepspeed"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = []
    if ray.cluster_resources().get("GPU"):
        import subprocess

        try:  # torch would see none here: this task has no GPU of its own
            answer = subprocess.run(
                ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            )
            gpus = answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired):
            pass
    return {"versions": versions, "gpus": gpus, "sees_folder": Path(mark).is_file(), "time": time.time()}


def survey(address: str, folder: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """{"nodes": [facts of each], "now": Cluster, "largest": Cluster or None}.

    A node's facts: address, head, offers, versions, gpus, sees_folder (``folder`` is the one the driver wrote to), skew
    (its clock against this one's, in seconds, to half the answer's time), or "error". Joins the cluster and leaves it.
    Raises ConfigError where it cannot be joined, or the folder cannot be written.
    """
    here = not ray.is_initialized()
    if here:
        os.environ["RAY_ADDRESS"] = address
        cluster.connect()
    mark = Path(folder) / f".doctor-{uuid.uuid4().hex}"
    made = not Path(folder).exists()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise ConfigError(f"run.dir {folder}: {error}: give run.dir a folder that can be written") from None
    try:
        return {
            "nodes": [_facts(node, str(mark), timeout_s) for node in ray.nodes() if node["Alive"]],
            "now": cluster.nodes(),
            "largest": cluster.ceiling(),
        }
    finally:
        mark.unlink(missing_ok=True)
        if made:
            Path(folder).rmdir()
        if here:
            ray.shutdown()


def _facts(node: dict[str, Any], mark: str, timeout_s: float) -> dict[str, Any]:
    known = {
        "address": node["NodeManagerAddress"],
        "head": "node:__internal_head__" in node["Resources"],
        "offers": told(node["Resources"]),
    }
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    begun = time.time()
    try:
        # Twice: the first starts a worker, which takes seconds, and the clock is to be read by the second.
        ray.get(_look.options(scheduling_strategy=place).remote(mark), timeout=timeout_s)
        begun = time.time()
        facts = ray.get(_look.options(scheduling_strategy=place).remote(mark), timeout=timeout_s)
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {**known, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {**known, **facts, "skew": facts["time"] - (begun + time.time()) / 2}
