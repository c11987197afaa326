"""R0, DIDR and an algorithm of one's own on real Ray, from the smoke run's models."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fixtures import made_up_algorithm
from fixtures.run_processes import has_step, kill_when, launch
from rlproxi.models.pipeline import TextToImage
from rlproxi.telemetry.runlog import read, series

pytestmark = [pytest.mark.system, pytest.mark.slow]

R0 = [
    "run.algorithm=r0",
    "rl.steps=3",
    "rl.prompts_per_step=8",
    "rl.groups_per_micro_batch=4",
    "rl.lr=1.0e-3",
    "rl.warmup_steps=1",
    "rl.ema=0.9",
    "r0.distribution_weight=0.5",
    "fake.updates=1",
    "sampler.num_inference_steps=3",
]
DIDR = [
    "run.algorithm=didr",
    "rl.steps=5",
    "rl.prompts_per_step=8",
    "rl.groups_per_micro_batch=4",
    "rl.lr=1.0e-3",
    "fake.lr=1.0e-3",
    "rl.warmup_steps=1",
    "rl.ema=0.9",
    "rl.anchor=1.0e-3",
    "rl.checkpoint_every=2",
    "sampler.num_inference_steps=1",
    "evaluate.steps=[1]",
]
TWO = ["learner.zero_stage=3", "resources.learner_workers=2"]


@pytest.fixture(scope="module")
def r0(start, from_smoke):
    return start("run.stages=[rl, after, report]", "evaluate.every=2", *R0, *from_smoke)


@pytest.fixture(scope="module")
def didr(start, from_smoke):
    return start("run.stages=[before, rl, after, report]", "evaluate.every=3", *DIDR, *from_smoke)


def same_first_step(one, other, keys):
    for key in keys:
        assert other.series("rl", key)[1][0] == pytest.approx(one.series("rl", key)[1][0], rel=2e-5), key


def test_r0_trains_evaluates_and_saves_its_average(r0):
    assert r0.series("rl", "reward/mean")[0] == [1, 2, 3]
    tags = {file.stem for file in (r0.folder / "evaluation").glob("*.json")}
    assert tags == {"step-000002", "after"} and (r0.folder / "report.html").is_file()
    # The last evaluation is of what was saved: the averaged weights, through the pipeline like any other.
    assert r0.evaluation("after")["by_steps"]["3"]["heldout"]["judge"]["mean"] is not None
    images = TextToImage.from_pretrained(r0.folder)(["a smiling man with red hair"], seeds=[1])
    assert images.shape == (1, 16, 16, 3)
    ema = load_file(r0.folder / "checkpoints" / "rl" / "step-000003" / "ema.safetensors")
    saved = load_file(next((r0.folder / "models" / "final" / "unet").glob("*.safetensors")))
    assert all(np.array_equal(saved[name], value) for name, value in ema.items() if name != "updates")


@pytest.mark.exhaustive  # in every test run by tests/actors/: engine, state, saving
def test_r0_on_two_ranks_at_zero_3_takes_the_same_first_step(r0, start, from_smoke):
    two = start("run.stages=[rl]", "evaluate.every=0", *R0, "rl.steps=1", *TWO, *from_smoke)
    same_first_step(r0, two, ("fake/loss", "fake/grad_norm", "reward/mean", "grad_norm"))


@pytest.mark.exhaustive
def test_didr_on_two_ranks_at_zero_3_takes_the_same_first_step(didr, start, from_smoke):
    two = start("run.stages=[rl]", "evaluate.every=0", *DIDR, "rl.steps=1", *TWO, *from_smoke)
    same_first_step(didr, two, ("fake/loss", "fake/grad_norm", "loss", "grad_norm", "reward/mean"))


@pytest.mark.exhaustive  # in every test run by tests/actors/: engine, state, saving
def test_didr_killed_and_resumed_is_the_unbroken_run_for_both_networks(didr, from_smoke, tmp_path):
    """Weights, moments, start and average of the generator, weights and moments of the fake score: all go on."""
    smoke = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
    folder = lambda: next(iter(tmp_path.iterdir()))  # noqa: E731
    first = launch(
        [smoke, f"run.dir={tmp_path}", "run.stages=[before, rl, after, report]", "evaluate.every=3", *DIDR, *from_smoke]
    )
    kill_when(
        first, lambda: any(tmp_path.iterdir()) and (folder() / "metrics.jsonl").exists() and has_step(folder(), "rl", 3)
    )
    last = launch(["--resume", str(folder())])
    output = last.communicate(timeout=240)[0]
    assert last.returncode == 0, output[-3000:]
    records = read(folder())
    assert [r["step"] for r in records if r["event"] == "resume" and r["stage"] == "rl"] == [0, 2]
    for key in ("fake/loss", "fake/grad_norm", "loss", "grad_norm", "reward/mean", "lr"):
        assert series(records, "rl", key) == didr.series("rl", key), key
    assert json.loads((folder() / "evaluation" / "after.json").read_text()) == didr.evaluation("after")


def test_an_algorithm_of_ones_own_is_a_class_and_a_key(start, rl_alone):
    source = Path(made_up_algorithm.__file__).read_text().partition("class ")[2]
    assert len(source.splitlines()) < 60
    run = start(
        *rl_alone,
        "run.algorithm=fixtures.made_up_algorithm:RewardWeighted",
        "rl.steps=2",
        "rl.prompts_per_step=4",
        "rl.group_size=4",
        "rl.groups_per_micro_batch=2",
        "custom.temperature=0.1",
        "rl.lr=1.0e-4",
        "rl.warmup_steps=0",
    )
    steps, losses = run.series("rl", "loss")
    assert steps == [1, 2] and losses[1] != losses[0]
    assert (run.folder / "models" / "final" / "unet").is_dir()
