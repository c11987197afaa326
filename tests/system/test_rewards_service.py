"""A score that cannot be had masks its group, is counted, and never becomes a number."""

import sys

import numpy as np
import pytest

from rlproxi.telemetry.runlog import read

pytestmark = [pytest.mark.system, pytest.mark.slow]

FUNCTIONS = '''
import numpy as np

def brightness(images, prompts):
    return images.mean((1, 2, 3)) / 255

def half_broken(images, prompts):
    if "smiling" in prompts[0]:
        raise RuntimeError("no smiling today")
    if "frowning" in prompts[0]:
        return np.full(len(images), np.nan)
    return brightness(images, prompts)

def all_broken(images, prompts):
    return brightness(images, prompts)[:-1]
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """A module of reward functions that driver and replicas can import."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "my_rewards.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture
def rl(start, from_smoke, functions, monkeypatch):
    """rl(function, *overrides, code) -> a finished RL stage with that reward."""
    from actors import reward_service

    monkeypatch.syspath_prepend(str(functions))
    deploy_one = reward_service._deploy_one

    def run(function: str, *overrides: str, code: int = 0):
        reward = f"rewards.train=[{{name: python, params: {{function: 'my_rewards:{function}'}}}}]"
        return start("run.stages=[rl]", "evaluate.every=0", "grpo.prompts_per_step=8", "rewards.retries=1",
                     from_smoke[0], reward, "rewards.heldout=[]", f"rewards.python_path={functions}", *overrides, code=code)
    return run


def test_a_function_of_ones_own(rl):
    rewards = rl("brightness").series("rl", "reward/mean")[1]
    assert len(rewards) == 4 and all(0 < r < 1 for r in rewards)


def test_failed_groups_are_masked_and_counted(rl):
    run = rl("half_broken", "rewards.max_masked_fraction=1.0")
    masked = run.series("rl", "groups/masked")[1]
    assert sum(masked) > 0, "some of 32 prompts smile or frown"
    assert all(0 < r < 1 for r in run.series("rl", "reward/mean")[1])
    told = " ".join(r["message"] for r in run.records if r["event"] == "warning")
    assert "no smiling today" in told and "NaN" in told


def test_a_run_without_scores_stops_and_says_why(rl, capsys):
    run = rl("all_broken", code=1)
    told = capsys.readouterr().err
    assert "100% of the groups" in told and "rewards.max_masked_fraction" in told
    assert any("returned shape (3,) for 4 images" in r.get("message", "") for r in run.records)
    assert not run.series("rl", "loss")[1]


def test_a_reward_that_cannot_start(start, from_smoke, capsys):
    start("run.stages=[rl]", from_smoke[0], "rewards.train=[{name: atributes}]", code=2)
    assert "did you mean 'attributes'" in capsys.readouterr().err
