"""Checkpoints in open_clip's names, loaded into transformers' CLIP.

open_clip itself needs torchvision, which the core does without. The two libraries hold the same network: open_clip
keeps queries, keys and values in one matrix and its projections transposed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .clip import SIZES
from .weights import fill, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

#: Vision widths whose heads are not 64 wide, from open_clip's model configs (H-14, g-14, bigG-14).
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}

_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    **{
        f"{ours}.{part}": f"{theirs}.{part}"
        for part in ("weight", "bias")
        for ours, theirs in (
            ("visual.ln_pre", "vision_model.pre_layrnorm"),
            ("visual.ln_post", "vision_model.post_layernorm"),
            ("ln_final", "text_model.final_layer_norm"),
        )
    },
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def open_clip_config(state_dict: dict[str, Tensor], config: dict[str, Any] | None = None) -> CLIPConfig:
    """transformers' CLIPConfig of a checkpoint in open_clip's names, read off its shapes.

    Shapes do not tell the width of a head nor the activation. They follow open_clip's published configs: heads are
    64 wide, in the vision towers H-14, g-14 and bigG-14 80, 88 and 104; the activation is GELU. ``config``, in
    open_clip's layout, overrides them: ``vision_cfg.head_width``, ``text_cfg.heads``, ``quick_gelu``.

    Raises ValueError where a tensor is missing that the sizes are read from.
    """
    from transformers import CLIPConfig

    config = config or {}
    try:
        patches = state_dict["visual.conv1.weight"].shape
        positions, width = state_dict["visual.positional_embedding"].shape
        context, text_width = state_dict["positional_embedding"].shape
        vocabulary = len(state_dict["token_embedding.weight"])
        embed = state_dict["text_projection"].shape[1]
        inner = [state_dict[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"].shape[0] for tower in ("visual.", "")]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"this is no open_clip checkpoint of a ViT: {error} is missing or of another shape; it holds "
            f"{', '.join(list(state_dict)[:5])}, ..."
        ) from None
    head = config.get("vision_cfg", {}).get("head_width") or _HEAD_WIDTHS.get(width, 64)
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    shared = {"projection_dim": embed, "hidden_act": activation}
    towers = [
        (width, inner[0], max(1, width // head), _layers(state_dict, "visual.")),
        (
            text_width,
            inner[1],
            config.get("text_cfg", {}).get("heads") or max(1, text_width // 64),
            _layers(state_dict),
        ),
    ]
    vision, text = ({**dict(zip(SIZES, tower, strict=True)), **shared} for tower in towers)
    vision |= {"patch_size": patches[-1], "image_size": math.isqrt(positions - 1) * patches[-1]}
    text |= {"vocab_size": vocabulary, "max_position_embeddings": context}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    return CLIPConfig(projection_dim=embed, vision_config=vision, text_config=text)


def _layers(state_dict: dict[str, Tensor], tower: str | None = None) -> int:
    found = (_BLOCK.fullmatch(key) for key in state_dict)
    return 1 + max(int(match[2]) for match in found if match and match[1] == tower)


def open_clip_to_transformers(
    state_dict: dict[str, Tensor], config: dict[str, Any] | None = None
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """A checkpoint in open_clip's names -> (transformers' CLIPConfig, the state dict of its CLIPModel).

    Keys without a counterpart keep their names, so that loading names them. ``config``: as in ``open_clip_config``.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        match = _BLOCK.fullmatch(key)
        if key in _OUTER:
            renamed[_OUTER[key]] = value.T.contiguous() if key in ("visual.proj", "text_projection") else value
        elif match:
            layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
            name, part = match[3].rsplit(".", 1)
            if match[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for letter, third in zip("qkv", value.chunk(3), strict=False):
                    renamed[f"{layer}.self_attn.{letter}_proj.{part.removeprefix('in_proj_')}"] = third.contiguous()
            else:
                renamed[f"{layer}.{_INNER.get(name, name)}.{part}"] = value
        else:
            renamed[key] = value
    return open_clip_config(state_dict, config), renamed


def load_open_clip(file: str | Path, config: dict[str, Any] | None = None) -> CLIPModel:
    """transformers' CLIPModel, float32, from a torch file {"state_dict": weights in open_clip's names}.

    Raises ValueError for a file that is damaged, that holds something else, or whose weights do not fit.
    """
    return clip_model(*open_clip_to_transformers(read_tensors(file, "state_dict"), config), file)


def clip_model(config: CLIPConfig, weights: dict[str, Tensor], file: str | Path) -> CLIPModel:
    """CLIPModel of ``config`` with exactly ``weights``, in float32."""
    from transformers import CLIPModel

    with torch.device("meta"):
        model = CLIPModel(config)
    fill(model, weights, file, "a CLIP of the sizes it shows")
    for part in (model.text_model.embeddings, model.vision_model.embeddings):  # not among the weights
        part.position_ids = torch.arange(part.position_ids.shape[-1])[None]
    return model
