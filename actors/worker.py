"""What every Ray Train worker of ours begins with, and how a worker group is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import torch

from rlproxi.config import Config


def enter_worker(threads: int) -> tuple[int, int, torch.device]:
    """(rank, world size, device) inside a Ray Train worker; fixes the thread count, which results depend on."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(threads)
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()


def train_on_ray(loop: Callable[[dict], None], settings: dict, config: Config, run_dir: str, name: str,
                 datasets: dict[str, Any] | None = None) -> None:
    """Runs ``loop`` on the configured ranks and waits. A lost rank restarts the group, ``learner.max_failures`` times.

    Each rank reads the whole of the dataset it asks for: the loops name one dataset for each rank, which
    keeps the order of samples exact, where splitting one stream would not.
    """
    # Read by the controller when it starts: how often it looks after its workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    r = config.resources
    gpu = r.learner_gpus > 0
    resources = {"CPU": r.learner_cpus, **({"GPU": r.learner_gpus} if gpu else {})}
    trainer = TorchTrainer(
        loop, train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=r.learner_workers, use_gpu=gpu, resources_per_worker=resources),
        # torch.set_num_threads binds the calling thread only; a backward that runs in another one would take every
        # core, and two ranks on two cores then wait for each other's threads (4 times slower).
        run_config=RunConfig(name=name, worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(r.threads)}},
                             storage_path=str((Path(run_dir) / "ray_train").resolve()),
                             failure_config=FailureConfig(max_failures=config.learner.max_failures)),
        datasets=datasets or {}, dataset_config=DataConfig(datasets_to_split=[]))
    trainer.fit()
