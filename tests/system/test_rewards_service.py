"""A score that cannot be had masks its group, is counted, and never becomes a number."""

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def rl(start, from_smoke):
    """rl(function, *overrides, code) -> a finished RL stage with that function of tests/reward_functions.py."""
    def run(function: str, *overrides: str, code: int = 0):
        reward = f"rewards.train=[{{name: python, params: {{function: 'reward_functions:{function}'}}}}]"
        return start("run.stages=[rl]", "evaluate.every=0", "grpo.prompts_per_step=8", "rewards.retries=1",
                     from_smoke[0], reward, "rewards.heldout=[]", *overrides, code=code)
    return run


def test_a_function_of_ones_own(rl):
    rewards = rl("brightness").series("rl", "reward/mean")[1]
    assert len(rewards) == 4 and all(0 < r < 1 for r in rewards)


def test_failed_groups_are_masked_and_counted(rl):
    run = rl("half_broken", "rewards.max_masked_fraction=1.0")
    masked = run.series("rl", "groups/masked")[1]
    assert sum(masked) > 0, "some of 32 prompts smile or frown"
    assert all(0 < r < 1 for r in run.series("rl", "reward/mean")[1] if r is not None)
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
