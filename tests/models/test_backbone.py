"""Published checkpoints as proximal networks, against the unmodified diffusers pipelines."""

import json

import numpy as np
import pytest
import torch

from fixtures import tiny_checkpoints
from rlproxi.models.lam import added_to_time
from rlproxi.models.loading import load_denoiser, load_encoder
from rlproxi.models.pipeline import TextToImage
from rlproxi.proximal.schedule import VPSchedule

KINDS = {
    "sd15": {},
    "sd15-v": {"prediction_type": "v_prediction"},
    "sdxl": {},
    "sd3": {},
    "pixart": {},
    "pixart-resolution": {"additional_conditions": True},
}
PROMPTS = ["a red hat on a cat", "", "two hands"]
GRID = [(t, lam) for t in (0.0, 0.1, 0.35, 0.65, 0.95) for lam in (1e-3, 0.05, 0.5, 2.0, 8.0)]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return getattr(tiny_checkpoints, kind.split("-")[0])(tmp_path_factory.mktemp(kind) / "model", **KINDS[kind])


def samples(denoiser, seed: int = 0) -> torch.Tensor:
    return torch.randn(len(PROMPTS), *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed))


def answer(pipeline, kind: str, x, time, text) -> torch.Tensor:
    """The unmodified network's prediction at ``time``, asked as diffusers' own pipeline asks it."""
    side = 8.0 * x.shape[-1]
    if kind.startswith("sd15"):
        return pipeline.unet(x, time, encoder_hidden_states=text.states).sample
    if kind == "sdxl":
        sizes = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(x), 1)
        return pipeline.unet(
            x,
            time,
            encoder_hidden_states=text.states,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
        ).sample
    if kind == "sd3":
        return pipeline.transformer(
            x, encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=time
        ).sample
    told = kind.endswith("resolution")
    added = {
        "resolution": torch.full((len(x), 2), side) if told else None,
        "aspect_ratio": torch.ones(len(x), 1) if told else None,
    }
    out = pipeline.transformer(
        x, encoder_hidden_states=text.states, encoder_attention_mask=text.mask, timestep=time, added_cond_kwargs=added
    ).sample
    return out.chunk(2, 1)[0]


def formula(pipeline, kind: str, y, t: float, lam: float, text) -> torch.Tensor:
    """eps_prox by method.md's warm start, through x_0, with numpy's interpolation, in float64 but for the network."""
    bar = VPSchedule().alpha_bar(t)
    noise = 1 - bar + lam
    ones = torch.ones(len(y))
    if kind == "sd3":
        r = np.sqrt(noise / bar)
        s = r / (1 + r)
        x = ((1 - s) * y.double() / np.sqrt(bar)).float()
        clean = x.double() - s * answer(pipeline, kind, x, 1000 * s * ones, text).double()
        return np.sqrt(lam) * (y.double() - np.sqrt(bar) * clean) / noise
    levels = pipeline.scheduler.alphas_cumprod.double().numpy()
    bar_of_time = bar / (1 + lam)
    log_snr = np.log(levels / (1 - levels))
    time = np.interp(-np.log(bar_of_time / (1 - bar_of_time)), -log_snr, np.arange(len(levels)))
    x = (y.double() / np.sqrt(1 + lam)).float()
    out = answer(pipeline, kind, x, time * ones, text).double()
    if kind == "sd15-v":
        out = np.sqrt(bar_of_time) * out + np.sqrt(1 - bar_of_time) * x.double()
    return np.sqrt(lam / noise) * out


@torch.no_grad()
def test_the_proximal_output_is_the_warm_start_formula_of_the_unmodified_network(kind, folder):
    from diffusers import DiffusionPipeline

    denoiser, text = load_denoiser(folder), load_encoder(folder).encode(PROMPTS)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    y = 1.5 * samples(denoiser)
    worst = 0.0
    points = GRID[::6] if kind == "pixart-resolution" else GRID  # 4,096 tokens: each t and each lam once
    for t, lam in torch.tensor(points).tolist():  # as float32 has them
        ours = denoiser(y, torch.full((3,), t), torch.full((3,), lam), text)
        expected = formula(pipeline, kind, y, t, lam, text)
        assert expected.abs().max() > 1e-3  # a vanishing network would agree with anything
        worst = max(worst, float((ours.double() - expected).abs().max()))
    assert worst < 1e-5


def test_the_branch_starts_silent_and_then_speaks(kind, folder):
    denoiser, text = load_denoiser(folder), load_encoder(folder).encode(PROMPTS)
    y, t, lam = samples(denoiser), torch.full((3,), 0.4), torch.full((3,), 0.3)
    before = denoiser(y, t, lam, text)
    before.square().mean().backward()
    last = denoiser.lam_embedding.linear_2
    assert last.weight.grad.abs().max() > 0  # training moves on from there
    with torch.no_grad():
        last.weight.normal_(std=0.3)
        after = denoiser(y, t, lam, text)
    assert not torch.allclose(before, after, atol=1e-4)
    assert not denoiser.interface.time_embedder(denoiser.net)._forward_hooks  # the network itself is as it was


def test_a_hook_does_not_outlive_an_error():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="inside"), added_to_time(layer, torch.ones(1, 2)):
        assert torch.equal(layer(torch.zeros(1, 2)), layer.bias[None] + 1)
        raise RuntimeError("inside")
    assert not layer._forward_hooks


def test_images_survive_saving_and_the_network_stays_diffusers_own(kind, folder, tmp_path):
    import diffusers

    model = TextToImage.from_pretrained(folder)
    with torch.no_grad():
        model.denoiser.lam_embedding.linear_2.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    prompts = PROMPTS[:1] if kind == "pixart-resolution" else PROMPTS  # of 1,024 pixels
    seeds = list(range(1, 1 + len(prompts)))
    images = model(prompts, num_inference_steps=2, seeds=seeds)
    assert images.shape == (len(prompts), model.size, model.size, 3) and images.std() > 5
    again = TextToImage.from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert np.array_equal(again(prompts, num_inference_steps=2, seeds=seeds), images)
    part = again.denoiser.part
    plain = getattr(diffusers, type(again.denoiser.net).__name__).from_pretrained(tmp_path / "saved" / part)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.denoiser.net.parameters()))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index[part] == ["diffusers", type(plain).__name__] and index["vae"] == ["diffusers", "AutoencoderKL"]


def test_sizes_told_by_the_data_reach_sdxl(tmp_path):
    folder = tiny_checkpoints.sdxl(tmp_path / "sdxl")
    denoiser, text = load_denoiser(folder), load_encoder(folder).encode(PROMPTS)
    y, t, lam = samples(denoiser), torch.full((3,), 0.4), torch.full((3,), 0.3)
    from dataclasses import replace

    whole = replace(text, time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(3, 1))
    cropped = replace(text, time_ids=torch.tensor([[200.0, 300, 17, 5, 64, 64]]).repeat(3, 1))
    with torch.no_grad():
        plain, same, other = (denoiser(y, t, lam, x) for x in (text, whole, cropped))
    assert torch.equal(plain, same) and not torch.allclose(plain, other, atol=1e-4)


def _change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_cannot_be_a_proximal_network_is_named(tmp_path):
    folder = tiny_checkpoints.sd15(tmp_path / "model")
    config, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    _change(scheduler, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type 'sample' is not epsilon"):
        load_denoiser(folder)
    _change(scheduler, prediction_type="epsilon")
    _change(config, in_channels=9)
    with pytest.raises(ValueError, match="this U-Net takes more than a latent"):
        load_denoiser(folder)
    _change(config, in_channels=4, _class_name="UNet3DConditionModel")
    with pytest.raises(ValueError, match="a UNet3DConditionModel cannot be made a proximal network; supported: "):
        load_denoiser(folder)
    _change(config, _class_name="UNet2DConditionModel", block_out_channels=[64, 64])
    with pytest.raises(ValueError, match="unet: the weights are damaged or do not fit config.json"):
        load_denoiser(folder)
    scheduler.unlink()
    with pytest.raises(FileNotFoundError, match="scheduler_config.json is missing: it says what the network predicts"):
        load_denoiser(folder)
