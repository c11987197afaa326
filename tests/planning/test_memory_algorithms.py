"""The learner's memory with R0, DIDR and other algorithms, against torch's profiler and DeepSpeed's own state."""

from __future__ import annotations

import pytest
import torch

from fixtures.clip_models import save_transformers
from fixtures.memory import profiled_peak
from fixtures.memory_learner import LORA, learner_config, real_peaks
from rlproxi.config.loading import build_config
from rlproxi.config.sections import Reward
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import empty_form, trainable
from rlproxi.planning.memory import estimate
from rlproxi.planning.memory_parts import count, empty_vae, with_engines
from rlproxi.planning.memory_scorers import empty_gradients, empty_scorer, networks, scorer_bytes
from rlproxi.planning.memory_steps import forward_peak, one_loss, training_peak
from rlproxi.planning.memory_trace import no_memory, traced, without_data
from rlproxi.rewards import facts, names
from rlproxi.rewards.gradients import RewardGradients

TWO_LOOKS = {"damped": False, "reward_steps": 2, "particles": 2}


@pytest.mark.parametrize(
    "algorithm, settings",
    [
        ("r0", {"distribution_weight": 0.5}),
        ("r0", {"checkpoint_steps": False}),
        ("didr", TWO_LOOKS),
        ("grpo", {"last_step_weight": 1.0, "trained_steps": 2}),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("r0", {}),
                ("r0", {"plus": True, "guidance_weight": 0.5}),
                ("didr", {}),
                ("didr", {"reward": "terminal", "divergence": "score"}),
            )
        ),
    ],
)
def test_peak_of_an_algorithms_updates_is_what_the_profiler_sees(algorithm, settings, tmp_path):
    config = learner_config(tmp_path, algorithm, **settings)
    parts, measured = estimate(config).roles[0].parts, real_peaks(config)
    assert parts["activations"] == pytest.approx(max(measured.values()), rel=0.05)


def test_peak_of_adapters_through_an_autoencoder_is_what_the_profiler_sees(tmp_path):
    config = learner_config(
        tmp_path, "r0", "sd15", {"precision": "bfloat16", "lora": LORA}, size=4, plus=True, guidance_weight=0.5
    )
    parts, measured = estimate(config).roles[0].parts, real_peaks(config)
    assert parts["activations"] == pytest.approx(measured["policy"], rel=0.03)
    assert parts["autoencoder"] == 4 * count(empty_vae(ModelFolder.at(tmp_path / "sd15")).parameters())
    assert "reference copy" not in parts  # it is the network with its adapters off


def activations(*args, **settings) -> int:
    return estimate(learner_config(*args, **settings)).roles[0].parts["activations"]


def test_r0_step_by_step_needs_one_steps_memory_and_r0_at_once_all_of_them(tmp_path):
    by_step = [activations(tmp_path, "r0", steps=n) for n in (2, 5)]
    whole = [activations(tmp_path, "r0", steps=n, checkpoint_steps=False) for n in (1, 2, 3)]
    assert by_step[1] - by_step[0] == 3 * 2 * 4 * 16 * 3 * 32 * 32  # of each step an input and its gradient
    assert whole[2] - whole[1] == pytest.approx(whole[1] - whole[0], rel=0.02)
    assert whole[2] > 1.5 * by_step[1]
    assert by_step[1] == pytest.approx(real_peaks(learner_config(tmp_path, "r0", steps=5))["policy"], rel=0.05)


def test_didr_holds_two_learners_and_a_reference(tmp_path):
    config = learner_config(tmp_path, "didr", anchor=0.1, ema=0.9)
    found = estimate(config)
    parts, size = found.roles[0].parts, 4 * found.trained
    assert parts["network"] == parts["fake network"] == parts["reference copy"]
    assert parts["Adam moments"] == 2 * 2 * size and parts["anchor"] == 2 * size and parts["EMA"] == size
    assert parts["gradients"] == size  # the fake's are gone when the policy's come
    classifier = empty_scorer(config.rewards.train[0], config, "cpu").model
    assert parts["reward attributes"] == 4 * count(classifier.parameters())
    none = estimate(learner_config(tmp_path, "didr", reward="none")).roles[0].parts
    assert "reward attributes" not in none and none["activations"] < parts["activations"]


@pytest.mark.parametrize("stage, anchor, units", [(0, 0.0, 8), (1, 0.0, 10), (2, 0.0, 11), (0, 0.1, 10), (1, 0.1, 12)])
def test_state_of_two_engines_as_deepspeed_was_measured(stage, anchor, units):
    """In units of one network's bytes, one rank, without the bucket: docs/memory.md."""
    config = build_config({"learner": {"zero_stage": stage}})
    parts = with_engines(
        {"network": 4000, "fake network": 4000},
        config,
        {"policy": 1000, "fake": 1000},
        {"policy": 0, "fake": 0},
        anchor,
    )
    assert sum(parts.values()) == units * 4000


@pytest.mark.parametrize("name", [name for name in names() if facts(name).parameter_count({})])
def test_scorers_without_data_have_the_published_parameters(name):
    reward = Reward(name=name, params={"precision": "float32"})
    scorer = empty_scorer(reward, build_config({}), "cpu")
    assert 4 * sum(count(part.parameters()) for part in networks(scorer).values()) == scorer_bytes(reward)


def test_gradient_of_a_clip_is_what_the_profiler_sees(tmp_path):
    folder = str(save_transformers(tmp_path / "clip"))
    config = build_config(
        {
            "rewards": {
                "train": [
                    {"name": "pickscore", "params": {"clip": folder, "tokenizer": folder, "precision": "float32"}}
                ]
            }
        }
    )
    real = RewardGradients.build(config.rewards.train, None, True, "cpu")
    x, prompts = torch.rand(32, 3, 96, 96), ["a cat"] * 32
    real(x, prompts)
    measured = profiled_peak(lambda: real(x, prompts))
    empty, unknown = empty_gradients(config, None, True, "cpu")
    with no_memory(), traced("cpu") as live:
        empty(torch.zeros(32, 3, 96, 96), prompts)
    assert unknown == [] and live.peak == pytest.approx(measured, rel=0.03)
    config.rewards.train[0].params["clip"] = "owner/name"
    assert empty_gradients(config, None, True, "cpu")[1] == ["pickscore"]


def test_an_algorithm_of_ones_own_is_estimated_as_a_forward_and_backward(tmp_path, monkeypatch):
    (tmp_path / "ours_to_plan.py").write_text(
        "from rlproxi.algorithms.base import Algorithm\n"
        "class Ours(Algorithm):\n    needs_rollouts = False\n    def updates(self, batch):\n        yield from ()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {"data": {"size": 32}, "model": {"channels": [32, 64], "precision": "float32"}, "run": {"stages": ["rl"]}}
    values["run"]["algorithm"] = "ours_to_plan:Ours"
    config = build_config(values)
    found = estimate(config)
    network = without_data(empty_form(config, "rl"))
    with no_memory():
        one = training_peak(one_loss(config, network), trainable(network).values(), torch.float32, "cpu")
        sampling = forward_peak(config, network.requires_grad_(False), 16, torch.float32, "cpu")
    assert found.roles[0].parts["activations"] == one > 1.5 * sampling
    assert found.notes == ["what ours_to_plan:Ours does beyond one forward and backward of each of its networks"]
