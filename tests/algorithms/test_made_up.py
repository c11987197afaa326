"""An algorithm in one module of its own is found everywhere, and no other file names it."""

import pytest

from fixtures.made_up_algorithm import RewardWeighted
from rlproxi.algorithms.base import build_algorithm
from rlproxi.algorithms.guards.over_optimisation import Evaluated, OverOptimisation
from rlproxi.config import build_config, dump_config, load_config
from rlproxi.errors import ConfigError
from rlproxi.pages.reference import describe as reference
from rlproxi.pages.report import render
from rlproxi.planning.dry_run import describe
from rlproxi.planning.memory import estimate
from rlproxi.planning.preflight import problems
from rlproxi.telemetry.live.run import totals
from rlproxi.telemetry.run_reader import RunReader
from rlproxi.telemetry.runlog import RunLog

NAME = "fixtures.made_up_algorithm:RewardWeighted"


def made(**sections):
    return build_config(
        {
            "run": {"algorithm": NAME, "stages": ["rl"]},
            "data": {"size": 16},
            "model": {"channels": [32, 32], "precision": "float32"},
            "sampler": {"num_inference_steps": 3},
            "rewards": {"train": [{"name": "jpeg"}], "heldout": []},
            **sections,
        }
    )


def test_its_settings_and_defaults_are_the_configs(tmp_path):
    config = made(custom={"temperature": 0.5})
    assert config.custom.temperature == 0.5 and (config.rl.steps, config.rl.group_size) == (30, 4)
    assert isinstance(build_algorithm(config), RewardWeighted)
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert made(rl={"steps": 5}).rl.steps == 5
    for sections, words in (
        ({"custom": {"temprature": 1}}, r"unknown key 'custom.temprature'; did you mean custom.temperature\?"),
        ({"custom": {"temperature": 0}}, "custom.temperature = 0: Input should be greater than 0"),
        ({"custom": {"lr": 1}}, r"unknown key 'custom.lr'; did you mean rl.lr\?"),
        ({"rl": {"group_size": 1}}, "rl.group_size is 1: weights compare samples"),
    ):
        with pytest.raises(ConfigError, match=words):
            made(**sections)


def test_it_is_in_the_generated_reference():
    page = reference(NAME)
    assert "| `custom.temperature` | float, > 0 | `0.1` | T, the temperature" in page
    assert f"- `{NAME}`: `rl.group_size` 4, `rl.steps` 30" in page
    assert "custom.temperature" not in reference()


def test_it_is_in_the_dry_run_and_the_memory_of_it():
    config = made()
    page = list(describe(config))
    assert f"algorithm  {NAME}: temperature 0.1" in page
    micro = config.rl.rows * (3 * 16**2 + 4 * 6 * 3 * 16**2)  # images, and two steps of z, z_next and prox
    assert f"in flight  {micro / 2**20:.1f} MB a micro-batch" in " ".join(page)
    found = estimate(config)
    assert found.notes == [] and found.roles[0].name == "learner rank"
    chain = config.rl.rows * 4 * 6 * 3 * 16**2
    assert found.roles[0].parts["batch"] > config.rl.micro_batches * chain and found.roles[0].parts["activations"] > 0


def test_bounds_are_checked_with_its_bytes():
    stages = {"algorithm": NAME, "stages": ["pretrain", "rl"]}
    config = made(run=stages, rl={"max_bytes_in_flight": 1000})
    (found,) = [problem.text for problem in problems(config) if problem.text.startswith("rl.")]
    assert "rl.max_bytes_in_flight is 1000" in found


def test_the_live_page_the_report_and_the_alarm_know_it(tmp_path):
    config = made()
    assert totals(config.model_dump(mode="json"))["rl"] == 30
    dump_config(config, tmp_path / "config.yaml")
    with RunLog(tmp_path) as log:
        for step in (1, 2):
            log.append("metrics", stage="rl", step=step, **{"weights/largest": 0.5, "loss": 1.0})
    page = render(RunReader(tmp_path))
    policy = page.partition("<h2>Is the policy update sound?</h2>")[2].partition("</section>")[0]
    assert "<b>weights/largest</b> is 0.5 at all 2 RL steps." in policy and "<b>loss</b> is 1" in policy
    assert "ratio" not in policy
    guard = OverOptimisation(config)
    guard.see(Evaluated(0, 0.5, 0.6, 0.01))
    assert guard.see(Evaluated(10, 0.6, 0.5, 0.01)).endswith("lower rl.lr or raise custom.temperature")


def test_a_class_that_cannot_be_imported_leaves_its_run_readable():
    config = made(run={"algorithm": "no_such_module:Ours", "stages": ["rl"]}, custom={"anything": [1]})
    assert config.model_dump()["custom"] == {"anything": [1]}
    assert [p.text for p in problems(config) if p.text.startswith("run.algorithm")] == [
        "run.algorithm 'no_such_module:Ours' cannot be imported: ModuleNotFoundError: No module named "
        "'no_such_module'; it must be installed or on PYTHONPATH"
    ]
