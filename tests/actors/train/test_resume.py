"""What is said of a resume: exact, or why not."""

import json

import pytest

from actors.train.resume import circumstances, reasons, sentence
from rlproxi.config.loading import build_config

VERSIONS = {"torch": "2.13", "deepspeed": "0.19"}


def of(stage="rl", device="cpu", **changes):
    values = {}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    # As it comes back from a checkpoint's mark.
    return json.loads(json.dumps(circumstances(build_config(values), stage, device, VERSIONS)))


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("rl", {"pretrain__steps": 7, "telemetry__timeline": False, "evaluate__every": 3, "run__name": "other"}),
        ("rl", {"rl__checkpoint_every": 7, "learner__keep_checkpoints": 5, "learner__max_failures": 0}),
        ("rl", {"resources__rollout_actors": 2, "rewards__replicas": 2}),
        ("pretrain", {"rl__lr": 1.0e-4, "pretrain__log_every": 1}),
    ],
)
def test_what_does_not_reach_the_numbers_leaves_it_exact(stage, changes):
    assert reasons(of(stage), of(stage, **changes)) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"resources__learner_workers": 2},
            ["resources.learner_workers was 1, is 2", "sums are rounded in another order"],
        ),
        ({"learner__zero_stage": 3}, ["learner.zero_stage was 0, is 3", "sums are rounded in another order"]),
        ({"rl__lr": 1.0e-4}, ["rl.lr was 2e-05, is 0.0001"]),
        ({"run__seed": 5}, ["run.seed was 0, is 5"]),
    ],
)
def test_what_does_is_named_with_both_values(changes, words):
    assert reasons(of(), of(**changes)) == words


def test_devices_versions_and_overlap_count_too():
    assert reasons(of(), {**of(), "torch": "2.14"}) == ["torch was 2.13, is 2.14"]
    assert reasons(of(device="H100"), of(device="H100")) == ["a GPU's kernels do not add in one order"]
    assert "sampled again, by newer weights" in reasons(of(), of(), asynchronous=True)[0]
    assert len(reasons({}, of())) == 6 and reasons({}, of())[4].endswith("other settings have changed")


def test_the_sentence():
    assert sentence("rl", 40, 100, []) == "rl: goes on from step 40 of 100, bit for bit the unbroken run"
    assert (
        sentence("rl", 40, 100, ["a", "b"]) == "rl: goes on from step 40 of 100, not bit for bit the unbroken run: a; b"
    )
