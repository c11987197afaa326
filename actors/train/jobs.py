"""The two Ray Train jobs as the driver and Train's controller see them.

Light to import: the controller is a process that unpickles what is here. Only ranks need networks and DeepSpeed.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from rlproxi.config.loading import Config
from rlproxi.errors import first_line, is_out_of_memory
from rlproxi.run_directory import RunDirectory

from ..cluster.resources import actor_options
from ..rl.stops import Cause, Overdue, Stop
from . import checkpoints
from .setups import LearnerSetup, PretrainSetup

if TYPE_CHECKING:
    from ray.data import Dataset

    from .rank import Rank

#: Seconds that a role may be missing, while nobody has reported its loss, before a rank reports it.
_UNREPORTED_S = 3.0


class RanksFailed(Exception):
    """Ray Train gave the ranks up. Its text is Train's own, with every rank's traceback."""

    @property
    def words(self) -> str:
        """The last line of the text: the error of the last rank."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no reason was given"


def pretrain(setup: PretrainSetup) -> None:
    """Runs pre-training to its end; blocks. Raises RanksFailed."""
    from .datasets import portraits, shards

    # The ranks report what they find; here it only matters where the data begin.
    found = checkpoints.latest(RunDirectory(setup.run_dir).checkpoints("pretrain"), warn=lambda message: None)
    setup = dataclasses.replace(setup, data_start=found.step if found else 0)

    def dataset(rank: int) -> Dataset:
        if setup.cache is None:
            return portraits(setup.config, setup.data_start, rank)
        return shards(setup.config, Path(setup.cache), setup.data_start, rank)

    datasets = {f"rank{rank}": dataset(rank) for rank in range(setup.config.resources.learner_workers)}
    train_on_ray(partial(_pretrain_rank, setup), setup.config, setup.run_dir, "pretrain", datasets)


def train(setup: LearnerSetup) -> None:
    """Runs the learner to its end, restarting it when a rank dies; blocks. Raises RanksFailed."""
    train_on_ray(partial(_learner_rank, setup), setup.config, setup.run_dir, "learner")


def _pretrain_rank(setup: PretrainSetup) -> None:
    from .pretrainer import Pretrainer

    _run(lambda: Pretrainer(setup), "pretrainer", setup.log)


def _learner_rank(setup: LearnerSetup) -> None:
    import ray.train

    from .learner import LearnerRank

    def begin() -> Rank | None:
        roles = wait_for_roles(setup, reports=ray.train.get_context().get_world_rank() == 0)
        return None if roles is None else LearnerRank(setup, *roles)

    _run(begin, "learner", setup.log)


def wait_for_roles(setup: LearnerSetup, reports: bool) -> tuple[Any, Any] | None:
    """Waits for a conductor and a weight store that a learner can begin with; None where the run has been stopped.

    While all ranks are down, nobody watches these actors: the rank that ``reports`` has the driver replace a lost one.
    """
    unreported = Overdue(_UNREPORTED_S)
    while True:
        stop: Stop | None = ray.get(setup.log.stop_state.remote())
        if stop is not None and stop.cause is not Cause.LOST:
            return None
        error = ""
        try:
            conductor, store = (ray.get_actor(name) for name in setup.roles)
            if all(ray.get([conductor.open.remote(), store.alive.remote()], timeout=10)):
                return conductor, store
        except GetTimeoutError:
            pass  # the driver looks for those that hang
        except (ValueError, RayActorError) as missing:
            error = first_line(missing)
        if unreported(bool(error) and stop is None) and reports:
            ray.get(setup.log.stop.remote(_lost(error), Cause.LOST))
        time.sleep(0.2)


def _lost(error: str) -> str:
    return f"the conductor or the weight store is lost ({' '.join(error.split())[:200]})"


def _run(begin: Callable[[], Rank | None], name: str, log: Any) -> None:
    """Runs a rank from its last checkpoint to its end.

    Out of memory, or without conductor or weight store, it reports the stop and fails, and Train restarts all ranks.
    After out of memory they return at once, and the driver starts the stage again with smaller micro-batches.
    """
    stop: Stop | None = ray.get(log.stop_state.remote())
    if stop is not None and stop.cause is Cause.OUT_OF_MEMORY:
        return
    try:
        rank = begin()
        if rank is None:
            return
        rank.run()
    except Exception as error:
        if is_out_of_memory(error):
            ray.get(log.stop.remote(f"{name}: out of memory ({first_line(error)})", Cause.OUT_OF_MEMORY))
        elif isinstance(error, RayActorError):
            ray.get(log.stop.remote(_lost(str(error)), Cause.LOST))
        raise
    rank.close()


def train_on_ray(
    loop: Callable[[], None], config: Config, run_dir: str, name: str, datasets: dict[str, Dataset] | None = None
) -> None:
    """Runs ``loop`` on the configured ranks and waits. A lost rank restarts the group, ``learner.max_failures`` times.

    Each rank reads its own dataset: splitting one stream would not keep the order of samples. Raises RanksFailed.
    """
    # Read by the controller when it starts: how often it looks after its workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.faults.hang_timeout_s)
    import ray.train
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    datasets, r = datasets or {}, config.resources
    gpu = r.learner_gpus > 0
    custom = actor_options(config, "learner")["resources"]
    resources = {"CPU": r.learner_cpus, **({"GPU": r.learner_gpus} if gpu else {}), **custom}
    options = {name: dataset.context.execution_options for name, dataset in datasets.items()}
    trainer = TorchTrainer(
        loop,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=r.learner_workers, use_gpu=gpu, resources_per_worker=resources),
        # torch.set_num_threads binds the calling thread only; a backward that runs in another one would take every
        # core, and two ranks on two cores then wait for each other's threads (4 times slower).
        run_config=RunConfig(
            name=name,
            # mypy reads the older RunConfig, and Ray Train v2 has this key.
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(r.threads)}},  # type: ignore[call-arg]
            storage_path=str(RunDirectory(run_dir).ray_train.resolve()),
            failure_config=FailureConfig(max_failures=config.learner.max_failures),
        ),
        datasets={**datasets},
        # Train would give the datasets its own options, and with them batches in the order their threads finish.
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
    )
    before = placement_groups()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RanksFailed(str(error)) from None
    finally:
        _free(placement_groups() - before)


def placement_groups() -> set[str]:
    """Ids of this job's placement groups that hold resources or wait for them. An id ends in that of its job."""
    job, table = ray.get_runtime_context().get_job_id(), placement_group_table()
    return {group for group, facts in table.items() if group.endswith(job) and facts["state"] != "REMOVED"}


def _free(groups: set[str]) -> None:
    """Removes the placement groups that a killed controller left: Train's cleaner needs Ray's dashboard, which may
    not run."""
    from ray._raylet import PlacementGroupID

    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
