"""What a run notices about itself: each observer trips where it should and is silent where it should."""

import numpy as np
import pytest

from rlproxi.algorithms.base import AlgorithmStopped, build_algorithm
from rlproxi.algorithms.guards.over_optimisation import Evaluated, OverOptimisation
from rlproxi.algorithms.guards.training import FallingReward, FlatGroups, Mismatch, TrainingWarnings
from rlproxi.config.guards import Guards
from rlproxi.config.loading import build_config

FLAT = {"advantages/zero_variance_groups": 4.0, "groups/masked": 0.0}
FINE = {"advantages/zero_variance_groups": 3.0, "groups/masked": 0.0}


def test_a_mismatch_is_told_once_with_step_and_size_and_anew_after_it_was_well():
    key = "grpo.first_ratio_tolerance"
    seen, off = Mismatch(1e-6, key), {"ratio/first_max/0": 1e-7, "ratio/first_max/3": 2e-3}
    words = seen.see(7, off)
    assert words.startswith(
        "iteration 7: rollout and learner disagree before the first update, most at sampling step 3, by 2.00e-03"
    )
    assert "grpo.first_ratio_tolerance = 1e-06" in words and "model.precision=float32" in words
    assert seen.see(8, off) is None and seen.see(9, {"ratio/first_max/1": 1e-6}) is None and seen.see(10, off)
    assert Mismatch(1e-6, key).see(0, {"ratio/max_log": 9.0}) is None


def test_groups_without_variance_are_told_after_so_many_iterations_in_a_row():
    seen = FlatGroups(3)
    assert [bool(seen.see(i, m, 4)) for i, m in enumerate([FLAT, FLAT, FINE, FLAT, FLAT, FLAT, FLAT])] == [
        False
    ] * 5 + [True, False]
    masked = {"advantages/zero_variance_groups": 2.0, "groups/masked": 2.0}
    nothing = {"advantages/zero_variance_groups": 0.0, "groups/masked": 4.0}
    seen = FlatGroups(2)
    assert seen.see(0, masked, 4) is None and seen.see(1, nothing, 4) is None
    words = seen.see(2, FLAT, 4)
    assert words.startswith(
        "iteration 2: not one of 4 groups had rewards that differ, 2 iterations in a row (guards.flat_iterations)"
    )
    assert "rl.group_size" in words
    assert FlatGroups(None).see(0, FLAT, 4) is None and FlatGroups(1).see(0, {"loss": 1.0}, 4) is None


def fed(rewards, window=20):
    seen = FallingReward(window)
    return [(i, words) for i, r in enumerate(rewards) if (words := seen.see(i, r))]


@pytest.mark.parametrize("seed", range(5))
def test_a_reward_that_falls_for_long_is_told_once_and_noise_and_progress_are_not(seed):
    noise = np.random.default_rng(seed).normal(0, 0.05, 200)
    assert not fed(0.5 + noise) and not fed(np.linspace(0.3, 0.8, 200) + noise)
    dip = np.where((np.arange(200) >= 100) & (np.arange(200) < 115), 0.3, 0.6)
    assert not fed(dip + noise), "an excursion is no fall"
    ((at, words),) = fed(np.concatenate([np.linspace(0.4, 0.7, 100), np.linspace(0.7, 0.4, 100)]) + noise)
    assert 119 <= at <= 179
    assert words.startswith(
        f"iteration {at}: the training reward has been falling: its median over 20 iterations is 0."
    )
    assert "(guards.falling_window)" in words and "lr" in words


def test_missing_rewards_do_not_count():
    assert not fed([None, float("nan")] * 100) and not fed([1.0] * 20 + [0.0] * 100, window=None)


def warnings(algorithm="grpo", **guards):
    return TrainingWarnings(Guards(**guards), build_algorithm(build_config({"run": {"algorithm": algorithm}})))


@pytest.mark.parametrize(
    "algorithm, advice",
    [("grpo", "lower rl.lr or raise grpo.kl_coef"), ("r0", "lower rl.lr or raise rl.anchor or r0.distribution_weight")],
)
def test_the_advice_is_the_algorithms(algorithm, advice):
    seen = warnings(algorithm, falling_window=5)
    rewards = [1.0] * 5 + [0.0] * 10
    (message,) = [words for i, r in enumerate(rewards) for words in seen.see(i, {"reward/mean": r}, 4, fresh=True)]
    assert advice in message
    guard = OverOptimisation(build_config({"run": {"algorithm": algorithm}}))
    guard.see(Evaluated(0, 0.5, 0.6, 0.01))
    assert guard.see(Evaluated(10, 0.6, 0.5, 0.01)).endswith(advice)


def test_the_config_says_what_ends_the_run():
    off = {"ratio/first_max/0": 0.5}
    assert len(list(warnings().see(3, off, 4, fresh=True))) == 1
    assert not list(warnings().see(3, off, 4, fresh=False))
    assert not list(warnings("r0").see(3, off, 4, fresh=True))
    with pytest.raises(AlgorithmStopped, match=r"disagree .*\(guards.on_mismatch = stop\)"):
        list(warnings(on_mismatch="stop").see(3, off, 4, fresh=True))
    with pytest.raises(AlgorithmStopped, match=r"not one of 4 groups .*\(guards.on_flat = stop\)"):
        list(warnings(on_flat="stop", flat_iterations=1).see(3, FLAT, 4, fresh=True))
