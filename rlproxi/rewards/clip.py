"""What the CLIP scorers share: images as CLIP expects them, and the two towers' features.

Two published ways to make an image of any size 224x224 disagree by more than the scores of good and bad images do,
so each scorer uses its authors':

- ``longest_side``: HPSv2. The whole image, padded.
- ``shortest_side``: OpenAI's CLIP, transformers' CLIPProcessor. The middle square.

Both take float pixels [B, 3, H, W] in [0, 1], return the normalised [B, 3, size, size] and are differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.precision import autocast
from .base import TorchScorer, distinct, hold_in
from .clip_text import ClipTokens

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

#: Mean and standard deviation of the pixels CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

#: Arguments of transformers' CLIPConfig that say how large a tower is.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
#: Arguments of transformers' CLIPConfig where OpenAI's ViT-L/14 and LAION's ViT-H/14 differ.
VIT_L_14: dict[str, Any] = {
    "vision": dict(zip(SIZES, (1024, 4096, 16, 24), strict=True)),
    "text": dict(zip(SIZES, (768, 3072, 12, 12), strict=True)),
    "shared": {"projection_dim": 768, "hidden_act": "quick_gelu"},
}
VIT_H_14: dict[str, Any] = {
    "vision": dict(zip(SIZES, (1280, 5120, 16, 32), strict=True)),
    "text": dict(zip(SIZES, (1024, 4096, 16, 24), strict=True)),
    "shared": {"projection_dim": 1024, "hidden_act": "gelu"},
}
_Clip = TypeVar("_Clip", bound="ClipScorer")


def published_config(sizes: Mapping[str, Any]) -> CLIPConfig:
    """transformers' CLIPConfig of ``VIT_L_14`` or ``VIT_H_14``."""
    from transformers import CLIPConfig

    shared = sizes["shared"]
    words = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    return CLIPConfig(
        projection_dim=shared["projection_dim"],
        vision_config={**sizes["vision"], "image_size": 224, "patch_size": 14, **shared},
        text_config={**sizes["text"], **words, **shared},
    )


def normalise(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> (pixels - mean) / std, CLIP's."""
    mean, std = (torch.tensor(x, dtype=pixels.dtype, device=pixels.device)[:, None, None] for x in (MEAN, STD))
    return (pixels - mean) / std


def longest_side(pixels: Tensor, size: int = 224, antialias: bool = True) -> Tensor:
    """HPSv2's: bicubic resize until the longest side is ``size``, zero padding to a square, then normalisation.

    The definition is the authors' package (hpsv2/src/open_clip/transform.py): the sides are rounded to even at a half,
    the larger half of the padding is right and below, and it is black before it is normalised. The package resizes
    tensors, not PIL images, so overshoots beyond [0, 1] stay, and whether it smooths when it shrinks is left to
    torchvision's default: it does from torchvision 0.17 on, and did not before (``antialias=False``).
    """
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=antialias)
    left, top = (size - width) // 2, (size - height) // 2
    return normalise(F.pad(pixels, (left, size - width - left, top, size - height - top)))


def shortest_side(pixels: Tensor, size: int = 224, eight_bit: bool = True, crop_down: bool = False) -> Tensor:
    """CLIP's own: bicubic resize until the shortest side is ``size``, the middle square, then normalisation.

    The definitions are openai/CLIP's ``_transform`` and transformers' PIL image processor. They differ in one thing:
    of an odd number of pixels to cut, openai/CLIP (torchvision) rounds the half to even, transformers always down.

    Args:
        eight_bit: Both resize PIL images, whose pixels are rounded to 8 bits twice, after the horizontal and the
            vertical pass. True gives the same values, and a gradient that passes the rounding unchanged. False is
            smooth, and off by about half an 8-bit step.
        crop_down: cut as transformers does.
    """
    height, width = pixels.shape[-2:]
    short = min(height, width)
    new_height, new_width = (size if side == short else int(size * side / short) for side in (height, width))
    if eight_bit:
        pixels = pillow_resize(pixels, new_height, new_width)
    elif (new_height, new_width) != (height, width):
        pixels = F.interpolate(pixels, (new_height, new_width), mode="bicubic", antialias=True)
    top, left = ((side - size) // 2 if crop_down else round((side - size) / 2) for side in (new_height, new_width))
    return normalise(pixels[..., top : top + size, left : left + size])


def pillow_resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resize as Pillow's for 8-bit images, to the last bit, with a gradient.

    Pillow's weights are multiples of 2^-22 and its sums integers; both are exact in float64.
    """
    levels = _to_levels(pixels.double() * 255)
    if width != pixels.shape[-1]:
        levels = _to_levels(levels @ _pillow_weights(pixels.shape[-1], width).to(pixels.device).T)
    if height != pixels.shape[-2]:
        levels = _to_levels(_pillow_weights(pixels.shape[-2], height).to(pixels.device) @ levels)
    return (levels / 255).to(pixels.dtype)


def _to_levels(values: Tensor) -> Tensor:
    """Rounded, halves up, into 0 ... 255; the gradient is passed through."""
    return values + ((values + 0.5).floor().clamp(0, 255) - values).detach()


@lru_cache(maxsize=64)
def _pillow_weights(old: int, new: int) -> Tensor:
    """float64 [new, old]: the share of each old pixel in each new one (Pillow's Resample.c, BICUBIC).

    The kernel (Keys, a = -1/2) is stretched by the factor of shrinking, cut off at the border and normalised.
    """
    factor = old / new
    stretch = max(factor, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * factor
    place = np.arange(old)[None]
    inside = (place >= np.floor(np.maximum(centre - 2 * stretch + 0.5, 0))) & (
        place < np.floor(np.minimum(centre + 2 * stretch + 0.5, old))
    )
    x = np.abs((place - centre + 0.5) / stretch)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(inside, np.where(x < 1, near, np.where(x < 2, far, 0)), 0)
    weights = weights / weights.sum(1, keepdims=True) * 2**22
    with torch.inference_mode(False):  # kept, perhaps for a later call with gradients
        return torch.from_numpy(np.trunc(weights + np.copysign(0.5, weights)) / 2**22)


def unit(features: Tensor) -> Tensor:
    """Each row divided by its L2 norm, in float32 (float64 stays what it is)."""
    return F.normalize(features if features.dtype is torch.float64 else features.float(), dim=-1)


class ClipScorer(TorchScorer):
    """A scorer on transformers' CLIP; a subclass hands its model to ``__init__`` and then its tokens to ``_ready``."""

    model: CLIPModel
    tokens: ClipTokens
    #: The published network: ``VIT_L_14`` or ``VIT_H_14``.
    published: ClassVar[Mapping[str, Any]]

    @classmethod
    def without_weights(cls: type[_Clip], params: Mapping[str, Any], image_size: int, device: str) -> _Clip | None:
        """The network of the folder ``clip``, else the published one; None where ``clip`` is no folder here."""
        from transformers import CLIPConfig, CLIPModel

        folder = params.get("clip")
        if folder is not None and not (Path(folder) / "config.json").is_file():
            return None
        config = published_config(cls.published) if folder is None else CLIPConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = CLIPModel(config)
        scorer = cls.on_meta(model, params, device)
        scorer.tokens = ClipTokens(lambda texts: [[1]] * len(texts), 0, 2)
        return scorer

    def _ready(self, tokens: ClipTokens | None) -> None:
        """Keeps the tokenizer, if the scorer reads prompts, and the weights in the precision they are used in."""
        if tokens is not None:
            self.tokens = tokens
        hold_in(self.dtype, self.model)

    @property
    def size(self) -> int:
        """Height and width in pixels of the images the tower takes."""
        config: Any = self.model.config.vision_config  # transformers types it as a dict as well
        return config.image_size

    def image_features(self, images: Tensor) -> Tensor:
        """Pre-processed images [B, 3, size, size] -> unit features float32 [B, D]."""
        with autocast(self.dtype, self.device):
            pooled = self.model.vision_model(pixel_values=images).pooler_output
            features = self.model.visual_projection(pooled)
        return unit(features)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> unit features float32 [B, D]; equal prompts are encoded once."""
        texts, index = distinct(prompts)
        with autocast(self.dtype, self.device):
            ids = self.tokens(texts).to(self.device)
            pooled = self.model.text_model(input_ids=ids).pooler_output
            features = self.model.text_projection(pooled)
        return unit(features)[index]

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pre-processed images and their prompts -> cosine of each pair, float32 [B]."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; each image needs its own")
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)
