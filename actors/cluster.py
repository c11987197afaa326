"""Joining or starting Ray, and whether it is large enough for the run."""

from __future__ import annotations

import logging
import os

import ray

from rlproxi.config import Config
from rlproxi.schema import ConfigError


def connect() -> str:
    """Joins the running cluster where there is one (RAY_ADDRESS, ``ray job submit``, ``ray start``), else starts
    Ray on this machine. Returns 'joined' or 'started'."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs its workers at nice 15: beside any other busy process a run on this machine would all but stand still.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if ray.is_initialized():
        return "joined"
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        # Roles ask for fractions of a CPU; a laptop's two cores are enough for all of them.
        ray.init(num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, **quiet)
        return "started"
    except ValueError:
        # Ray found a cluster (not another run's own, which dies with it) and wants no CPU count for that.
        ray.init(**quiet)
        return "joined"


def demand(config: Config) -> dict[str, float]:
    """CPUs and GPUs that the RL stage holds at once."""
    r, w = config.resources, config.rewards
    replicas = w.replicas * (len(w.train) + len(w.heldout))
    return {"CPU": r.rollout_actors * r.rollout_cpus + r.learner_workers * r.learner_cpus + replicas * w.num_cpus,
            "GPU": r.rollout_actors * r.rollout_gpus + r.learner_workers * r.learner_gpus + replicas * w.num_gpus}


def check_size(config: Config) -> None:
    """Raises ConfigError where the cluster has fewer CPUs or GPUs than the run's roles ask for."""
    if config.resources.autoscaling or not set(config.run.stages) & {"pretrain", "before", "rl", "after"}:
        return
    have = ray.cluster_resources()
    for kind, wanted in demand(config).items():
        if wanted > have.get(kind, 0) + 1e-9:
            raise ConfigError(
                f"this run asks for {wanted:g} {kind}s (rollout actors, learner ranks and reward replicas together) and "
                f"the cluster has {have.get(kind, 0):g}: lower resources.* or rewards.num_{kind.lower()}s, add nodes, or "
                "set resources.autoscaling=true if the cluster grows on demand")
