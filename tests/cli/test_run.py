"""``rlproxi run``: what it refuses before anything starts, its plan, and new run directories."""

import subprocess
import sys

import pytest

from actors.run import driver
from rlproxi import api
from rlproxi.config.loading import build_config, dump_config
from rlproxi.errors import RunStopped
from rlproxi.run import main


@pytest.fixture
def no_system(monkeypatch, tmp_path):
    """Neither Ray nor a run directory may be reached."""
    monkeypatch.setattr(driver, "Driver", lambda *_: pytest.fail("the run was started"))
    monkeypatch.setattr(api, "new_run_dir", lambda *_: pytest.fail("a run directory was made"))
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
        (["data.size=16"], "32 x 32 pixels: set data.size=32, or model.init=null for a new network"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(no_system, arguments, words, capsys, tmp_path):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_stops(no_system, capsys):
    shown = ["run.name=tiny", "data.size=16", "model.init=null", "model.channels=[32,32]", "rl.max_staleness=2"]
    assert main([*shown, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "run        tiny, seed 0" in captured.out and "16x16" in captured.out and captured.err == ""
    assert "staleness  at most 2 version(s)" in captured.out


def test_resume_takes_the_runs_own_config_and_overrides(tmp_path, monkeypatch, capsys):
    dump_config(
        build_config({"run": {"name": "mine"}, "data": {"size": 16}, "model": {"channels": [32, 32]}}),
        tmp_path / "config.yaml",
    )
    begun = []

    class Session:
        def __init__(self, config, run_dir):
            begun.append((config.run.name, config.rl.lr, run_dir))

        def run(self):
            raise RunStopped("half of the groups have no score")

    monkeypatch.setattr(driver, "Driver", Session)
    assert main(["--resume", str(tmp_path), "rl.lr=1e-6"]) == 1
    assert begun == [("mine", 1e-6, tmp_path)]
    assert capsys.readouterr().err == "\nstopped: half of the groups have no score\n"


def test_a_new_run_directory_never_reuses_one(tmp_path):
    config = build_config({"run": {"dir": str(tmp_path / "runs"), "name": "x"}})
    made = [api.new_run_dir(config) for _ in range(4)]
    assert len(set(made)) == 4 and all(p.is_dir() and p.name.startswith("x-") for p in made)


def test_the_front_door_needs_neither_ray_nor_actors_to_refuse():
    program = (
        "import sys; from rlproxi.run import main\n"
        "assert main(['gone.yaml']) == 2\n"
        "assert not {'ray', 'actors'} & set(sys.modules), 'Ray was imported to refuse a file name'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_scorer_does_not_take_is_refused_before_ray_is_asked(capsys, tmp_path):
    start = [f"run.dir={tmp_path}", "--dry-run"]
    for reward, words in (
        ("{name: atributes}", "rewards.train.0: reward 'atributes' is unknown: did you mean attributes?"),
        ("{name: jpeg, params: {qualty: 3}}", "it takes no 'qualty', did you mean 'quality'"),
        ("{name: mine, scorer: python}", "'function' is missing"),
    ):
        assert main([f"rewards.train=[{reward}]", *start]) == 2
        assert words in capsys.readouterr().err
    assert main(["rewards.train=[{name: mine, scorer: jpeg}]", *start]) == 0
