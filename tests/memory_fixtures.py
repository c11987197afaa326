"""Model folders of config.json files alone, and the memory that a real step takes."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from rlproxi.config import Config
from rlproxi.models.folders import published_shapes
from rlproxi.models.loading import empty_form, trainable
from rlproxi.models.precision import autocast

#: The published shapes.
SHAPES = {name: published_shapes(folder) for name, folder in (
    ("sd15", "stable-diffusion-v1-5"), ("sdxl", "stable-diffusion-xl-base-1.0"),
    ("sd3-medium", "stable-diffusion-3-medium"))}

_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "projection_dim": 32}
_VAE = {"block_out_channels": [32] * 4, "norm_num_groups": 8, "layers_per_block": 1}
_SMALL = {
    "sd15": {
        "unet": {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32,
                 "attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "vae": _VAE, "text_encoder": _CLIP},
    "sd3-medium": {
        "transformer": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 96,
                        "caption_projection_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 24},
        "vae": _VAE, "text_encoder": _CLIP, "text_encoder_2": _CLIP,
        "text_encoder_3": {"d_model": 96, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 1}},
}


def small_folder(name: str, folder: Path) -> Path:
    """A small model of the kind ``name`` (sd15 or sd3-medium), config.json files without weights."""
    shutil.copytree(SHAPES[name], folder)
    for part, values in _SMALL[name].items():
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def real_network(config: Config, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """What ``config`` trains, with random weights, and gradients of zero."""
    network = empty_form(config, "rl", dtype).to_empty(device=device)
    with torch.no_grad():
        for x in [*network.parameters(), *network.buffers()]:
            x.normal_(0, 0.02)
    for p in trainable(network).values():
        p.grad = torch.zeros_like(p)
    return network


def real_step(losses, dtype: torch.dtype, device: str = "cpu") -> None:
    """One of the learner's losses and its backward."""
    with autocast(dtype, device):
        loss, _ = next(losses)
        loss.backward()


def profiled_peak(step) -> int:
    """Bytes allocated at the worst moment of ``step()`` on the CPU beyond those before it, by torch's profiler.

    The profiler remembers the blocks of an earlier profile of the same process: garbage of one, collected during
    ``step()``, would be taken off ours. So it is collected before, and none is during the step.
    """
    from torch.profiler import ProfilerActivity, profile

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        if collects:
            gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
