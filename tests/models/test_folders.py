import builtins
import collections
import io
import json
from pathlib import Path

import pytest

from fixtures.memory import small_folder
from rlproxi.config.loading import build_config
from rlproxi.models.folders import ModelFolder, latent_space
from rlproxi.planning.memory import estimate
from rlproxi.planning.preflight import problems


@pytest.fixture
def reads(monkeypatch):
    """How often each JSON file was opened."""
    opened = collections.Counter()
    real = io.open

    def counted(file, *args, **kwargs):
        if str(file).endswith(".json"):
            opened[str(file)] += 1
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    return opened


@pytest.mark.parametrize("key", ["init", "encoders"])
def test_preflight_and_estimate_read_each_file_of_a_folder_once(key, tmp_path, reads):
    folder = small_folder("sd15", tmp_path / "sd15")
    reads.clear()
    stages = ["rl"] if key == "init" else ["pretrain", "rl"]
    config = build_config(
        {"run": {"stages": stages}, "data": {"size": 64}, "model": {"patch": 1, key: str(folder)}, "rl": {"steps": 1}}
    )
    assert problems(config) == []
    estimate(config)
    found = {str(Path(name).relative_to(folder)): count for name, count in reads.items() if str(folder) in name}
    wanted = {"model_index.json", "text_encoder/config.json", "vae/config.json"}
    if key == "init":
        wanted |= {"unet/config.json", "scheduler/scheduler_config.json"}
    assert found == dict.fromkeys(wanted, 1)


def test_a_folder_that_changes_is_read_again(tmp_path):
    folder = small_folder("sd15", tmp_path / "sd15")
    found = ModelFolder.find(folder)
    assert found is ModelFolder.at(folder) and found.latents == (4, 8) and not found.is_ours
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_channels": 16}))
    assert ModelFolder.at(folder).latents == (16, 8) and found.latents == (4, 8)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="vae/config.json is missing"):
        _ = ModelFolder.at(folder).latents


def test_what_callers_do_to_its_values_changes_nothing(tmp_path):
    found = ModelFolder.find(small_folder("sd15", tmp_path / "sd15"))
    found.json("vae/config.json")["block_out_channels"].clear()
    assert found.latents == (4, 8)


def test_a_config_without_a_folder_works_on_pixels(tmp_path):
    config = build_config({"data": {"size": 32}})
    assert ModelFolder.of(config) is None and latent_space(config) == (3, 32)
    for damage, words in (({"hidden_size": None}, "lacks"), ({"d_model": None}, "names no class")):
        folder = small_folder("sd15", tmp_path / words.replace(" ", "-"))
        (folder / "model_index.json").unlink()
        file = folder / "text_encoder" / "config.json"
        values = {key: x for key, x in json.loads(file.read_text()).items() if key not in damage}
        if words == "names no class":
            values.pop("architectures", None)
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=words):
            _ = ModelFolder.at(folder).text_shape, ModelFolder.at(folder).text_classes
