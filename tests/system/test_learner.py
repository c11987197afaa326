"""DeepSpeed at every ZeRO stage, on one rank and on two: the same first step."""

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]


# Every stage on one rank, in one process, against torch's own AdamW: tests/algorithms/test_anchor.py.
@pytest.mark.parametrize(
    "stage,ranks",
    [*(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((1, 1), (2, 1), (3, 1), (0, 2))), (3, 2)],
)
def test_same_first_step(stage, ranks, start, rl_alone, smoke):
    run = start("rl.steps=1", f"learner.zero_stage={stage}", f"resources.learner_workers={ranks}", *rl_alone)
    first = lambda done: [done.series("rl", key)[1][0] for key in ("loss", "grad_norm", "reward/mean")]  # noqa: E731
    (loss, norm, reward), reference = first(run), first(smoke)
    assert reference[1] > 0
    assert loss == pytest.approx(reference[0], rel=1e-5, abs=1e-5)
    assert norm == pytest.approx(reference[1], rel=1e-5)
    assert reward == reference[2]


@pytest.mark.exhaustive  # in every test run by tests/actors/train/test_two_ranks.py
@pytest.mark.parametrize("stage,ranks", [(3, 2)])
def test_pretraining_takes_the_same_first_steps(stage, ranks, start, smoke):
    settings = [
        "run.stages=[prepare, pretrain]",
        "pretrain.steps=2",
        "pretrain.micro_batch_size=8",
        "pretrain.log_every=1",
        "pretrain.batch_size=16",
    ]
    plain = start(*settings)
    other = start(*settings, f"learner.zero_stage={stage}", f"resources.learner_workers={ranks}")
    for key in ("loss", "grad_norm"):
        assert other.series("pretrain", key)[1] == pytest.approx(plain.series("pretrain", key)[1], rel=1e-5), key
