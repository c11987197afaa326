import json

import pytest

from rlproxi.config.loading import build_config
from rlproxi.pages.summary import summary
from rlproxi.telemetry.runlog import RunLog

SMALL = {"sampler": {"num_inference_steps": 4}, "run": {"seed": 3}}


def rl(log: RunLog, step: int, reward: float | None, rate: float = 10.0) -> None:
    log.append("metrics", stage="rl", step=step, **{"reward/mean": reward, "images_per_second": rate})


def evaluation(run_dir, tag: str, mean: float) -> None:
    (run_dir / "evaluation").mkdir(exist_ok=True)
    entry = {"heldout": {"judge": {"mean": mean, "sem": 0.01}}, "train": {}}
    (run_dir / "evaluation" / f"{tag}.json").write_text(json.dumps({"by_steps": {"2": {}, "4": entry}}))


def test_summary_of_a_whole_run(tmp_path):
    with RunLog(tmp_path) as log:
        log.append("stage", name="pretrain", status="start")
        log.append("metrics", stage="pretrain", step=1, loss=0.5, images_per_second=1000.0)
        log.append("stage", name="pretrain", status="done", seconds=20.0)
        log.append("metrics", stage="rl", step=0, **{"ratio/first_max_deviation": 0.0})
        for step, reward, rate in ((1, 0.50, 10.0), (2, 0.55, 20.0), (10, 0.7, 60.0)):
            rl(log, step, reward, rate)
        log.append("stage", name="rl", status="done", seconds=30.0)
    evaluation(tmp_path, "before", 0.61)
    evaluation(tmp_path, "after", 0.72)
    result = summary(tmp_path, build_config(SMALL))
    assert result["seconds"] == {"pretrain": 20.0, "rl": 30.0, "total": 50.0}
    assert result["reward"] == {"first": 0.5, "last": 0.7}
    assert result["heldout"] == {"before": 0.61, "after": 0.72, "best_iteration": None}
    assert result["images_per_second"] == pytest.approx(30.0) and result["seed"] == 3
    assert {"ray", "torch", "deepspeed", "numpy"} <= set(result["versions"]) and "git" in result
    assert json.loads(json.dumps(result)) == result


def test_summary_of_a_run_that_did_nothing_says_none_not_zero(tmp_path):
    result = summary(tmp_path, build_config(SMALL))
    assert result["seconds"] == {"total": 0} and result["images_per_second"] is None
    assert result["reward"] == {"first": None, "last": None} and set(result["heldout"].values()) == {None}


def test_a_step_done_again_counts_once_and_stages_add_up(tmp_path):
    with RunLog(tmp_path) as log:
        rl(log, 1, 0.5)
        rl(log, 2, 0.9)
        log.append("resume", stage="rl", step=1)
        log.append("stage", name="rl", status="done", seconds=5.0)
        rl(log, 2, 0.6, 30.0)
        log.append("stage", name="rl", status="done", seconds=6.0)
    result = summary(tmp_path, build_config(SMALL))
    assert result["reward"] == {"first": 0.5, "last": 0.6} and result["images_per_second"] == pytest.approx(20.0)
    assert result["seconds"]["rl"] == 11.0


def test_a_step_without_a_score_is_passed_over(tmp_path):
    with RunLog(tmp_path) as log:
        for step, reward in ((1, None), (2, 0.4), (3, 0.6), (4, float("nan"))):
            rl(log, step, reward)
    assert summary(tmp_path, build_config(SMALL))["reward"] == {"first": 0.4, "last": 0.6}


def test_steps_before_a_resume_that_were_not_done_again_do_not_count(tmp_path):
    with RunLog(tmp_path) as log:
        for step, reward in ((1, 0.5), (2, 0.6), (3, 0.9)):
            rl(log, step, reward)
        log.append("resume", stage="rl", step=1)
        rl(log, 2, 0.55)
    assert summary(tmp_path, build_config(SMALL))["reward"]["last"] == 0.55


def test_without_a_heldout_reward_there_is_no_heldout_number(tmp_path):
    evaluation(tmp_path, "before", 0.61)
    assert summary(tmp_path, build_config({**SMALL, "rewards": {"heldout": []}}))["heldout"]["before"] is None
