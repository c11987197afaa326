import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL

from fixtures import tiny_checkpoints as tiny
from rlproxi.models.autoencoder import Autoencoder
from rlproxi.models.folders import ModelFolder

#: scaling_factor and shift_factor as published.
PUBLISHED = {"sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609), "pixart": (0.18215, 0.0)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: getattr(tiny, name)(root / name) for name in PUBLISHED}


def images(count: int = 3, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(folders, name):
    scaling, shift = PUBLISHED[name]
    vae = AutoencoderKL.from_pretrained(folders[name] / "vae")
    mine = Autoencoder.from_pretrained(folders[name], batch_size=2)
    posterior = vae.encode(images()).latent_dist
    latents = mine.encode(images())
    assert latents.shape == (3, 16 if name == "sd3" else 4, 4, 6) and latents.dtype == torch.float32
    assert (mine.latent_channels, mine.factor) == (latents.shape[1], 8) == ModelFolder.at(folders[name]).latents
    assert torch.allclose(latents, (posterior.mode() - shift) * scaling, atol=1e-5, rtol=1e-5)
    drawn = mine.encode(images(), torch.Generator().manual_seed(3))
    expected = (posterior.sample(torch.Generator().manual_seed(3)) - shift) * scaling
    assert torch.allclose(drawn, expected, atol=1e-5, rtol=1e-5) and not torch.allclose(drawn, latents, atol=1e-2)
    decoded = mine.decode(latents)
    assert decoded.shape == (3, 3, 32, 48) and decoded.dtype == torch.float32
    assert torch.allclose(decoded, vae.decode(latents / scaling + shift).sample, atol=1e-5)
    assert decoded.std() > 0.1 and torch.equal(decoded, mine.decode(latents))


@torch.no_grad()
def test_the_batch_size_bounds_a_forward_and_changes_no_answer(folders):
    sizes, answers = [], []
    for batch_size in (1, 2, 5):
        mine = Autoencoder.from_pretrained(folders["sd15"], batch_size=batch_size)
        mine.vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        mine.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        latents = mine.encode(images(5), torch.Generator().manual_seed(0))
        answers.append((latents, mine.decode(latents)))
    assert sizes == [1] * 10 + [2, 2, 1] * 2 + [5] * 2
    for latents, decoded in answers[1:]:
        assert torch.allclose(latents, answers[0][0], atol=1e-5) and torch.allclose(decoded, answers[0][1], atol=1e-4)


@torch.no_grad()
def test_means_and_deviations_of_channels(folders, tmp_path):
    """As diffusers' SDXL pipeline has it: z = latents * latents_std / scaling_factor + latents_mean."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    mean, std = torch.tensor([[-1.6, 1.9, 0.8, -0.3], [8.4, 6.0, 7.3, 5.6]]).view(2, 1, 4, 1, 1)
    change_config(folder, latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist(), scaling_factor=0.5)
    vae, mine = AutoencoderKL.from_pretrained(folder / "vae"), Autoencoder.from_pretrained(folder)
    latents = mine.encode(images())
    assert torch.allclose(latents * std / 0.5 + mean, vae.encode(images()).latent_dist.mode(), atol=1e-5)
    assert torch.allclose(mine.decode(latents), vae.decode(latents * std / 0.5 + mean).sample, atol=1e-5)


def test_gradients_go_through_to_the_input_and_not_to_the_weights(folders):
    mine = Autoencoder.from_pretrained(folders["sd3"])
    latents = torch.randn(1, 16, 2, 2, requires_grad=True)
    mine.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in mine.vae.parameters())
    assert not mine.encode(images(1)).requires_grad and not mine.vae.training


@torch.no_grad()
def test_arithmetic(folders):
    full = Autoencoder.from_pretrained(folders["sdxl"])
    latents = full.encode(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a caller's, as around a sampler
        assert torch.equal(full.encode(images()), latents)
    half = Autoencoder(Autoencoder.from_pretrained(folders["sdxl"]).vae.bfloat16())
    assert half.vae.dtype == torch.bfloat16 and half.decode(latents).dtype == torch.float32
    error = (half.encode(images()) - latents).norm() / latents.norm()
    assert half.encode(images()).dtype == torch.float32 and 0 < error < 0.05


@torch.no_grad()
def test_a_saved_autoencoder_is_the_same(folders, tmp_path):
    mine = Autoencoder.from_pretrained(folders["sd3"])
    mine.save_pretrained(tmp_path)
    again = Autoencoder.from_pretrained(tmp_path).to("cpu")
    assert torch.equal(again.encode(images()), mine.encode(images()))


def test_what_is_wrong_is_named(folders, tmp_path):
    mine = Autoencoder.from_pretrained(folders["sd15"])
    with pytest.raises(ValueError, match="33x48 pixels: .* to multiples of 8"):
        mine.encode(images(1, 33, 48))
    with pytest.raises(ValueError, match=r"\(3, 32, 48\): expected \[B, 3, H, W\]"):
        mine.encode(images()[0])
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\): expected \[B, 4, h, w\]"):
        mine.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="batch_size is 0"):
        Autoencoder.from_pretrained(folders["sd15"], batch_size=0)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        Autoencoder.from_pretrained(tmp_path)
    for name, change, error in (
        ("class", {"_class_name": "AutoencoderTiny"}, "holds a AutoencoderTiny"),
        ("shape", {"latent_channels": 8}, "do not fit config.json"),
        ("layers", {"layers_per_block": 2}, "missing"),
    ):
        folder = change_config(shutil.copytree(folders["sd15"], tmp_path / name), **change)
        with pytest.raises(ValueError, match=error):
            Autoencoder.from_pretrained(folder)
    change_config(tmp_path / "shape", block_out_channels=None)
    with pytest.raises(ValueError, match="config.json is not the config of an AutoencoderKL"):
        _ = ModelFolder.at(tmp_path / "shape").latents
    file = tmp_path / "class" / "vae" / "diffusion_pytorch_model.safetensors"
    change_config(tmp_path / "class", _class_name="AutoencoderKL")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        Autoencoder.from_pretrained(tmp_path / "class")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no diffusion_pytorch_model.safetensors"):
        Autoencoder.from_pretrained(tmp_path / "class")


def change_config(folder, **changes):
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder
