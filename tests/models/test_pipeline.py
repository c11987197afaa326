import json
import re

import numpy as np
import pytest
import torch

from rlproxi.config.sections import Sampler, Schedule
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import load_denoiser
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.models.unet import ProximalUNet

CAPTIONS = ["a smiling person with a red hat", "a frowning person with no hat"]


@pytest.fixture(scope="module")
def model() -> TextToImage:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ProximalUNet(
            sample_size=16, patch=4, channels=(32,), blocks=(1,), attention=(True,), text_dim=32, pooled_dim=32
        )
        for p in unet.parameters():  # the zero-initialised head too, so that text and weights matter
            torch.nn.init.normal_(p, std=0.1)
    text = build_text_encoder(CAPTIONS, dim=32, layers=1, max_length=12)
    return TextToImage(unet, text, Schedule(), Sampler(num_inference_steps=3))


@pytest.fixture
def folder(model, tmp_path):
    return model.save_pretrained(tmp_path / "model")


def test_images_follow_prompt_and_seed(model):
    images = model([CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]], seeds=[1, 1, 1, 2])
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.uint8
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[3])


def test_an_image_does_not_depend_on_its_neighbours(model):
    together = model(CAPTIONS * 3, seeds=[5, 6, 7, 8, 9, 10])
    for i in (0, 3):
        alone = model([(CAPTIONS * 3)[i]], seeds=[5 + i])
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1
    chunked = model(CAPTIONS * 3, seeds=[5, 6, 7, 8, 9, 10], batch_size=4)
    assert np.abs(chunked.astype(int) - together).max() <= 1


def test_steps_and_guidance_override_the_defaults(model):
    base = model(CAPTIONS, seeds=[1, 2])
    assert np.array_equal(base, model(CAPTIONS, num_inference_steps=3, guidance_scale=1.0, seeds=[1, 2]))
    assert not np.array_equal(base, model(CAPTIONS, num_inference_steps=2, seeds=[1, 2]))
    assert not np.array_equal(base, model(CAPTIONS, guidance_scale=3.0, seeds=[1, 2]))
    # Guidance 0 is the unconditional model: every prompt gives the empty prompt's image.
    assert (
        np.abs(model(CAPTIONS, guidance_scale=0.0, seeds=[1, 1]).astype(int) - model(["", ""], seeds=[1, 1])).max() <= 1
    )


def test_seeds_are_drawn_from_torch_when_not_given(model):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = model(CAPTIONS[0])
        second = model(CAPTIONS[0])
        torch.manual_seed(3)
        assert np.array_equal(model(CAPTIONS[0]), first) and not np.array_equal(first, second)


def test_round_trip_gives_the_same_image(model, folder):
    again = TextToImage.from_pretrained(folder)
    assert np.array_equal(again(CAPTIONS, seeds=[1, 2]), model(CAPTIONS, seeds=[1, 2]))
    assert again.sampler == model.sampler and again.schedule == model.schedule
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ProxT2IPipeline" and index["unet"] == ["rlproxi.models.unet", "ProximalUNet"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]  # no scratch folder is left


def test_save_replaces_a_model_but_nothing_else(model, folder):
    (folder / "marker").touch()
    model.save_pretrained(folder)
    assert not (folder / "marker").exists() and (folder / "unet").is_dir()
    mine = folder.parent / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="mine exists and is not a model folder"):
        model.save_pretrained(mine)
    assert (mine / "thesis.tex").exists()


def test_an_interrupted_save_keeps_the_old_model(model, folder, monkeypatch):
    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr(model.text, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    TextToImage.from_pretrained(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_a_run_directory_gives_its_final_model_else_the_pretrained_one(model, tmp_path):
    model.save_pretrained(tmp_path / "run/models/pretrained")
    assert ModelFolder.find(tmp_path / "run").path.name == "pretrained"
    model.save_pretrained(tmp_path / "run/models/final")
    assert ModelFolder.find(tmp_path / "run").path.name == "final"
    assert torch.equal(load_denoiser(tmp_path / "run").head.weight, model.denoiser.head.weight)


def test_missing_folders_say_what_was_expected(model, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: expected a model folder \(unet/"):
        TextToImage.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no model: expected .* or a run directory"):
        TextToImage.from_pretrained(tmp_path / "empty")
    (folder / "sampler.json").unlink()
    with pytest.raises(FileNotFoundError, match="sampler.json is missing"):
        TextToImage.from_pretrained(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "empty", "junk"])
def test_damaged_weights_are_a_value_error_that_names_the_file(folder, part, damage):
    (file,) = (folder / part).glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-100], "empty": b"", "junk": b"\x80\x04pickle?" * 9}[damage])
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged or incomplete")):
        TextToImage.from_pretrained(folder)


def test_weights_that_do_not_fit_their_config_are_refused(folder):
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    for change in ({"channels": [64]}, {"blocks": [2]}):
        config.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match="do not fit config.json"):
            load_denoiser(folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="unet holds no .safetensors file"):
        load_denoiser(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "sampler.json is not readable as JSON"),
        ('{"schedule": {}}', "sampler.json is not readable: .*sampler"),
        ('{"schedule": {}, "sampler": {"nome": 1}}', "nome"),
    ],
)
def test_an_unreadable_sampler_file_is_named(folder, text, words):
    (folder / "sampler.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        TextToImage.from_pretrained(folder)


def test_impossible_calls_are_refused(model):
    with pytest.raises(ValueError, match="no prompts"):
        model([])
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        model(CAPTIONS, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="at least 1 step"):
        model(CAPTIONS, num_inference_steps=0)
    backward = TextToImage(model.denoiser, model.text, model.schedule, Sampler(name="backward", num_inference_steps=10))
    with pytest.raises(ValueError, match="smallest number of steps that works"):
        backward(CAPTIONS, num_inference_steps=2)


def test_broken_weights_do_not_become_an_image(model):
    broken = ProximalUNet.from_config(model.denoiser.config)
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        TextToImage(broken, model.text, model.schedule, model.sampler)(CAPTIONS)


def test_unknown_words_are_named(model):
    assert model.text.unknown_words("a smiling robot with a red hat, please") == ["robot", "please"]
