"""A model folder from elsewhere: whatever file of it is a pickle, it is not executed."""

import os
import pickle
import shutil

import pytest
import torch

from fixtures import tiny_checkpoints
from rlproxi.config.loading import build_config
from rlproxi.models import lora
from rlproxi.models.loading import training_form
from rlproxi.models.pipeline import TextToImage
from rlproxi.rewards.attributes import AttributeClassifier

#: Every file of weights, and the pickled ones that diffusers, transformers and peft would look for in its place.
WEIGHTS = {
    "unet/diffusion_pytorch_model.safetensors": ["unet/diffusion_pytorch_model.bin"],
    "vae/diffusion_pytorch_model.safetensors": ["vae/diffusion_pytorch_model.bin"],
    "text_encoder/model.safetensors": ["text_encoder/pytorch_model.bin", "text_encoder/model.bin"],
    "lora/adapter_model.safetensors": ["lora/adapter_model.bin"],
}


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Stable Diffusion of random weights with adapters; it loads."""
    folder = tiny_checkpoints.sd15(tmp_path_factory.mktemp("untrusted") / "model")
    config = build_config(
        {"model": {"init": str(folder), "lora": {"rank": 2, "alpha": 2}, "precision": "float32"}, "data": {"size": 64}}
    )
    lora.save(training_form(folder, config, "rl"), folder)
    assert TextToImage.from_pretrained(folder).denoiser.lora is not None
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")} == set(WEIGHTS)
    return folder


def plant(file, marker, form):
    if form == "pickle":
        file.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"weight": Bomb(marker)}, file)


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pickle_in_the_place_of_weights_is_refused(name, form, model, tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(model, folder)
    plant(folder / name, marker, form)
    with pytest.raises(ValueError, match=str(folder / name.split("/")[0])):
        TextToImage.from_pretrained(folder)
    for pickled in WEIGHTS[name]:
        (folder / name).rename(folder / pickled)
        with pytest.raises((ValueError, FileNotFoundError), match=str(folder / name.split("/")[0])):
            TextToImage.from_pretrained(folder)
        (folder / pickled).rename(folder / name)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_so_is_one_in_the_place_of_a_classifier(form, tmp_path):
    file, marker = tmp_path / "classifier.safetensors", tmp_path / "executed"
    plant(file, marker, form)
    with pytest.raises(ValueError, match=str(file)):
        AttributeClassifier.load(file)
    assert not marker.exists()
