from rlproxi.algorithms.guards.over_optimisation import Evaluated, OverOptimisation
from rlproxi.config.loading import build_config


def made(**settings) -> OverOptimisation:
    return OverOptimisation(build_config({"evaluate": {"alarm_drift": None, "alarm_sameness": None, **settings}}))


def feed(guard: OverOptimisation, *rows: tuple[float, float]):
    """Evaluations every 10 iterations, (train, held-out), standard error 0.01; returns what was said of each."""
    return [guard.see(Evaluated(10 * i, train, heldout, 0.01)) for i, (train, heldout) in enumerate(rows)]


def test_progress_is_silent_and_the_last_is_the_best():
    guard = made()
    assert feed(guard, (0.5, 0.5), (0.6, 0.55), (0.7, 0.6)) == [None] * 3
    assert guard.best.iteration == 20 and not guard.should_stop


def test_reward_up_and_judge_down_is_the_alarm():
    guard = made()
    said = feed(guard, (0.5, 0.5), (0.6, 0.6), (0.7, 0.5))
    assert said[:2] == [None, None]
    assert said[2].startswith("over-optimisation: the held-out reward fell from 0.600 at iteration 10 to 0.500 at 20")
    assert "from 0.600 to 0.700" in said[2] and guard.best.iteration == 10


def test_a_fall_within_the_noise_is_no_alarm():
    # 2 standard errors of a difference of two means with 0.01 each: 0.0283.
    assert feed(made(), (0.5, 0.6), (0.6, 0.573))[1] is None
    assert feed(made(), (0.5, 0.6), (0.6, 0.570))[1] is not None
    assert feed(made(alarm_sigmas=3), (0.5, 0.6), (0.6, 0.570))[1] is None


def test_both_down_is_a_collapse():
    assert feed(made(), (0.6, 0.6), (0.4, 0.4))[1].startswith("collapse: ")


def test_patience_counts_evaluations_in_a_row():
    guard = made(patience=2)
    feed(guard, (0.5, 0.6), (0.6, 0.5))
    assert not guard.should_stop
    guard.see(Evaluated(20, 0.6, 0.595, 0.01))  # within the noise again: the count begins anew
    guard.see(Evaluated(30, 0.7, 0.5, 0.01))
    assert not guard.should_stop
    guard.see(Evaluated(40, 0.7, 0.5, 0.01))
    assert guard.should_stop and guard.best.iteration == 0
    assert not made(patience=None).should_stop


def test_seeing_the_same_evaluation_again_changes_nothing():
    guard = made(patience=1)
    feed(guard, (0.5, 0.6))
    assert guard.see(Evaluated(0, 0.5, 0.6, 0.01)) is None and not guard.should_stop


def test_leaving_the_data_is_told_though_the_judge_is_pleased():
    guard = made(alarm_drift=1.5)
    said = [
        guard.see(Evaluated(10 * i, reward, reward, 0.01, distance))
        for i, (reward, distance) in enumerate([(0.5, 0.9), (0.6, 0.2), (0.7, 0.29), (0.9, 0.31), (0.95, None)])
    ]
    assert said[:3] == [None, None, None] and said[4] is None
    assert said[3].startswith(
        "drift: the distance to the data went from 0.200 at iteration 10 to 0.310 at 30, while the held-out "
        "reward is 0.900"
    )
    assert guard.best.iteration == 40 and guard.below == 0
    assert made().see(Evaluated(0, 1, 1, 0.1, 5.0)) is None


def test_a_fallen_judge_is_told_before_the_distance():
    guard = made(alarm_drift=1.5)
    guard.see(Evaluated(0, 0.5, 0.6, 0.01, 0.1))
    assert guard.see(Evaluated(10, 0.6, 0.4, 0.01, 0.9)).startswith("over-optimisation: ")


def test_samples_that_become_alike_are_told_though_the_judge_is_pleased():
    guard = made(alarm_drift=1.5, alarm_sameness=0.65)
    said = [
        guard.see(Evaluated(10 * i, reward, reward, 0.01, distance, diversity))
        for i, (reward, distance, diversity) in enumerate(
            [
                (0.5, 0.2, 0.12),
                (0.6, 0.2, 0.14),
                (0.7, 0.2, 0.10),
                (0.8, 0.2, 0.09),
                (0.9, None, None),
                (0.95, 0.4, 0.08),
            ]
        )
    ]
    assert said[:3] == [None, None, None] and said[4] is None
    assert said[3].startswith(
        "sameness: the diversity of a prompt's samples went from 0.140 at iteration 10 to 0.090 at 30, while "
        "the held-out reward is 0.800"
    )
    assert said[5].startswith("drift: ")  # one of them is told
    assert made().see(Evaluated(0, 1, 1, 0.1, 5.0, 0.0)) is None


def test_diversity_is_too_low_only_below_that_of_real_images():
    """A start that also draws poor pictures is more diverse than the data: losing that is no sameness."""
    guard = made(alarm_sameness=0.65)
    assert guard.see(Evaluated(0, 0.5, 0.2, 0.01, 0.43, 0.165, 0.108)) is None
    assert guard.see(Evaluated(60, 0.9, 0.7, 0.01, 0.10, 0.101, 0.108)) is None
    message = guard.see(Evaluated(90, 0.9, 0.7, 0.01, 0.10, 0.069, 0.108))
    assert message and message.startswith(
        "sameness: the diversity of a prompt's samples went from 0.165 at iteration 0"
    )


def recorded(iteration: int, heldout: float, distance: float, diversity: float, rows: str, columns: str) -> Evaluated:
    """An evaluation of 256 images of a run that was made; ``rows`` and ``columns``: power at periods 2 to 8."""
    power = {
        name: {str(period): float(value) for period, value in zip(range(2, 9), values.split(), strict=True)}
        for name, values in (("rows", rows), ("columns", columns))
    }
    common = {name: dict.fromkeys(values, 0.02) for name, values in power.items()}
    spectrum = {**power, "common": common, "images": 256}
    return Evaluated(iteration, heldout, heldout, 0.012, distance, diversity, 0.108, spectrum)


def test_the_quickstart_of_today_raises_no_alarm():
    """Its evaluations with run.seed=0, as they were measured."""
    watch = OverOptimisation(build_config({}))
    for seen in (
        recorded(0, 0.250, 0.430, 0.165, "0.23 0.24 0.26 0.30 0.27 0.31 0.38", "0.13 0.36 0.14 0.37 0.39 0.45 0.38"),
        recorded(15, 0.370, 0.294, 0.135, "0.32 0.36 0.35 0.42 0.42 0.46 0.51", "0.15 0.49 0.19 0.52 0.53 0.64 0.52"),
        recorded(30, 0.531, 0.143, 0.119, "0.50 0.54 0.55 0.60 0.66 0.67 0.78", "0.20 0.68 0.28 0.74 0.72 0.87 0.77"),
        recorded(45, 0.656, 0.092, 0.107, "0.68 0.71 0.75 0.76 0.83 0.80 1.04", "0.23 0.83 0.37 0.92 0.92 1.04 0.97"),
        recorded(60, 0.691, 0.095, 0.101, "0.72 0.76 0.79 0.79 0.88 0.83 1.08", "0.24 0.85 0.39 0.93 0.96 1.06 1.02"),
    ):
        assert watch.see(seen) is None


def test_the_quickstart_of_november_raises_the_alarm_of_a_grid():
    """A plaid lay over hair and faces, the held-out judge rose, and the distance stayed just under its own alarm."""
    watch = OverOptimisation(build_config({}))
    others = "0.8 0.8 0.8 0.8"
    assert watch.see(recorded(0, 0.843, 0.158, 0.104, f"0.6 0.9 0.7 {others}", f"0.37 0.9 0.74 {others}")) is None
    message = watch.see(recorded(175, 0.882, 0.215, 0.082, f"6.9 1.0 1.2 {others}", f"7.8 1.0 3.9 {others}"))
    assert message and message.startswith("grid: a grid of period 2 pixels lies over the columns of the images at")
