"""The two Ray Train jobs as the driver and Train's controller see them.

Light to import on purpose: the controller is a process of its own that unpickles what is here, and
only the ranks need networks and DeepSpeed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlproxi.config.loading import Config
from rlproxi.errors import first_line, is_out_of_memory
from rlproxi.run_directory import RunDirectory

from ..cluster.resources import role_resources
from ..rl.stops import LOST, OUT_OF_MEMORY
from . import checkpoints

#: A role that nobody bears for so long, in seconds, although no word of its loss is on the way.
_UNSEEN_S = 3.0


class RanksFailed(Exception):
    """Ray Train has given the ranks up. As a text it is Train's own, with every rank's traceback."""

    @property
    def words(self) -> str:
        """The last line of it: what went wrong in the last rank that is told of."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no reason was given"


@dataclass
class PretrainSetup:
    """What a pre-training rank is told. ``cache`` holds the encoded shards, where the data are not the portraits."""

    config: Config
    run_dir: str
    model_folder: str
    scribe: Any
    cache: str | None = None
    data_start: int = 0  # the optimizer step at which the datasets begin


@dataclass
class LearnerSetup:
    """What a learner rank is told."""

    config: Config
    run_dir: str
    model_folder: str
    roles: tuple[str, str]  # the names of conductor and weight store; who bears them may change while a learner lives
    scribe: Any


def pretrain(setup: PretrainSetup) -> None:
    """Runs pre-training to its end; blocks."""
    from .datasets import portraits, shards

    # The ranks say what they find; here it only matters where the data begin.
    found = checkpoints.latest(checkpoints.root(setup.run_dir, "pretrain"), warn=lambda message: None)
    setup.data_start = found[1]["step"] if found else 0

    def dataset(rank: int):
        if setup.cache is None:
            return portraits(setup.config, setup.data_start, rank)
        return shards(setup.config, Path(setup.cache), setup.data_start, rank)

    datasets = {f"rank{rank}": dataset(rank) for rank in range(setup.config.resources.learner_workers)}
    train_on_ray(_pretrain_loop, {"setup": setup}, setup.config, setup.run_dir, "pretrain", datasets)


def _pretrain_loop(settings: dict) -> None:
    from .pretrainer import Pretrainer

    _run(Pretrainer, settings["setup"])


def train(setup: LearnerSetup) -> None:
    """Runs the learner to its end; blocks. Ray Train restarts it from the last checkpoint when a rank dies."""
    train_on_ray(_learner_loop, {"setup": setup}, setup.config, setup.run_dir, "learner")


def _learner_loop(settings: dict) -> None:
    from .learner import Learner

    def begin(setup: LearnerSetup) -> Learner | None:
        import ray.train

        bearers = _bearers(setup, tells=ray.train.get_context().get_world_rank() == 0)
        return bearers and Learner(setup, *bearers)

    _run(begin, settings["setup"])


def _bearers(setup: LearnerSetup, tells: bool) -> tuple[Any, Any] | None:
    """Conductor and weight store, once a learner can begin with them: where one is lost, the driver makes new ones meanwhile.
    None where the run has been stopped.

    Who dies while no rank lives is missed by nobody but the ranks that come next: the one that ``tells`` has the driver know.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    missed: float | None = None  # since when
    while True:
        kind, reason = ray.get([setup.scribe.stop_kind.remote(), setup.scribe.stop_reason.remote()])
        if reason and kind != LOST:
            return None
        why = ""
        try:
            conductor, store = (ray.get_actor(name) for name in setup.roles)
            if all(ray.get([conductor.open.remote(), store.alive.remote()], timeout=10)):
                return conductor, store
        except GetTimeoutError:
            pass  # the driver looks for those that hang
        except (ValueError, RayActorError) as error:
            why = first_line(error)
        missed = (missed or time.monotonic()) if why and not reason else None
        if tells and missed and time.monotonic() - missed > _UNSEEN_S:
            missed = None
            ray.get(setup.scribe.stop.remote(_lost(why), LOST))
        time.sleep(0.2)


def _lost(why: str) -> str:
    return f"the conductor or the weight store is lost ({' '.join(why.split())[:200]})"


def _run(begin: Callable[[Any], Any], setup: Any) -> None:
    """A rank's life. Out of memory, or without conductor or weight store, it tells the driver and fails, which ends the ranks
    that wait for it. Train starts them again: out of memory all of them leave at once, and the driver begins anew with less;
    else they go on from the last checkpoint with the new ones."""
    import ray
    from ray.exceptions import RayActorError

    if ray.get(setup.scribe.stop_kind.remote()) == OUT_OF_MEMORY:
        return
    try:
        rank = begin(setup)
        if rank is None:
            return
        rank.run()
    except Exception as error:
        if is_out_of_memory(error):
            who = "pretrainer" if isinstance(setup, PretrainSetup) else "learner"
            ray.get(setup.scribe.stop.remote(f"{who}: out of memory ({first_line(error)})", OUT_OF_MEMORY))
        elif isinstance(error, RayActorError):
            ray.get(setup.scribe.stop.remote(_lost(str(error)), LOST))
        raise
    rank.close()


def train_on_ray(
    loop: Callable[[dict], None],
    settings: dict,
    config: Config,
    run_dir: str,
    name: str,
    datasets: dict[str, Any] | None = None,
) -> None:
    """Runs ``loop`` on the configured ranks and waits. A lost rank restarts the group, ``learner.max_failures`` times.

    Each rank reads the whole of the dataset it asks for: the loops name one dataset for each rank, which
    keeps the order of samples exact, where splitting one stream would not.
    """
    # Read by the controller when it starts: how often it looks after its workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.faults.hang_timeout_s)
    import ray.train
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    datasets = datasets or {}
    r = config.resources
    gpu = r.learner_gpus > 0
    resources = {"CPU": r.learner_cpus, **({"GPU": r.learner_gpus} if gpu else {}), **role_resources(config, "learner")}
    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=r.learner_workers, use_gpu=gpu, resources_per_worker=resources),
        # torch.set_num_threads binds the calling thread only; a backward that runs in another one would take every
        # core, and two ranks on two cores then wait for each other's threads (4 times slower).
        run_config=RunConfig(
            name=name,
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(r.threads)}},
            storage_path=str(RunDirectory(run_dir).ray_train.resolve()),
            failure_config=FailureConfig(max_failures=config.learner.max_failures),
        ),
        datasets=datasets,
        # Train would give the datasets its own options, and with them batches in the order their threads finish.
        dataset_config=DataConfig(
            datasets_to_split=[],
            execution_options={name: dataset.context.execution_options for name, dataset in datasets.items()},
        ),
    )
    before = _placement_groups()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RanksFailed(str(error)) from None
    finally:
        _free(_placement_groups() - before)


def _placement_groups() -> set[str]:
    """Ids of this job's placement groups that hold resources or wait for them. An id ends in that of its job."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {
        group for group, told in placement_group_table().items() if group.endswith(job) and told["state"] != "REMOVED"
    }


def _free(groups: set[str]) -> None:
    """Removes what a controller that was killed has left: Train's own cleaner asks Ray's dashboard who lives, which a Ray of our own
    does not have. Five lost controllers held more CPUs than two cores have, and the sixth waited for its ranks' place."""
    from ray._raylet import PlacementGroupID
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
