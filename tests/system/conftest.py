"""One Ray for the whole session, and one smoke run that the other tests start from or compare with."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.cluster.join import ENVIRONMENT
from rlproxi.run import main
from rlproxi.telemetry.runlog import read, series

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@dataclass
class Done:
    """A finished run directory and how to read it."""

    folder: Path

    @property
    def records(self):
        return read(self.folder)

    def series(self, stage: str, key: str):
        return series(self.records, stage, key)

    def evaluation(self, tag: str) -> dict:
        return json.loads((self.folder / "evaluation" / f"{tag}.json").read_text())


@pytest.fixture(scope="session")
def ray_session():
    import os

    import ray

    # Workers import tests/fixtures/reward_functions.py by name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for name, value in {**ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}.items():
        os.environ.setdefault(name, value)
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def start(ray_session, tmp_path_factory):
    """start(*overrides, code=0) -> Done: the smoke config as `rlproxi run` runs it, in this process.

    The run directory is made in ``base``, where that is given.
    """

    def run(*overrides: str, code: int = 0, base: Path | None = None) -> Done:
        base = base or tmp_path_factory.mktemp("runs")
        assert main([SMOKE, f"run.dir={base}", *overrides]) == code
        folders = list(base.iterdir())
        assert len(folders) == 1
        return Done(folders[0])

    return run


@pytest.fixture(scope="session")
def smoke(start) -> Done:
    """The smoke run, unbroken."""
    return start()


@pytest.fixture(scope="session")
def from_smoke(smoke):
    """Overrides that start RL from the smoke run's models."""
    models = smoke.folder / "models"
    return [
        f"model.init={models / 'pretrained'}",
        f"rewards.train=[{{name: attributes, params: {{path: {models / 'reward.safetensors'}}}}}]",
        f"rewards.heldout=[{{name: judge, params: {{path: {models / 'judge.safetensors'}}}}}]",
    ]


@pytest.fixture(scope="session")
def rl_alone(from_smoke):
    """Overrides of a run of RL and nothing else from there: no evaluation, and so no judge that waits to be asked."""
    return ["run.stages=[rl]", "evaluate.every=0", "rewards.heldout=[]", *from_smoke[:2]]
