"""The models that come with the package."""

import numpy as np
import pytest

from actors.run.prepare import needs, pretrain_start, rl_start
from rlproxi.config.loading import build_config, config_folder, load_config
from rlproxi.models.folders import BUILTIN_FOLDER, ModelFolder
from rlproxi.models.pipeline import TextToImage

MODELS = sorted(p.name for p in BUILTIN_FOLDER.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small_names_no_machine_and_draws(name):
    folder = ModelFolder.find(f"builtin:{name}")
    files = [p for p in folder.path.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8e6
    assert not any(b'"/' in p.read_bytes() for p in files if p.suffix == ".json"), (
        "a path of the machine it was made on"
    )
    model = TextToImage.from_pretrained(folder)
    images = model(["a smiling person with a red hat", "a frowning person with a blue hat"])
    assert images.shape == (2, model.size, model.size, 3) and images.dtype == np.uint8
    assert images.std(0).mean() > 5 and images.std() > 20


def test_an_unknown_one_is_named_with_those_that_there_are():
    with pytest.raises(FileNotFoundError, match="builtin:nobody is no model of this package, which has builtin:portr"):
        ModelFolder.find("builtin:nobody")


def test_a_run_copies_it_into_its_directory(tmp_path):
    """Other nodes see the run directory, and perhaps another installation."""
    config = build_config({"model": {"init": "builtin:portraits"}})
    start = pretrain_start(config, tmp_path, None)
    assert start == tmp_path / "models" / "start" == rl_start(config, tmp_path)
    assert ModelFolder.find(start).network == ModelFolder.find("builtin:portraits").network
    assert "text" not in needs(config)


def test_the_quickstart_goes_on_as_the_start_was_made():
    made, ours = (load_config(config_folder() / f"{name}.yaml") for name in ("portraits-start", "quickstart"))
    network = ModelFolder.find("builtin:portraits").network
    assert network["target"] == made.pretrain.target == ours.pretrain.target
    assert (network["channels"], network["refine"]) == (made.model.channels, made.model.refine)
    assert made.data == ours.data and made.pretrain.candidates == ours.pretrain.candidates
