import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput

from fixtures import tiny_checkpoints
from rlproxi.config.sections import LoRA, Sampler, Schedule
from rlproxi.models import lora
from rlproxi.models.autoencoder import Autoencoder
from rlproxi.models.diffusers_pipeline import ProxT2IPipeline, seeds_of
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.models.transformer import ProximalTransformer
from rlproxi.models.unet import ProximalUNet

PROMPTS = ["a photo of a red cat", "the dog on a horse"]
KINDS = ("unet", "transformer", "sd15", "sdxl", "sd3", "pixart")
FRESH = """
import sys
import numpy as np, torch
torch.set_num_threads(1)
import rlproxi.models.diffusers_pipeline
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe({prompt!r}, generator=torch.Generator().manual_seed(7)).images[0]
    np.save(folder + "/image.npy", np.asarray(image))
"""


def build(kind: str, folder: Path) -> TextToImage:
    """A model of each kind whose weights all matter; two steps, guided, so that nothing is left out."""
    sampler = Sampler(num_inference_steps=2, guidance_scale=2.0)
    if kind in ("unet", "transformer"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = None
            if kind == "unet":
                net = ProximalUNet(
                    sample_size=16, channels=(32,), blocks=(1,), attention=(True,), text_dim=32, pooled_dim=32
                )
            else:
                net = ProximalTransformer(sample_size=8, layers=1, heads=2, head_dim=16, text_dim=32)
                vae = tiny_checkpoints.vae()
                tiny_checkpoints.randomise(vae, 1)
                vae = Autoencoder(vae)
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.1)
        return TextToImage(net, build_text_encoder(PROMPTS, 32, 1, 12), Schedule(), sampler, vae=vae)
    return TextToImage.from_pretrained(getattr(tiny_checkpoints, kind)(folder), sampler=sampler)


def with_adapters(model: TextToImage, base: Path) -> TextToImage:
    """The model of ``base`` with adapters, and a lam branch, that change its images."""
    model.save_pretrained(base)
    model = TextToImage.from_pretrained(base)
    lora.attach(model.denoiser, LoRA(rank=4, alpha=8))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in lora.adapter_weights(model.denoiser).values():
            torch.nn.init.normal_(p, std=0.3)
        if hasattr(model.denoiser, "lam_embedding"):
            torch.nn.init.normal_(model.denoiser.lam_embedding.linear_2.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: model folder}, plain and, as kind+lora, with adapters."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for kind in KINDS:
        model = build(kind, root / f"{kind}-published")
        found[kind] = model.save_pretrained(root / kind)
        found[kind + "+lora"] = with_adapters(model, root / f"{kind}-base").save_pretrained(root / f"{kind}+lora")
    return found


@pytest.fixture(scope="module")
def folder(folders):
    return folders["unet"]


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_fresh_process_draws_the_same_image_of_every_kind_of_model(folders):
    program = FRESH.format(prompt=PROMPTS[0])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, folders.values())],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    seen = set()
    for kind, folder in folders.items():
        expected = TextToImage.from_pretrained(folder)(PROMPTS[:1], seeds=[7])[0]
        assert np.array_equal(np.load(folder / "image.npy"), expected), kind
        seen.add(expected.tobytes())
    assert len(seen) == len(folders), "adapters and kinds tell in the image"


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_registered_and_named_in_the_index(folders, kind):
    pipe = ProxT2IPipeline.from_pretrained(folders[kind + "+lora"])
    index = json.loads((folders[kind + "+lora"] / "model_index.json").read_text())
    present = {name for name, part in pipe.components.items() if part is not None}
    assert {name for name in index if not name.startswith("_")} == present
    for name in present - {"sampler"}:
        assert type(getattr(pipe, name)).__name__ == index[name][1], name
    encoders = {"sdxl": 2, "sd3": 3}.get(kind, 1)
    assert len([name for name in present if name.startswith("text_encoder")]) == encoders
    assert ("lam_embedding" in present) == ("scheduler" in present) == (kind not in ("unet", "transformer"))


def test_a_fresh_generator_is_the_seed_and_a_used_one_draws_on(pipe, folder):
    model = TextToImage.from_pretrained(folder)
    generator = seeded(5)
    first = pipe(PROMPTS, generator=generator, num_images_per_prompt=2).images
    expected = model([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, seeds=[5, 6, 5, 6])  # as rlproxi sample --seed 5 --count 2
    assert np.array_equal(np.stack(first), expected)
    second = pipe(PROMPTS, generator=generator, num_images_per_prompt=2).images
    assert not any(np.array_equal(a, b) for a, b in zip(first, second))
    again = seeded(5)
    pipe(PROMPTS, generator=again)
    assert np.array_equal(np.stack(pipe(PROMPTS, generator=again, num_images_per_prompt=2).images), np.stack(second))


def test_a_list_of_generators_and_none(pipe, folder):
    images = pipe(PROMPTS, generator=[seeded(9), seeded(3)]).images
    assert np.array_equal(np.stack(images), TextToImage.from_pretrained(folder)(PROMPTS, seeds=[9, 3]))
    torch.manual_seed(4)
    first = pipe(PROMPTS, output_type="np").images
    torch.manual_seed(4)
    assert np.array_equal(pipe(PROMPTS, output_type="np").images, first)
    assert len(set(seeds_of(None, 4, 4))) == 16
    assert seeds_of(seeded(2**63), 1, 2) == [2**63, 2**63 + 1]


def test_output_types_agree(folders):
    pipe = ProxT2IPipeline.from_pretrained(folders["sd15"])
    pipe.set_progress_bar_config(disable=True)
    out = {kind: pipe(PROMPTS, generator=seeded(1), output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert all(isinstance(x, ImagePipelineOutput) for x in out.values())
    assert out["pil"].images[0].size == (64, 64) and out["np"].images.shape == (2, 64, 64, 3)
    assert out["latent"].images.shape == (2, 4, 8, 8)
    assert torch.equal(out["pt"].images.permute(0, 2, 3, 1), torch.from_numpy(out["np"].images))
    assert out["np"].images.min() >= 0 and out["np"].images.max() <= 1
    assert np.abs(out["np"].images * 255 - np.stack(out["pil"].images)).max() < 0.51
    decoded = Autoencoder(pipe.vae).decode(out["latent"].images)
    assert torch.equal(((decoded + 1) / 2).clamp(0, 1), out["pt"].images)
    (images,) = pipe(PROMPTS[0], generator=seeded(1), return_dict=False)
    assert np.array_equal(images[0], out["pil"].images[0])


def test_steps_guidance_and_batches(pipe, folder, capsys):
    model = TextToImage.from_pretrained(folder)
    given = np.stack(pipe(PROMPTS, 3, 1.0, generator=seeded(1)).images)
    assert np.array_equal(given, model(PROMPTS, 3, 1.0, [1, 1]))
    split = np.stack(pipe(PROMPTS, 3, 1.0, generator=seeded(1), batch_size=1).images)
    assert np.array_equal(split, model(PROMPTS, 3, 1.0, [1, 1], batch_size=1))
    pipe.set_progress_bar_config(disable=False)
    try:
        pipe(PROMPTS, 3, 2.0, batch_size=1)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "6/6" in capsys.readouterr().err  # three steps of two batches
    assert not model.denoiser._forward_hooks and not pipe.unet._forward_hooks


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"prompt": []}, "prompt: give a string"),
        ({"prompt": [3]}, "prompt: give a string"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"output_type": "jpg"}, "output_type 'jpg' is unknown"),
        ({"height": 512}, "height=512, width=16: this model draws 16 pixels"),
        ({"num_inference_steps": 0}, "at least 1 step"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    ],
)
def test_impossible_arguments_are_named(pipe, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPTS[0], "height": 16, "width": 16, **arguments})


@pytest.mark.parametrize("kind", ["unet", "unet+lora", "sd15+lora", "pixart"])
def test_save_and_load_again(folders, kind, tmp_path):
    pipe = ProxT2IPipeline.from_pretrained(folders[kind])
    pipe.save_pretrained(tmp_path / "again")
    expected = TextToImage.from_pretrained(folders[kind])(PROMPTS, seeds=[1, 2])
    assert np.array_equal(TextToImage.from_pretrained(tmp_path / "again")(PROMPTS, seeds=[1, 2]), expected)
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert np.array_equal(np.stack(again(PROMPTS, generator=[seeded(1), seeded(2)]).images), expected)


def test_run_directories_and_plain_diffusers_folders_load(folders, tmp_path):
    TextToImage.from_pretrained(folders["unet"]).save_pretrained(tmp_path / "run/models/final")
    assert ProxT2IPipeline.from_pretrained(tmp_path / "run").model.size == 16
    plain = tiny_checkpoints.sdxl(tmp_path / "sdxl")
    image = ProxT2IPipeline.from_pretrained(plain)(PROMPTS[0], 2, generator=seeded(3)).images[0]
    assert np.array_equal(image, TextToImage.from_pretrained(plain)(PROMPTS[0], 2, seeds=[3])[0])
    with pytest.raises(ValueError, match="plain diffusers folder, loaded without options; given: variant"):
        ProxT2IPipeline.from_pretrained(plain, variant="fp16")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        ProxT2IPipeline.from_pretrained(tmp_path / "nowhere")


def test_an_index_without_the_sampler_says_what_to_do(folders, tmp_path):
    TextToImage.from_pretrained(folders["unet"]).save_pretrained(tmp_path / "old")
    index = json.loads((tmp_path / "old/model_index.json").read_text())
    del index["sampler"]
    (tmp_path / "old/model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names no sampler.*ProxT2IPipeline.from_pretrained"):
        DiffusionPipeline.from_pretrained(tmp_path / "old")
    assert ProxT2IPipeline.from_pretrained(tmp_path / "old").model.size == 16


def test_a_replaced_component_takes_effect_and_is_not_saved_unseen(folders, tmp_path):
    other = AutoencoderKL.from_config(tiny_checkpoints.vae().config)
    tiny_checkpoints.randomise(other, 9)
    pipe = DiffusionPipeline.from_pretrained(folders["sd15+lora"])
    before = pipe(PROMPTS[0], generator=seeded(1), output_type="np").images
    pipe.vae = other
    after = pipe(PROMPTS[0], generator=seeded(1), output_type="np").images
    assert not np.allclose(before, after)
    given = DiffusionPipeline.from_pretrained(folders["sd15+lora"], vae=other)
    assert np.array_equal(given(PROMPTS[0], generator=seeded(1), output_type="np").images, after)
    with pytest.raises(ValueError, match="components were replaced"):
        pipe.save_pretrained(tmp_path / "x")


def test_dtypes_set_the_arithmetic(folders):
    pipe = ProxT2IPipeline.from_pretrained(folders["sd15"])
    exact = pipe(PROMPTS, generator=seeded(1), output_type="np").images
    assert pipe.to(torch.bfloat16) is pipe and pipe.unet.dtype is torch.float32
    rough = pipe(PROMPTS, generator=seeded(1), output_type="np").images
    model = TextToImage.from_pretrained(folders["sd15"], precision="bfloat16")
    assert np.array_equal((rough * 255).round().astype(np.uint8), model(PROMPTS, seeds=[1, 1]))
    assert 0 < np.abs(rough - exact).mean() < 0.05
    half = DiffusionPipeline.from_pretrained(folders["sd15"], torch_dtype=torch.bfloat16)
    assert half.unet.dtype is torch.bfloat16
    assert np.abs(half(PROMPTS, generator=seeded(1), output_type="np").images - exact).mean() < 0.05
    assert np.array_equal(pipe.to("cpu", torch.float32)(PROMPTS, generator=seeded(1), output_type="np").images, exact)
    with pytest.raises(ValueError, match="torch.float16 is not an arithmetic of this model"):
        pipe.to(torch.float16)
    own = DiffusionPipeline.from_pretrained(folders["unet"], torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="loaded in torch.bfloat16: load it without dtype"):
        own(PROMPTS)
