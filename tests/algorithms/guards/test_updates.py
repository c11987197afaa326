"""Which updates are refused, and what follows from how many in a row."""

import math

import pytest

from rlproxi.algorithms.base import AlgorithmStopped
from rlproxi.algorithms.guards.updates import GoBack, UpdateGuard, not_finite
from rlproxi.config.guards import Guards

WHY = not_finite(math.nan, 0)


def guard(rollbacks: int = 0, **settings) -> UpdateGuard:
    made = UpdateGuard(Guards(**settings), "rl.lr", rollbacks)
    made.begun(at_start=False)
    return made


def test_what_is_not_finite_is_said():
    assert not_finite(1.0, 0) is None and not_finite(None, 0) is None
    assert WHY == "its gradient is NaN or Inf (grad_norm nan)" and "grad_norm inf" in not_finite(math.inf, 0)
    assert not_finite(1.0, 2) == "2 of its losses are NaN or Inf"


def test_the_third_in_a_row_goes_back_and_says_why():
    seen = guard()
    seen.made("policy")
    said = [seen.skipped(step, "policy", WHY) for step in (11, 12)]
    assert said[0] == (
        "step 11: an update of 'policy' is skipped, 1 in a row (guards.skips_in_a_row = 3): its gradient is NaN or "
        "Inf (grad_norm nan)"
    )
    assert not seen.steady
    with pytest.raises(GoBack, match="step 13: .* 3 in a row") as error:
        seen.skipped(13, "policy", WHY)
    assert not error.value.spoilt
    seen.went_back()
    seen.begun(at_start=False)
    assert seen.lr_scale == 0.5 and seen.steady and guard(rollbacks=2, lr_factor=0.1).lr_scale == pytest.approx(0.01)


def test_an_update_that_is_made_begins_the_row_anew_and_networks_have_rows_of_their_own():
    seen = guard()
    for step in range(20):  # a fake score twice a step, never three in a row without the other's good one between
        seen.skipped(step, "fake", WHY)
        seen.skipped(step, "fake", WHY)
        seen.made("fake")
    seen.skipped(1, "fake", WHY)
    seen.made("policy")
    seen.skipped(2, "fake", WHY)
    with pytest.raises(GoBack):
        seen.made("policy")
        seen.skipped(3, "fake", WHY)


def test_a_checkpoint_from_which_nothing_was_learnt_is_spoilt_whatever_the_learning_rate():
    seen = guard(skips_in_a_row=1)
    with pytest.raises(GoBack) as error:
        seen.made("fake")  # another network's update is none of its own
        seen.skipped(1, "policy", WHY)
    assert error.value.spoilt


def test_the_very_first_updates_are_no_matter_of_the_learning_rate():
    seen = guard(skips_in_a_row=1)
    seen.begun(at_start=True)
    with pytest.raises(
        AlgorithmStopped,
        match="No update of it was made, so rl.lr is not the cause: set model.precision=float32",
    ):
        seen.skipped(1, "policy", WHY)


def test_stopping_is_the_configs_choice_and_names_the_keys():
    with pytest.raises(
        AlgorithmStopped,
        match=r"step 4: .*grad_norm nan.*\(guards.on_nonfinite = stop\): lower rl.lr, or set "
        "model.precision=float32",
    ):
        guard(skips_in_a_row=1, on_nonfinite="stop").skipped(4, "policy", WHY)


def test_going_back_has_an_end():
    with pytest.raises(
        AlgorithmStopped, match=r"Training went back 2 times \(guards.max_rollbacks\), with rl.lr down to 0.25 of"
    ):
        guard(rollbacks=2, max_rollbacks=2, skips_in_a_row=1).skipped(4, "policy", WHY)


@pytest.mark.parametrize(
    "metrics, words",
    [
        ({"ratio/max_log": 11.0}, r"the largest \|log-ratio\| is 11 \(guards.max_log_ratio = 10\).*lower rl.lr"),
        ({"ratio/max_log": math.inf}, r"is inf \(guards.max_log_ratio = 10\)"),
        (
            {"ratio/max_log": 0.1, "clip_fraction": 0.7},
            r"the share of clipped ratios is 0.7 \(guards.max_clip_fraction = 0.5\)",
        ),
    ],
)
def test_a_ratio_out_of_bounds_is_refused_or_ends_the_run(metrics, words):
    import re

    refused = guard(max_clip_fraction=0.5).refuse(metrics)
    assert re.search(words, refused)
    with pytest.raises(AlgorithmStopped, match=words):
        guard(max_clip_fraction=0.5, on_ratio="stop").refuse(metrics)


def test_within_bounds_without_ratios_and_without_bounds_nothing_is_refused():
    assert guard().refuse({"ratio/max_log": 10.0, "clip_fraction": 1.0, "loss": 1e9}) is None
    assert guard().refuse({"loss": 0.0}) is None
    assert guard(max_log_ratio=None).refuse({"ratio/max_log": math.inf}) is None
