"""One run, killed (SIGKILL, with its whole Ray) in its stages and resumed each time, against the unbroken one."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fixtures.run_processes import has_step, kill_when, launch
from rlproxi.telemetry.runlog import read, series

pytestmark = [pytest.mark.system, pytest.mark.slow]

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@pytest.mark.parametrize(
    "points, stages",
    [
        # Each starts a Ray of its own twice or more. In every test run test_faults.py resumes RL on real Ray, and
        # tests/actors/train/ kills and resumes both stages at any point.
        pytest.param(("pretrain 11",), ("prepare", "pretrain"), marks=pytest.mark.exhaustive),
        pytest.param(
            ("prepare", "pretrain 11", "before", "rl 3", "after"),
            ("prepare", "pretrain", "before", "rl", "after", "report"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_killed_in_its_stages_and_resumed(points, stages, smoke, tmp_path):
    folder = lambda: next(iter(tmp_path.iterdir()))  # noqa: E731

    def reached(point: str) -> bool:
        if not (any(tmp_path.iterdir()) and (folder() / "metrics.jsonl").exists()):
            return False
        stage, _, step = point.partition(" ")
        if step:
            return has_step(folder(), stage, int(step))
        return any(r["event"] == "stage" and r["name"] == stage for r in read(folder()))

    kill_when(
        launch([SMOKE, f"run.dir={tmp_path}", "pretrain.log_every=1", f"run.stages=[{', '.join(stages)}]"]),
        lambda: reached(points[0]),
    )
    resume = ["--resume", str(folder())]
    told = ""
    for point in points[1:]:
        process = launch(resume)
        kill_when(process, lambda: reached(point))
        told += process.stdout.read()
    last = launch(resume)
    output = last.communicate(timeout=240)[0]
    assert last.returncode == 0, output[-3000:]
    told += output
    assert not any(words in told for words in ("Dataset", "Progress bars", "raylet")), "Ray's own words break into ours"

    records = read(folder())
    for stage, point, saved, steps in (("pretrain", "pretrain 11", 10, 20), ("rl", "rl 3", 2, 4))[
        : 1 + ("rl" in stages)
    ]:
        hit = point in points
        assert [r["step"] for r in records if r["event"] == "resume" and r["stage"] == stage] == [0, saved][: 1 + hit]
        said = f"{stage}: goes on from step {saved} of {steps}, bit for bit the unbroken run"
        assert [r["message"] for r in records if r["event"] == "note"].count(said) == hit and told.count(said) == hit
    for key in ("loss", "grad_norm", "lr"):
        steps, values = series(records, "pretrain", key)
        assert list(steps) == list(range(1, 21))
        # The unbroken run logs means of ten steps.
        assert np.mean(values[10:]) == pytest.approx(smoke.series("pretrain", key)[1][-1], rel=1e-9)
    weights = "models/pretrained/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(run / weights) for run in (folder(), smoke.folder))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    if "rl" not in stages:
        return
    for key in ("reward/mean", "reward/attributes", "loss", "grad_norm", "kl", "advantages/zero_variance_groups"):
        assert series(records, "rl", key) == smoke.series("rl", key), key
    for tag in ("before", "after"):
        ours = json.loads((folder() / "evaluation" / f"{tag}.json").read_text())
        assert ours == smoke.evaluation(tag)
    both = [json.loads((f / "summary.json").read_text()) for f in (folder(), smoke.folder)]
    assert both[0]["heldout"] == both[1]["heldout"] and both[0]["reward"] == both[1]["reward"]
