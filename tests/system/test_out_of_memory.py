"""A micro-batch that does not fit: the run halves it and goes on."""

import os
from pathlib import Path

import pytest
import yaml

from rlproxi.telemetry.runlog import read, series

pytestmark = [pytest.mark.system, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

# Loaded by every rank: networks that are trained on more than four images run out of memory, with
# the error that a GPU raises.
SMALL_CHIP = """
import importlib.util, sys

class Patched:
    def find_spec(self, name, path=None, target=None):
        if name != "rlproxi.models.unet":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import torch
            network = module.ProximalUNet.network

            def small(self, x, *rest):
                if torch.is_grad_enabled() and type(x) is torch.Tensor and len(x) > 4:  # not the memory estimate's
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
                return network(self, x, *rest)
            module.ProximalUNet.network = small
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patched())
"""


@pytest.fixture
def small_chip(monkeypatch, ray_session, tmp_path):
    """Ranks on it."""
    from ray.train import RunConfig

    (tmp_path / "sitecustomize.py").write_text(SMALL_CHIP)
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])
    made = RunConfig.__post_init__

    def with_path(config):
        config.worker_runtime_env["env_vars"]["PYTHONPATH"] = path
        made(config)

    monkeypatch.setattr(RunConfig, "__post_init__", with_path)


@pytest.mark.parametrize("stages", [["rl"], pytest.param(["pretrain", "rl"], marks=pytest.mark.exhaustive)])
def test_stages_halve_their_micro_batches(stages, start, rl_alone, small_chip):
    folder = start(
        *rl_alone,
        f"run.stages=[{', '.join(stages)}]",
        "pretrain.steps=2",
        "pretrain.batch_size=8",
        "pretrain.log_every=1",
        "rl.steps=2",
        "learner.max_failures=1",
    ).folder
    records = read(folder)
    told = [r["message"] for r in records if r["event"] == "warning" and "going on with" in r["message"]]
    assert len(told) == len(stages)
    values = yaml.safe_load((folder / "config.yaml").read_text())  # a resumed run begins with what fits
    if "pretrain" in stages:
        assert "pretrainer: out of memory (CUDA out of memory" in told[0]
        assert told[0].endswith("going on with pretrain.micro_batch_size=4 (was pretrain.micro_batch_size=8)")
        assert values["pretrain"]["micro_batch_size"] == 4
    assert told[-1].endswith("going on with rl.groups_per_micro_batch=1 (was rl.groups_per_micro_batch=2)")
    assert values["rl"]["groups_per_micro_batch"] == 1
    for stage in stages:
        assert list(series(records, stage, "loss")[0]) == [1, 2]
    assert series(records, "rl", "ratio/first_max_deviation")[1] == [0.0]
