"""The whole circle on real Ray, Train, Serve, Data and DeepSpeed."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlproxi.cli.main import main as cli
from rlproxi.run import main

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_every_stage_leaves_its_result(smoke):
    stages = [(r["name"], r["status"]) for r in smoke.records if r["event"] == "stage"]
    names = ["prepare", "pretrain", "before", "rl", "after", "report"]
    assert stages == [(n, s) for n in names for s in ("start", "done")]
    summary = json.loads((smoke.folder / "summary.json").read_text())
    assert set(summary) >= {"seconds", "reward", "heldout", "images_per_second", "seed", "git", "versions"}
    assert set(summary["seconds"]) >= {"total", "prepare", "pretrain", "before", "rl", "after"}
    assert summary["heldout"]["before"] == smoke.evaluation("before")["by_steps"]["4"]["heldout"]["judge"]["mean"]
    assert summary["images_per_second"] > 0
    assert (smoke.folder / "models" / "final" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert "<svg" in (smoke.folder / "report.html").read_text()
    assert yaml.safe_load((smoke.folder / "config.yaml").read_text())["rl"]["group_size"] == 4


def test_metrics_of_pretraining_and_rl(smoke):
    assert smoke.series("pretrain", "loss")[0][-1] == 20
    steps, rewards = smoke.series("rl", "reward/mean")
    assert list(steps) == [1, 2, 3, 4]
    assert all(0 < r < 1 for r in rewards)
    assert all(k > 0 for k in smoke.series("rl", "kl")[1][1:]), "after one update the policy has left the reference"
    assert list(smoke.series("rl", "staleness/mean")[1]) == [0, 0, 0, 0]


def test_first_ratio_is_one(smoke):
    _, deviation = smoke.series("rl", "ratio/first_max_deviation")
    assert len(deviation) == 1 and deviation[0] <= 1e-6
    # One update an iteration: every ratio is measured before its update, so all are 1.
    assert max(smoke.series("rl", "ratio/max_deviation")[1]) <= 1e-6


def test_rl_changes_the_policy_and_evaluations_use_it(smoke):
    before, after = (np.load(smoke.folder / "samples" / f"{tag}-N4.npz")["images"] for tag in ("before", "after"))
    assert before.shape == after.shape == (16, 16, 16, 3) and before.dtype == np.uint8
    assert 0 < np.abs(before.astype(int) - after).mean() < 20
    middle = smoke.evaluation("step-000002")
    assert list(middle["by_steps"]) == ["4"] and middle["prompts"] == smoke.evaluation("before")["prompts"]


def test_sample_from_the_run(smoke, tmp_path, capsys):
    out = tmp_path / "face.png"
    assert cli(["sample", "a smiling person with pale skin", "--model", str(smoke.folder), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_more_gpus_than_the_cluster_has(start, from_smoke, capsys, tmp_path):
    assert main([SMOKE, f"run.dir={tmp_path}", "resources.rollout_gpus=1", *from_smoke]) == 2
    told = capsys.readouterr().err
    assert "asks for 1 GPUs" in told and "the cluster has 0" in told and "resources.autoscaling" in told


def test_no_starting_policy(start, capsys, tmp_path):
    assert main([SMOKE, f"run.dir={tmp_path}", "run.stages=[rl]"]) == 2
    assert "no starting policy" in capsys.readouterr().err
    assert main([SMOKE, f"run.dir={tmp_path}", "run.stages=[rl]", "model.init=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
