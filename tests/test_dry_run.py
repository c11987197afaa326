"""The plan's page, for networks of pixels, of latents and of published checkpoints."""

from __future__ import annotations

import pytest

from memory_fixtures import small_folder
from rlproxi.config import build_config, config_folder, load_config
from rlproxi.dry_run import describe
from rlproxi.schema import ConfigError


def lines(config) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in describe(config).splitlines():
        found.setdefault(line[:10].strip(), []).append(line[11:])
    return found


def test_plan_of_the_quickstart():
    page = lines(load_config(config_folder() / "quickstart.yaml"))
    assert page["model"] == ["3.88 M parameters, all trained, 32x32, precision auto"]
    assert page["in flight"][0].endswith("weights 14.8 MB a version")  # 3,879,728 x 4 bytes
    assert [line.split(":")[0] for line in page["memory"]] == ["pretrainer rank", "learner rank", "rollout actor"]
    assert all("GiB of host memory" in line for line in page["memory"])


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_plan_of_a_new_network_in_a_checkpoints_latents(kind, tmp_path):
    folder = small_folder("sd15", tmp_path / "encoders")
    page = lines(build_config({
        "run": {"stages": ["rl"]}, "data": {"size": 64}, "resources": {"learner_gpus": 1, "rollout_gpus": 0.5},
        "model": {"encoders": str(folder), "kind": kind, "patch": 2, "channels": [32, 64], "layers": 2, "heads": 1}}))
    rollout = next(line for line in page["memory"] if line.startswith("rollout"))
    assert "GiB of its GPU" in rollout and "autoencoder" in rollout and "text encoders" in rollout


def test_plan_of_adapters_on_a_checkpoint_counts_the_trained_ones(tmp_path):
    folder = small_folder("sd15", tmp_path / "sd15")
    values = {"run": {"stages": ["rl"]}, "data": {"size": 64},
              "model": {"init": str(folder), "lora": {"rank": 2, "alpha": 2}},
              "rewards": {"train": [{"name": "hpsv2.1"}]}}
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
        describe(build_config({"data": {"size": 100}, "model": {"init": str(folder)}}))
