"""ImageReward's network: BLIP's image tower, its text encoder that looks at the image, and a linear head.

The two towers are transformers' ``BlipVisionModel`` and ``BlipTextModel``; the authors' checkpoint names their weights
as timm's vision transformer and BLIP's ``med.py`` do. This module reads the sizes off the checkpoint's shapes and
renames its keys, so no config file is needed. Definition: the authors' repository THUDM/ImageReward
(``ImageReward/ImageReward.py`` and ``ImageReward/models/BLIP``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from .weights import fill, read_tensors

#: Width of one attention head. No shape tells the number of heads; ViT-B, ViT-L and BERT-base all have heads of 64.
HEAD_WIDTH = 64

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."

#: Authors' name -> transformers' name within the image tower, applied in turn; the text encoder's names agree already.
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a checkpoint tell of its network; ``*_mlp`` is the width inside a feed-forward block."""

    image: int
    patch: int
    vision_width: int
    vision_layers: int
    vision_mlp: int
    text_width: int
    text_layers: int
    text_mlp: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Sizes:
        """Reads them off ``weights`` (the authors' names). Raises ValueError where a weight is missing or odd."""

        def shape(name: str, dimensions: int) -> tuple[int, ...]:
            if name not in weights:
                raise ValueError(f"it has no weight {name!r}; its first keys are {sorted(weights)[:3]}")
            if weights[name].ndim != dimensions:
                raise ValueError(f"{name!r} has shape {list(weights[name].shape)}, not {dimensions} dimensions")
            return tuple(weights[name].shape)

        width, _, patch, _ = shape(VISION + "patch_embed.proj.weight", 4)
        tokens = shape(VISION + "pos_embed", 3)[1]
        if isqrt(tokens - 1) ** 2 != tokens - 1:
            raise ValueError(f"'{VISION}pos_embed' has {tokens} positions, not a square grid and one class token")
        vocabulary, text_width = shape(TEXT + "embeddings.word_embeddings.weight", 2)
        for tower, value in (("image", width), ("text", text_width)):
            if value % HEAD_WIDTH:
                raise ValueError(f"its {tower} tower is {value} wide, no multiple of {HEAD_WIDTH}, the width of a head")
        return cls(
            image=isqrt(tokens - 1) * patch,
            patch=patch,
            vision_width=width,
            vision_layers=_count(weights, VISION + "blocks."),
            vision_mlp=shape(VISION + "blocks.0.mlp.fc1.weight", 2)[0],
            text_width=text_width,
            text_layers=_count(weights, TEXT + "encoder.layer."),
            text_mlp=shape(TEXT + "encoder.layer.0.intermediate.dense.weight", 2)[0],
            vocabulary=vocabulary,
            positions=shape(TEXT + "embeddings.position_embeddings.weight", 2)[0],
        )


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers the keys ``<prefix><number>...`` name."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


class ImageRewardNetwork(nn.Module):
    """Pre-processed images and tokens -> features; ``raw_rewards`` makes one number of them."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.sizes = sizes
        # timm's vision transformer has layer norms of 1e-6, BERT of 1e-12; transformers' BLIP defaults to 1e-5 for the
        # former. Both towers use the exact GELU.
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=sizes.vision_width,
                intermediate_size=sizes.vision_mlp,
                image_size=sizes.image,
                num_hidden_layers=sizes.vision_layers,
                num_attention_heads=sizes.vision_width // HEAD_WIDTH,
                patch_size=sizes.patch,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        # is_decoder builds the cross-attention; the attention over the text stays bidirectional, as forward() is not
        # asked for a decoder's.
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=sizes.vocabulary,
                hidden_size=sizes.text_width,
                encoder_hidden_size=sizes.vision_width,
                intermediate_size=sizes.text_mlp,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_width // HEAD_WIDTH,
                max_position_embeddings=sizes.positions,
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                is_decoder=True,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
                sep_token_id=None,
            ),
            add_pooling_layer=False,
        )
        # The authors' head: linear layers with dropout between them and, as published, no activation.
        self.head = nn.Sequential(
            nn.Linear(sizes.text_width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], normalised -> the class token and every patch after the last norm, [B, 1 + P, Dv]."""
        return self.vision(pixel_values=images).last_hidden_state

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """images [B, 3, S, S], tokens and mask int64 [B, L] -> the state at [CLS], having seen the image, [B, Dt].

        No mask over the image: all of its tokens are looked at.
        """
        states = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=self.image_features(images))
        return states.last_hidden_state[:, 0]

    def raw_rewards(self, features: Tensor) -> Tensor:
        """The head: features [B, Dt] -> float32 [B]. Not under autocast: near 1 a bfloat16 step is 0.008."""
        return self.head(features.to(next(self.head.parameters()).dtype))[:, 0]


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under this module's names.

    What the reward does not use is left out: the projections of BLIP's contrastive loss (``blip.vision_proj`` and
    ``blip.text_proj``), anything else outside the two towers and the head, and the buffer ``position_ids``.
    """
    found = {}
    for name, value in weights.items():
        if name.startswith(VISION):
            short = name[len(VISION) :]
            for pattern, new in _VISION_NAMES:
                short = re.sub(pattern, new, short)
            found["vision." + short] = value
        elif name.startswith(TEXT) and not name.endswith(".position_ids"):
            found["text." + name[len(TEXT) :]] = value
        elif name.startswith(HEAD):
            found["head." + name[len(HEAD) :].removeprefix("layers.")] = value
    return found


def network_from(weights: Mapping[str, Tensor], file: str | Path = "this checkpoint") -> ImageRewardNetwork:
    """The network that ``weights`` (the authors' names) belong to, holding them in float32.

    Raises ValueError that names ``file`` and the first weights that are missing, unexpected or of another shape.
    """
    try:
        sizes = Sizes.of(weights)
    except ValueError as error:
        raise ValueError(f"{file} is not an ImageReward checkpoint: {error}") from None
    with torch.device("meta"):  # neither memory nor time for random weights that are replaced at once
        network = ImageRewardNetwork(sizes)
    fill(network, renamed(weights), file, "ImageReward's network")
    network.text.embeddings.position_ids = torch.arange(sizes.positions)[None]
    return network


def load_network(file: str | Path) -> ImageRewardNetwork:
    """Reads the authors' ``ImageReward.pt``. Raises ValueError as ``read_tensors`` and ``network_from``."""
    return network_from(read_tensors(file), file)
