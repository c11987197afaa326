"""Learning rates that make every weight NaN, on two ranks of real Ray, Train and DeepSpeed: the run recovers."""

import json

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.exhaustive]

# One update at this rate, and the weights are of the order of the rate.
WILD = [
    "pretrain.lr=1.0e30",
    "pretrain.steps=6",
    "pretrain.log_every=1",
    "resources.learner_workers=2",
    "learner.zero_stage=2",
    "model.precision=float32",
    "evaluate.every=1",
]


def warnings(run):
    return [r["message"] for r in run.records if r["event"] == "warning"]


@pytest.fixture(scope="module")
def recovered(start):
    return start("run.stages=[prepare, pretrain, rl]", "rl.lr=1.0e30", "guards.lr_factor=1.0e-33", *WILD)


@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_training_begins_anew_with_a_rate_that_works(recovered, stage):
    told = [w for w in warnings(recovered) if w.startswith(f"{stage}: ")]
    assert len(told) == 3 and [f"{i} in a row" in w for i, w in enumerate(told, 1)] == [True] * 3
    key = "pretrain.lr" if stage == "pretrain" else "rl.lr"
    assert f"Going back to step 0, with 1e-33 of {key} from now on" in told[-1]
    assert [r["step"] for r in recovered.records if r["event"] == "resume" and r["stage"] == stage] == [0, 0]
    steps, rates = recovered.series(stage, "lr")
    assert len(steps) in (4, 6) and all(0 < rate < 1e-2 for rate in rates)
    assert all(norm > 0 for norm in recovered.series(stage, "grad_norm")[1])
    assert sum(recovered.series(stage, "skipped_updates")[1]) >= 1 and recovered.series(stage, "rollbacks")[1][-1] == 1
    kept = recovered.folder / "checkpoints" / stage / "rollbacks.json"
    assert json.loads(kept.read_text()) == {"rollbacks": 1}


def test_rollouts_of_such_weights_are_missing_scores_and_no_fault_of_the_scorers(recovered):
    told = [w for w in warnings(recovered) if "count as missing, because some of a group's are NaN or Inf" in w]
    assert told and "samples of step 1" in told[0]
    assert any("samples are NaN or Inf, and 100% of the groups have no score" in w for w in warnings(recovered))
    assert recovered.series("rl", "ratio/first_max_deviation")[1][0] <= 1e-6
    assert recovered.series("rl", "sampler/limit_deviation")[1][0] <= 1e-6


def test_an_evaluation_of_such_weights_ends_nothing_and_is_made_again(recovered):
    assert any("samples of 4 steps count as missing, because they are NaN or Inf" in w for w in warnings(recovered))
    entry = recovered.evaluation("step-000001")["by_steps"]["4"]["heldout"]["judge"]
    assert entry["mean"] is not None and "missing" not in entry


def test_the_config_may_end_the_run_instead(start):
    stopped = start("run.stages=[prepare, pretrain]", "guards.on_nonfinite=stop", *WILD, code=1)
    assert any(
        w.startswith("run stopped: pretrain: step 4: an update of 'policy' is skipped, 3 in a row")
        and "(guards.on_nonfinite = stop): lower pretrain.lr" in w
        for w in warnings(stopped)
    )
