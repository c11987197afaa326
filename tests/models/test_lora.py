"""Adapters: what is trained, what the base computes, and what travels and is written."""

import json

import numpy as np
import pytest
import torch

from fixtures import tiny_checkpoints
from rlproxi.algorithms.rollout import GroupSampler, flatten
from rlproxi.config.loading import build_config
from rlproxi.config.sections import LoRA
from rlproxi.models import lora
from rlproxi.models.loading import load_denoiser, load_encoder, trainable, training_form
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import operator

KINDS = ("sd15", "sdxl", "sd3", "pixart")
PROMPTS = ["a red hat", "a dog"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return getattr(tiny_checkpoints, request.param)(tmp_path_factory.mktemp(request.param) / "model")


def config_of(folder, **model):
    return build_config(
        {
            "model": {"init": str(folder), "lora": {"rank": 4, "alpha": 8}, "precision": "float32", **model},
            "data": {"size": 64},
            "sampler": {"num_inference_steps": 4},
        }
    )


def shake(denoiser) -> None:
    """Adapters that do something, as after training: B starts at 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora.adapter_weights(denoiser).values():
            p.normal_(std=0.2, generator=generator)


def inputs(denoiser, folder):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, *denoiser.sample_shape, generator=generator)
    return y, torch.tensor([0.2, 0.6]), torch.tensor([0.1, 1.0]), load_encoder(folder).encode(PROMPTS)


def test_only_adapters_are_trained_and_they_change_nothing_yet(folder):
    config = config_of(folder)
    denoiser, plain = training_form(folder, config, "rl"), load_denoiser(folder)
    arguments = inputs(denoiser, folder)
    with torch.no_grad():
        assert torch.equal(denoiser(*arguments), plain(*arguments))
    trained = trainable(denoiser)
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} >= {"to_q", "to_k", "to_v", "0"}
    assert sum(p.numel() for p in trained.values()) < 0.2 * sum(p.numel() for p in plain.parameters())
    before = {name for name in trainable(training_form(folder, config, "pretrain"))}
    assert before - set(trained) == {f"lam_embedding.linear_{i}.{x}" for i in (1, 2) for x in ("weight", "bias")}
    full = trainable(training_form(folder, config_of(folder, lora=None), "rl"))
    assert sum(p.numel() for p in full.values()) == sum(p.numel() for p in plain.parameters())


def test_with_the_adapters_off_it_is_the_base_and_one_copy_serves_both(folder):
    denoiser, plain = training_form(folder, config_of(folder), "rl"), load_denoiser(folder)
    shake(denoiser)
    encoder = load_encoder(folder)
    y, _, _, text = inputs(denoiser, folder)
    prox = operator(denoiser, encoder, 2.0)
    reference = lora.without_adapters(prox, denoiser)
    alone = torch.autograd.grad(
        prox(y, 0.3, 0.5, text).square().mean(), trainable(denoiser).values(), allow_unused=True
    )
    policy = prox(y, 0.3, 0.5, text)
    with torch.no_grad():
        base = operator(plain, encoder, 2.0)(y, 0.3, 0.5, text)
        assert torch.equal(reference(y, 0.3, 0.5, text), base)
    assert not torch.allclose(policy, base, atol=1e-3)
    # The reference is asked between the policy's forward and its backward: gradients must not be lost.
    policy.square().mean().backward()
    for p, expected in zip(
        trainable(denoiser).values(), alone
    ):  # None: what SD3's last block computes of the text is unused
        assert (p.grad is None) == (expected is None) and (expected is None or torch.equal(p.grad, expected))
    assert sum(expected is not None and bool(expected.any()) for expected in alone) > 0.9 * len(alone)
    with torch.no_grad():
        assert torch.equal(prox(y, 0.3, 0.5, text), policy)


def test_round_trip_and_merge(folder, tmp_path):
    model = TextToImage.from_pretrained(folder)
    lora.attach(model.denoiser, LoRA(rank=4, alpha=8))
    shake(model.denoiser)
    images = model(PROMPTS, num_inference_steps=2, seeds=[1, 2])
    saved = model.save_pretrained(tmp_path / "saved")
    again = TextToImage.from_pretrained(saved)
    assert again.denoiser.lora == LoRA(rank=4, alpha=8)
    assert np.array_equal(again(PROMPTS, num_inference_steps=2, seeds=[1, 2]), images)
    # The base is linked, not written again.
    part = again.denoiser.part
    for file in (folder / part).iterdir():
        assert (saved / part / file.name).stat().st_ino == file.stat().st_ino
    merged = TextToImage.from_pretrained(again.merged().save_pretrained(tmp_path / "merged"))
    assert merged.denoiser.lora is None and not (tmp_path / "merged" / "lora").exists()
    arguments = inputs(model.denoiser, folder)
    with torch.no_grad():
        # A hundredth of what the adapters change.
        difference = (merged.denoiser(*arguments) - model.denoiser(*arguments)).abs().max()
        assert difference < 0.01 * (load_denoiser(folder)(*arguments) - model.denoiser(*arguments)).abs().max()


def test_weights_travel_without_the_base(folder):
    config = config_of(folder)
    learner = training_form(folder, config, "rl")
    shake(learner)
    flat = flatten(trainable(learner))
    sampler = GroupSampler.from_pretrained(config, folder)
    sampler.take(flat)
    assert flat.nbytes == 4 * sum(p.numel() for p in trainable(learner).values())
    arguments = inputs(learner, folder)
    with torch.no_grad():
        assert torch.equal(sampler.pipeline.denoiser(*arguments), learner(*arguments))
    assert not any(p.requires_grad for p in sampler.pipeline.denoiser.parameters())


def test_a_frozen_base_is_held_in_bfloat16_and_adapters_in_float32(folder):
    denoiser = training_form(folder, config_of(folder), "pretrain", torch.bfloat16)
    trained = trainable(denoiser)
    assert all(p.dtype is torch.float32 for p in trained.values())
    assert all(p.dtype is torch.bfloat16 for name, p in denoiser.named_parameters() if name not in trained)
    arguments = inputs(denoiser, folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = denoiser(*arguments)
    assert out.dtype is torch.float32
    with torch.no_grad():
        assert torch.allclose(out, load_denoiser(folder)(*arguments), atol=0.1 * float(out.abs().max()))
    out.square().mean().backward()
    assert all(p.grad is not None for p in trained.values())


def test_our_own_network_takes_adapters_too(tmp_path):
    from rlproxi.config.sections import Sampler, Schedule
    from rlproxi.models.text import build_text_encoder
    from rlproxi.models.unet import ProximalUNet

    unet = ProximalUNet(
        sample_size=16, patch=4, channels=(32,), blocks=(1,), attention=(True,), text_dim=32, pooled_dim=32
    )
    tiny_checkpoints.randomise(unet, 0)
    model = TextToImage(unet, build_text_encoder(PROMPTS, 32, 1, 12), Schedule(), Sampler(num_inference_steps=2))
    folder = model.save_pretrained(tmp_path / "model")
    denoiser = training_form(folder, config_of(folder), "rl")
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable(denoiser)}
    assert layers == {"qkv", "text_kv", "out"}
    with pytest.raises(ValueError, match="adapters need a saved base beside them"):
        lora.attach(model.denoiser, LoRA(rank=2))
        model.save_pretrained(tmp_path / "other")


def test_bad_adapters_are_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"model.lora.targets \['qq'\] name no layer of .*its linear layers end in .*to_q"
    ):
        lora.attach(load_denoiser(folder), LoRA(targets=["qq"]))
    model = TextToImage.from_pretrained(folder)
    lora.attach(model.denoiser, LoRA(rank=4))
    saved = model.save_pretrained(tmp_path / "saved")
    settings = saved / "lora" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "rank": 8}))
    with pytest.raises(ValueError, match="the adapter does not fit the network"):
        load_denoiser(saved)
    (saved / "lora" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="lora holds no usable adapter"):
        load_denoiser(saved)


def test_gradient_checkpointing_changes_no_gradient(folder):
    grads = []
    for checkpointing in (False, True):
        denoiser = training_form(folder, config_of(folder, gradient_checkpointing=checkpointing), "rl").train()
        shake(denoiser)
        denoiser(*inputs(denoiser, folder)).square().mean().backward()
        grads.append([p.grad for p in trainable(denoiser).values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))
