"""A scorer of one's own that nothing in the project names is found wherever the built-in ones are."""

import json

import numpy as np
import pytest
import torch

from fixtures.made_up_scorer import Redness
from rlproxi.cli import main as cli
from rlproxi.config.loading import build_config
from rlproxi.pages.reference import describe as reference
from rlproxi.pages.report import write_report
from rlproxi.planning.dry_run import describe
from rlproxi.planning.memory import estimate
from rlproxi.planning.preflight import problems
from rlproxi.rewards import RewardError, build, checked_params, checked_scores, facts, is_differentiable, provenance
from rlproxi.rewards.gradients import RewardGradients
from rlproxi.telemetry.live import LiveRun
from rlproxi.telemetry.runlog import RunLog

NAME = "fixtures.made_up_scorer:Redness"


@pytest.fixture
def weights(tmp_path):
    torch.save({"weight": torch.tensor([[1.0, -0.5, -0.5]])}, tmp_path / "red.pt")
    return str(tmp_path / "red.pt")


def config(weights: str, algorithm: str = "r0", **reward):
    values = {
        "run": {"stages": ["pretrain", "rl"], "algorithm": algorithm},
        "model": {"channels": [32, 64], "precision": "float32"},
        "rewards": {
            "train": [{"name": "red", "scorer": NAME, "params": {"weights": weights}, **reward}],
            "heldout": [],
        },
    }
    return build_config(values)


def test_it_is_built_checked_and_differentiated_by_its_path(weights):
    assert facts(NAME) is Redness and is_differentiable(NAME)
    assert checked_params(NAME, {"weights": weights, "micro_batch": 2})["micro_batch"] == 2
    with pytest.raises(ValueError, match=f"reward '{NAME}' cannot be built .*it takes no 'wieghts', did you mean 'w"):
        checked_params(NAME, {"weights": weights, "wieghts": "x"})
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0, ..., 0] = 255
    scorer = build(NAME, {"weights": weights, "device": "cpu"})
    assert checked_scores(scorer, "red", images, ["", ""]).tolist() == [1.0, 0.0]
    assert set(provenance(scorer)) == {"class", weights}
    gradients = RewardGradients.build(config(weights).rewards.train, None, False, "cpu")
    found = gradients(torch.zeros(1, 3, 4, 4), [""])
    assert (found.ascent[0, 0] > 0).all() and (found.ascent[0, 1:] < 0).all()


@pytest.mark.parametrize(
    "name, words",
    [
        ("fixtures.made_up_scorer:Rednes", "cannot be imported: AttributeError: .*Rednes.*installed or on PYTHONPATH"),
        ("no_such_module:Redness", "cannot be imported: ModuleNotFoundError: .*no_such_module"),
        ("pathlib:Path", "is not a class with a method score"),
    ],
)
def test_a_path_that_leads_to_no_scorer_is_refused_before_the_run(name, words, weights):
    with pytest.raises(ValueError, match=f"reward {name!r} {words}"):
        build(name, {})
    (problem,) = problems(config(weights, "grpo", scorer=name))
    assert problem.text.startswith(f"rewards.train.0: reward {name!r} ") and not problem.missing
    assert problems(config(weights, "grpo", scorer=name, runtime_env={"pip": ["x"]})) == [], "not this environment's"


def test_preflight_names_its_missing_file(weights):
    assert problems(config(weights)) == []
    (problem,) = problems(config("gone.pt"))
    assert (
        problem.text.startswith("rewards.train.0: reward 'red': weights 'gone.pt' does not exist") and problem.missing
    )


def test_the_plan_and_the_memory_estimate_have_what_it_says_of_itself(weights):
    settled = config("gone.pt")
    assert "rewards    red; held out: none; 1 replica(s), CPU each" in list(describe(settled))
    roles = {role.name: role for role in estimate(settled).roles}
    assert roles["reward red"].parts == {"weights": 12} and roles["learner rank"].parts["reward red"] == 12
    assert estimate(settled).notes == []


def test_the_command_scores_with_it(weights, tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    out = tmp_path / "scores.json"
    command = ["score", str(tmp_path / "a.png"), "--reward", NAME, "--checkpoint", weights, "--prompt", ""]
    assert cli.main([*command, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["scores"][0]["score"] == 1.0


def test_the_report_and_the_live_page_have_it_by_the_name_that_the_run_gave_it(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 4):
            parts = {"reward/mean": 0.2 * step, "reward/crimson": 0.1 * step, "reward/jpeg": 0.3 * step}
            log.append("metrics", stage="rl", step=step, **parts)
    assert "crimson" in write_report(tmp_path).read_text()
    live = LiveRun(tmp_path)
    live.open()
    assert "reward/crimson" in json.dumps(live.snapshot())


def test_the_generated_reference_has_it_with_its_parameters():
    (row,) = [line for line in reference(scorers=[NAME]).splitlines() if line.startswith(f"| `{NAME}`")]
    assert "`weights`: text, a file; required<br>`sign`: float; `1.0` | yes | The pixels' mean, weighted by col" in row
    page = reference()
    assert NAME not in page and "| `hpsv2`, `hpsv2.1` | `checkpoint`: text, or null, a file; `null`" in page
    assert '| `judge` | `path`: text, a file; the stage `prepare` makes it<br>`precision`: text; `"float32"`' in page


def test_what_it_raises_is_a_missing_score(weights):
    scorer = build(NAME, {"weights": weights, "device": "cpu"})
    with pytest.raises(RewardError, match="reward 'red' raised"):
        checked_scores(scorer, "red", np.zeros((1, 8, 8), np.uint8), [""])
