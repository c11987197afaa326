"""A score that cannot be had masks its group, is counted, and never becomes a number."""

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def rl(start, from_smoke):
    """rl(function, *overrides, code) -> a finished RL stage with a function of tests/fixtures/reward_functions.py."""

    def run(function: str, *overrides: str, code: int = 0):
        reward = f"rewards.train=[{{name: python, params: {{function: 'fixtures.reward_functions:{function}'}}}}]"
        return start(
            "run.stages=[rl]",
            "evaluate.every=0",
            "rl.prompts_per_step=8",
            "rewards.retries=1",
            from_smoke[0],
            reward,
            "rewards.heldout=[]",
            *overrides,
            code=code,
        )

    return run


def test_failed_groups_are_masked_and_counted_and_a_run_without_scores_stops_and_says_why(rl, capsys):
    run = rl("breaks_down", "rewards.max_masked_fraction=0.99", "rl.steps=8", code=1)
    masked = run.series("rl", "groups/masked")[1]
    assert masked and sum(masked) > 0 and max(masked) < 8, "some of the prompts smile or frown"
    assert 8 * len(masked) - sum(masked) == 8, "as many as were scored are trained on"
    assert all(0 < r < 1 for r in run.series("rl", "reward/mean")[1])
    warned = " ".join(r["message"] for r in run.records if r["event"] == "warning")
    assert "no smiling today" in warned and "NaN" in warned and "returned shape (3,) for 4 images" in warned
    told = capsys.readouterr().err
    assert "100% of the groups" in told and "rewards.max_masked_fraction" in told


def test_a_reward_that_cannot_start_says_so_in_its_own_words(start, from_smoke, capsys):
    start(
        "run.stages=[rl]",
        from_smoke[0],
        "rewards.train=[{name: attributes, params: {path: /no/such.file}}]",
        "rewards.heldout=[]",
        code=2,
    )
    told = capsys.readouterr().err
    assert "error: rewards: FileNotFoundError: attribute classifier '/no/such.file' is missing" in told
    assert "Traceback" not in told


@pytest.fixture(scope="module")
def undisturbed(start, from_smoke):
    """Two iterations with a reward of one's own that always answers."""
    run = start(
        "run.stages=[rl]",
        "evaluate.every=0",
        "rl.steps=2",
        from_smoke[0],
        "rewards.heldout=[]",
        "rewards.train=[{name: mine, scorer: python, params: {function: 'fixtures.reward_functions:brightness'}}]",
    )
    rewards = run.series("rl", "reward/mean")[1]
    assert len(rewards) == 2 and all(0 < r < 1 for r in rewards)
    return run


@pytest.mark.exhaustive  # in every test run by test_faults.py: a replica killed
@pytest.mark.parametrize("function, timeout", [("dies_once", 60), ("hangs_once", 3)])
def test_a_replica_that_dies_or_hangs_is_replaced_and_no_group_is_lost(
    start, from_smoke, undisturbed, tmp_path, function, timeout
):
    reward = (
        f"rewards.train=[{{name: mine, scorer: python, params: {{function: 'fixtures.reward_functions:{function}'}}, "
        f"runtime_env: {{env_vars: {{MARKER: '{tmp_path / 'marker'}'}}}}}}]"
    )
    run = start(
        "run.stages=[rl]",
        "evaluate.every=0",
        "rl.steps=2",
        from_smoke[0],
        reward,
        "rewards.heldout=[]",
        f"rewards.timeout_s={timeout}",
        "rewards.retries=6",
    )
    assert (tmp_path / "marker").exists()
    for key in ("reward/mean", "reward/mine", "groups/masked", "samples/masked", "loss", "grad_norm"):
        assert run.series("rl", key) == undisturbed.series("rl", key), key
    assert list(run.series("rl", "groups/masked")[1]) == [0, 0]


@pytest.mark.exhaustive
def test_single_samples_are_masked_by_policy(rl):
    run = rl("one_missing", "rewards.on_failure=mask_sample")
    assert list(run.series("rl", "samples/masked")[1]) == [8] * 4, "one of each of the 8 groups"
    assert list(run.series("rl", "groups/masked")[1]) == [0] * 4
    assert all(g > 0 for g in run.series("rl", "grad_norm")[1])


def test_two_rewards_of_different_scale_and_where_scores_come_from(start, from_smoke, rl_alone):
    path = from_smoke[1].split("path: ")[1].rstrip("}]")
    run = start(
        *rl_alone,
        "rl.steps=2",
        "rewards.normalize=group",
        "model.precision=bfloat16",
        "rewards.train=[{name: loud, scorer: python, params: {function: 'fixtures.reward_functions:loud_brightness'}}, "
        f"{{name: attributes, tune_micro_batch: true, params: {{path: {path}}}}}]",
    )
    loud, attributes = (run.series("rl", f"reward/{name}")[1] for name in ("loud", "attributes"))
    assert min(loud) > 10 and max(attributes) < 1
    # Both are standardised in their groups, so that the mean of their sum is 0. What rises or falls is what was scored.
    sums = [a + b for a, b in zip(loud, attributes, strict=True)]
    assert run.series("rl", "reward/mean")[1] == pytest.approx(sums, rel=1e-5)
    told = {r["name"]: r for r in run.records if r["event"] == "reward"}
    # The newest record of each; a tuned scorer tells again when it has measured.
    assert told["loud"]["scorer"] == "python" and len(told["attributes"][path]) == 64
    assert set(told["attributes"]["images_per_second"]) == {"1", "2", "4"}
    # In bfloat16 too the learner computes what the rollout did.
    assert run.series("rl", "ratio/first_max_deviation")[1] == [0.0]


def test_over_optimisation_raises_the_alarm_keeps_the_best_and_ends_early_asynchronous_as_well(
    start, from_smoke, capsys
):
    function = "{{name: {0}, scorer: python, params: {{function: 'fixtures.reward_functions:{0}'}}}}".format
    run = start(
        "run.stages=[before, rl, after]",
        "evaluate.every=1",
        "rl.steps=12",
        "rl.lr=3.0e-3",
        "rl.max_staleness=1",
        from_smoke[0],
        f"rewards.train=[{function('brightness')}]",
        f"rewards.heldout=[{function('darkness')}]",
        "evaluate.patience=2",
        "evaluate.alarm_sigmas=0.1",
    )
    alarms = [r for r in run.records if r["event"] == "alarm" and not r["message"].startswith("drift")]
    assert alarms and "over-optimisation: the held-out reward fell" in alarms[0]["message"]
    trained = max(run.series("rl", "reward/mean")[0])
    assert trained < 12, "evaluate.patience ends it"
    best = [r["step"] for r in run.records if r["event"] == "best"]
    assert alarms[-1]["best"] == max([0, *best]) < trained
    assert (run.folder / "models" / "best").is_dir() == bool(best)
    assert (run.folder / "models" / "final").is_dir() and run.evaluation("after")["iteration"] == trained
    assert "ALARM" in capsys.readouterr().out
    staleness = run.series("rl", "staleness/mean")[1]
    assert staleness[0] == 0 and 0 < max(staleness) <= 1
    assert run.series("rl", "ratio/first_max_deviation")[1][0] <= 1e-6
