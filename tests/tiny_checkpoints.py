"""Tiny random checkpoints, saved by diffusers' own pipelines: folders of exactly the published layout.

Every weight is random, also those that start at zero, so that no part of a network can be left out unnoticed.
Images are 64x64 pixels, latents 8x8.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

import clip_fixtures

WIDTH = 32  #: of every CLIP text model and of PixArt's T5
T5_WIDTH = 96  #: of SD3's T5: wider than its two CLIPs together (64), as 4096 > 768 + 1280


def sd15(folder: str | Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """StableDiffusionPipeline: PNDM as v1.5 is published; with ``v_prediction`` DDIM, as v2.1."""
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    kind, options = (PNDMScheduler, {"skip_prk_steps": True}) if prediction_type == "epsilon" else (
        DDIMScheduler, {"clip_sample": False})
    scheduler = kind(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                     set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type, **options)
    tokenizer = clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        parts = {"unet": unet, "vae": vae(), "text_encoder": CLIPTextModel(clip_config(len(tokenizer)))}
    return _save(StableDiffusionPipeline, folder, seed, parts, tokenizer=tokenizer, scheduler=scheduler,
                 safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sdxl(folder: str | Path, seed: int = 0, force_zeros_for_empty_prompt: bool = True) -> Path:
    """StableDiffusionXLPipeline: two text encoders, text_time conditioning, more than one layer in a transformer."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    scheduler = EulerDiscreteScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                                       beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=2 * WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH)
        parts = {"unet": unet, "vae": vae(scaling_factor=0.13025, force_upcast=True),
                 "text_encoder": CLIPTextModel(clip_config(len(tokenizer))),
                 "text_encoder_2": CLIPTextModelWithProjection(clip_config(len(tokenizer), hidden_act="gelu"))}
    return _save(StableDiffusionXLPipeline, folder, seed, parts, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
                 scheduler=scheduler, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, add_watermarker=False)


def sd3(folder: str | Path, seed: int = 0, with_t5: bool = True) -> Path:
    """StableDiffusion3Pipeline: three text encoders, or two as it is often used, flow matching with shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer(256)
    with torch.random.fork_rng(devices=[]):
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2,
            attention_head_dim=16, joint_attention_dim=T5_WIDTH, caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH, pos_embed_max_size=12)
        parts = {"transformer": transformer,
                 "vae": vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                            use_post_quant_conv=False),
                 "text_encoder": CLIPTextModelWithProjection(clip_config(len(tokenizer))),
                 "text_encoder_2": CLIPTextModelWithProjection(clip_config(len(tokenizer), hidden_act="gelu")),
                 "text_encoder_3": t5(len(tokenizer_3), T5_WIDTH) if with_t5 else None}
    return _save(StableDiffusion3Pipeline, folder, seed, parts, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
                 tokenizer_3=tokenizer_3 if with_t5 else None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def pixart(folder: str | Path, seed: int = 0, sigma: bool = False, additional_conditions: bool = False) -> Path:
    """PixArtAlphaPipeline, or PixArtSigmaPipeline: T5 alone.

    ``additional_conditions``: resolution and aspect ratio as inputs and a sample_size of 128, as in alpha's 1024 model.
    """
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
    from diffusers import DPMSolverMultistepScheduler as Scheduler

    tokenizer = t5_tokenizer(512)
    heads = 3 if additional_conditions else 2  # the additional conditions divide the width by three
    with torch.random.fork_rng(devices=[]):
        transformer = PixArtTransformer2DModel(
            sample_size=128 if additional_conditions else 8, patch_size=2, in_channels=4, out_channels=8,
            num_layers=2, num_attention_heads=heads, attention_head_dim=16, cross_attention_dim=16 * heads,
            caption_channels=WIDTH, use_additional_conditions=additional_conditions)
        parts = {"transformer": transformer, "vae": vae(scaling_factor=0.13025 if sigma else 0.18215),
                 "text_encoder": t5(len(tokenizer), WIDTH)}
    return _save(PixArtSigmaPipeline if sigma else PixArtAlphaPipeline, folder, seed, parts, tokenizer=tokenizer,
                 scheduler=Scheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"))


def vae(latent_channels: int = 4, scaling_factor: float = 0.18215, **options):
    """An AutoencoderKL of factor 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=latent_channels, scaling_factor=scaling_factor, block_out_channels=(32,) * 4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64,
        **options)


def clip_config(vocab_size: int, **options):
    """CLIPTextConfig of two layers; the ids of bos, pad and eos are the odd ones that are published."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=64, projection_dim=WIDTH,
                          num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77,
                          bos_token_id=0, pad_token_id=1, eos_token_id=2, **options)


def clip_tokenizer(pad_token: str = "<|endoftext|>"):
    """CLIP's byte pair encoding on a small vocabulary; second encoders pad with "!"."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=clip_fixtures.transformers_vocabulary(), merges=clip_fixtures.merges(),
                         pad_token=pad_token, model_max_length=77)


def t5(vocab_size: int, width: int):
    """A T5 v1.1 encoder (gated GELU) of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2,
                                   num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False))


def t5_tokenizer(max_length: int):
    """A Unigram model of letters and a few words; an unknown sign becomes <unk>."""
    from transformers import T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"
    words = ["▁a", "▁photo", "▁of", "▁the", "▁cat", "▁dog", "▁horse", "▁red", "▁on", "▁in", "ing", "er", "s"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *((x, -6.0) for x in letters),
              *((word, -3.0) for word in words)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


def randomise(module: nn.Module, seed: int) -> None:
    """Random weights of a size that keeps activations near 1, in the order of the parameters' names."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            value = torch.randn(weight.shape, generator=draw)
            if weight.ndim < 2:  # biases and norms
                weight.copy_(0.1 * value + float(not name.endswith("bias")))
            else:
                weight.copy_(value * weight[0].numel() ** -0.5)


def _save(kind, folder: str | Path, seed: int, parts: dict[str, nn.Module | None], **rest) -> Path:
    for i, part in enumerate(parts.values()):
        if part is not None:
            randomise(part.eval(), 1000 * seed + i)
    kind(**parts, **rest).save_pretrained(folder, safe_serialization=True)
    for name, part in rest.items():
        if type(part).__name__.startswith("CLIPTokenizer"):
            _as_published(Path(folder) / name)
    return Path(folder)


def _as_published(folder: Path) -> None:
    """CLIP's tokenizers are published as vocab.json and merges.txt, where today's transformers writes one file."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer.json").unlink()
