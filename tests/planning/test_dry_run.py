"""The plan's page, for networks of pixels, of latents and of published checkpoints."""

from __future__ import annotations

import pytest

from fixtures.memory import small_folder
from fixtures.sections import sections
from rlproxi.config.loading import build_config, config_folder, load_config
from rlproxi.errors import ConfigError
from rlproxi.planning.dry_run import describe, plan
from rlproxi.planning.memory import Estimate


def lines(config) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in describe(config):
        found.setdefault(line[:10].strip(), []).append(line[11:])
    return found


def test_plan_of_the_quickstart():
    page = lines(load_config(config_folder() / "quickstart.yaml"))
    assert page["run"] == ["quickstart, seed 0; stages: encode, prepare, pretrain, before, rl, after, report"]
    assert page["model"] == ["3.51 M parameters, all trained, 32x32, precision auto"]
    assert page["in flight"][0].endswith("weights 13.4 MB a version")  # 3,509,779 x 4 bytes
    assert [line.split(":")[0] for line in page["memory"]] == ["pretrainer rank", "learner rank", "rollout actor"]
    assert all("GiB of host memory" in line for line in page["memory"])


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_plan_of_a_new_network_in_a_checkpoints_latents(kind, tmp_path):
    folder = small_folder("sd15", tmp_path / "encoders")
    page = lines(
        build_config(
            {
                "run": {"stages": ["rl"]},
                "data": {"size": 64},
                "resources": {"learner_gpus": 1, "rollout_gpus": 0.5},
                "model": {
                    "encoders": str(folder),
                    "kind": kind,
                    "patch": 2,
                    "channels": [32, 64],
                    "layers": 2,
                    "heads": 1,
                },
            }
        )
    )
    rollout = next(line for line in page["memory"] if line.startswith("rollout"))
    assert "GiB of its GPU" in rollout and "autoencoder" in rollout and "text encoders" in rollout


def test_plan_of_adapters_on_a_checkpoint_counts_the_trained_ones(tmp_path):
    folder = small_folder("sd15", tmp_path / "sd15")
    values = {
        "run": {"stages": ["rl"]},
        "data": {"size": 64},
        "model": {"init": str(folder), "lora": {"rank": 2, "alpha": 2}},
        "rewards": {"train": [{"name": "hpsv2.1"}]},
    }
    page = lines(build_config(values))
    assert "M trained" in page["model"][0]
    assert any(line.startswith("reward hpsv2.1: 3.67 GiB") for line in page["memory"])
    whole = lines(build_config({**values, "model": {"init": str(folder)}}))
    assert "all trained" in whole["model"][0]
    assert any("reference copy" in line for line in whole["memory"])
    assert not any("reference copy" in line for line in page["memory"])


def test_plan_of_a_folder_of_ours(tmp_path):
    """A saved model's config.json files are enough: its weights are taken away."""
    from rlproxi.models.loading import build_denoiser
    from rlproxi.models.pipeline import TextToImage
    from rlproxi.models.text import build_text_encoder

    config = build_config({"data": {"size": 16}, "model": {"channels": [32, 32]}})
    text = build_text_encoder(["a face"], config.model.text_dim)
    TextToImage(build_denoiser(config), text, config.schedule, config.sampler).save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    page = lines(build_config({"data": {"size": 16}, "model": {"init": str(tmp_path / "model")}}))
    assert page["model"][0].split(" M")[0] == lines(config)["model"][0].split(" M")[0]


def test_a_size_that_does_not_fit_is_a_config_error(tmp_path):
    folder = small_folder("sd15", tmp_path / "sd15")
    with pytest.raises(ConfigError, match="data.size 100 is not a multiple of 8"):
        list(describe(build_config({"data": {"size": 100}, "model": {"init": str(folder)}})))


SMALL = {
    "data": {"size": 16},
    "model": {"channels": [32, 32], "precision": "float32"},
    "run": {"stages": ["prepare", "before", "rl", "after"]},
}


def page_of(algorithm: str, overrides: list[str] = (), traced: bool = False, **settings) -> dict[str, list[str]]:
    """The page's lines by their first word; without ``traced`` the memory is not looked at."""
    values = {
        **SMALL,
        "run": {**SMALL["run"], "algorithm": algorithm},
        **sections(algorithm, **settings),
    }
    config = build_config(values, list(overrides))
    if traced:
        return lines(config)
    return {line[:10].strip(): [line[11:]] for line in plan(config, Estimate(10**6, 10**6, [], []))}


def test_plan_of_r0():
    page = page_of("r0", ["sampler.num_inference_steps=4"], ema=0.9)
    assert page["algorithm"] == [
        "r0: 4 steps, gradient step by step, anchor 0.001, evaluated and saved as an average of "
        "decay 0.9, rewards with gradients on the learner"
    ]
    assert page["rollout"][0].endswith("CPU each; evaluations only")
    assert page["in flight"] == ["nothing but evaluations; weights 3.8 MB a version"]
    assert "staleness" not in page and "pretrain" not in page
    assert page["iteration"][0].startswith("32 prompts x 1 sample = 32 images")
    at_once = page_of(
        "r0",
        ["sampler.num_inference_steps=4"],
        checkpoint_steps=False,
        guidance_weight=0.5,
        anchor=0.0,
        normalize_gradients=False,
    )
    assert at_once["algorithm"] == [
        "r0: 4 steps, gradient through all of them at once, gradients as large as they are, "
        "guidance as a reward x 0.5, rewards with gradients on the learner"
    ]
    assert page_of("r0", plus=True)["algorithm"][0].startswith("r0: one random step of 6 (R0+), anchor 0.001")


def test_plan_of_didr_and_its_baselines():
    one = ["sampler.num_inference_steps=1", "pretrain.candidates=[2,4]"]
    page = page_of("didr", one, traced=True)
    assert page["algorithm"] == [
        "didr: kl divergence, diffused reward, beta 0.05, m=1, damped, 2 fake update(s) of rate "
        "0.0001, levels of candidates [2, 4], rewards with gradients on the learner"
    ]
    assert page["sampler"][0].startswith("hybrid, 1 step from") and page["rollout"][0].endswith("evaluations only")
    learner = next(line for line in page["memory"] if line.startswith("learner"))
    assert "fake network" in learner and "reference copy" in learner and "reward attributes" in learner
    assert "m=2, 3 particles" in page_of("didr", one, reward_steps=2, particles=3, damped=False)["algorithm"][0]
    star = page_of("didr", one, divergence="score", reward="terminal", reward_weight=2.0, guidance_scale=3.0)
    assert star["algorithm"][0].startswith("didr: score divergence, terminal reward x 2, 2 fake")
    assert "reference's guidance 3" in star["algorithm"][0]
    none = page_of("didr", one, reward="none", candidates=[8])
    assert "no reward, 2 fake update(s) of rate 0.0001, levels of candidates [8]" in none["algorithm"][0]
    assert "on the learner" not in none["algorithm"][0]


def test_plan_of_grpo_and_of_a_run_without_rl():
    page = page_of("grpo", last_step_weight=0.5)
    assert page["algorithm"] == [
        "grpo: 3 of 5 actions trained, clip 0.001, KL 0.03, the reward's gradient through the last "
        "step x 0.5, rewards with gradients on the learner"
    ]
    assert page["rollout"] == ["1 actor(s), CPU each"] and "bound 2048 MB" in page["in flight"][0]
    assert page["staleness"] == ["at most 0 version(s) (synchronous)"]
    before = page_of("r0", ["run.stages=[pretrain,before]"])
    assert before["pretrain"] and not {"algorithm", "iteration", "in flight", "staleness"} & set(before)


def test_plan_of_an_algorithm_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "ours_to_print.py").write_text(
        "from rlproxi.algorithms.base import Algorithm\n"
        "class Ours(Algorithm):\n    def updates(self, batch):\n        yield from ()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    page = page_of("ours_to_print:Ours", traced=True, params={"tau": 3})
    assert page["algorithm"] == ["ours_to_print:Ours: tau 3"]
    assert "an iteration; bound 2048 MB; weights" in page["in flight"][0] and page["staleness"]
    assert page["memory"][-1] == (
        "not counted: what ours_to_print:Ours does beyond one forward and backward of each of its networks"
    )


def test_rewards_are_told_with_what_they_have_of_their_own():
    jpeg = "{name: jpeg, replicas: 2, num_gpus: 0.5, max_replicas: 4}"
    page = page_of(
        "grpo",
        [
            f"rewards.train=[{{name: attributes}}, {jpeg}]",
            "rewards.heldout=[{name: judge, num_gpus: 0.0}]",
            "rewards.num_gpus=1.0",
        ],
    )
    assert page["rewards"] == [
        "attributes, jpeg (2 to 4 replicas, 0.5 GPU each); held out: judge (CPU each); 1 replica(s), 1 GPU each"
    ]
