import json
import sys

import pytest

from actors.run import driver
from rlproxi.cli import run
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


@pytest.fixture
def no_system(monkeypatch, tmp_path):
    """Neither Ray nor a run directory may be reached."""
    monkeypatch.setattr(driver, "Driver", lambda *_: pytest.fail("the run was started"))
    monkeypatch.setattr(run, "_new_run_dir", lambda *_: pytest.fail("a run directory was made"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--resume", "runs/gone"], "--resume runs/gone: no config.yaml there, so it is not a run directory"),
        (["no/such.yaml"], "config 'no/such.yaml' does not exist; the ones that come along: "),
        (["a.yaml", "b.yaml"], "one config at a time, got a.yaml, b.yaml"),
        (["a.yaml", "--resume", "runs/x"], "--resume takes the run's own config.yaml; leave out a.yaml"),
        (["grpo.group_sise=4"], "unknown key 'grpo.group_sise'; did you mean rl.group_size?"),
        (["rl.group_size=1", "--dry-run"], "group_size is 1"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(no_system, arguments, words, capsys, tmp_path):
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_stops(no_system, capsys):
    shown = ["run.name=tiny", "data.size=16", "model.channels=[32,32]", "rl.max_staleness=2"]
    assert run.main([*shown, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "run        tiny, seed 0" in captured.out and "16x16" in captured.out and captured.err == ""
    assert "staleness  at most 2 version(s)" in captured.out


def test_resume_takes_the_runs_own_config_and_overrides(tmp_path, monkeypatch, capsys):
    from rlproxi.config.loading import dump_config

    dump_config(
        build_config({"run": {"name": "mine"}, "data": {"size": 16}, "model": {"channels": [32, 32]}}),
        tmp_path / "config.yaml",
    )
    begun = []

    class Session:
        def __init__(self, config, run_dir):
            begun.append((config.run.name, config.rl.lr, run_dir))

        def run(self):
            raise run.RunStopped("half of the groups have no score")

    monkeypatch.setattr(driver, "Driver", Session)
    assert run.main(["--resume", str(tmp_path), "rl.lr=1e-6"]) == 1
    assert begun == [("mine", 1e-6, tmp_path)]
    assert capsys.readouterr().err == "\nstopped: half of the groups have no score\n"


def test_a_new_run_directory_never_reuses_one(tmp_path):
    config = build_config({"run": {"dir": str(tmp_path / "runs"), "name": "x"}})
    made = [run._new_run_dir(config) for _ in range(4)]
    assert len(set(made)) == 4 and all(p.is_dir() and p.name.startswith("x-") for p in made)


def test_the_front_door_needs_neither_ray_nor_actors_to_refuse():
    import subprocess

    program = (
        "import sys; from rlproxi import run\n"
        "assert run.main(['gone.yaml']) == 2\n"
        "assert not {'ray', 'actors'} & set(sys.modules), 'Ray was imported to refuse a file name'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_scorer_does_not_take_is_refused_before_ray_is_asked(capsys, tmp_path):
    start = [f"run.dir={tmp_path}", "--dry-run"]
    for reward, words in (
        ("{name: atributes}", "rewards.train.0: reward 'atributes' is unknown; did you mean 'attributes'"),
        ("{name: jpeg, params: {qualty: 3}}", "it takes no 'qualty', did you mean 'quality'"),
        ("{name: mine, scorer: python}", "'function' is missing"),
    ):
        assert run.main([f"rewards.train=[{reward}]", *start]) == 2
        assert words in capsys.readouterr().err
    assert run.main(["rewards.train=[{name: mine, scorer: jpeg}]", *start]) == 0
