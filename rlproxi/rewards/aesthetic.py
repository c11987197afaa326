"""LAION's improved aesthetic predictor: how an image would be rated from 1 to 10, whatever its prompt.

The definition is christophschuhmann/improved-aesthetic-predictor, its file simple_inference.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.precision import autocast
from .clip import VIT_L_14, ClipScorer, shortest_side
from .clip_score import load_clip
from .registry import register
from .weights import fill, read_tensors

#: The widths of the predictor behind CLIP's 768 features.
WIDTHS = (768, 1024, 128, 64, 16, 1)


def aesthetic_head(file: str | Path) -> nn.Sequential:
    """The predictor: five linear layers with nothing between them, float32.

    The authors train it with dropout and comment its activations out, so that in evaluation it is one affine map; it
    is kept as their layers, because that is what their file holds: ``layers.0``, ``.2``, ``.4``, ``.6``, ``.7``.

    Raises FileNotFoundError, or ValueError naming what does not fit.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"predictor {str(file)!r} is no file; it is sac+logos+ava1-l14-linearMSE.pth of "
            "github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    weights = {name.removeprefix("layers."): value for name, value in read_tensors(file).items()}
    with torch.device("meta"):
        head = nn.Sequential()
        for index, (a, b) in zip((0, 2, 4, 6, 7), pairwise(WIDTHS), strict=True):  # 1, 3 and 5 are dropout
            head.add_module(str(index), nn.Linear(a, b))
    fill(head, weights, file, "the 768-1024-128-64-16-1 predictor")
    return head


def _drop_text(model: nn.Module) -> None:
    """Drops CLIP's text tower: this scorer does not read prompts."""
    for name in ("text_model", "text_projection"):
        setattr(model, name, None)


@register("aesthetic")
class Aesthetic(ClipScorer):
    """Rating predicted from the unit features of CLIP ViT-L/14: about 1 to 10, photographs usually 4 to 7.

    Args:
        predictor: the authors' file sac+logos+ava1-l14-linearMSE.pth.
        clip: a folder with the transformers CLIPModel of ViT-L/14, or a hub id.
        eight_bit: whether the resized image is rounded to 8 bits as the authors' is (``shortest_side``).
        options: device, precision, micro_batch (``TorchScorer``).
    """

    file_parameters = ("predictor",)
    published = VIT_L_14
    published_parameters = 304_894_178

    def __init__(
        self, predictor: str, clip: str = "openai/clip-vit-large-patch14", eight_bit: bool = True, **options: Any
    ):
        head = aesthetic_head(predictor)
        model, files = load_clip(clip)
        if model.config.projection_dim != WIDTHS[0]:
            raise ValueError(
                f"clip {clip!r} has {model.config.projection_dim} features; the predictor takes the "
                f"{WIDTHS[0]} of ViT-L/14, openai/clip-vit-large-patch14"
            )
        _drop_text(model)
        super().__init__(model, [Path(predictor), *files], **options)
        self._ready(None)
        self.head = head.requires_grad_(False).to(self.device)  # stays float32: it makes the score
        self.eight_bit = eight_bit

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels; prompts are not used."""
        features = self.image_features(shortest_side(pixels, self.size, self.eight_bit))
        with autocast(torch.float32, self.device):  # off, whatever the caller computes in
            return self.head(features)[:, 0]

    @classmethod
    def without_weights(cls, params: Mapping[str, Any], image_size: int, device: str) -> Aesthetic | None:
        """As ``ClipScorer``'s, without the text tower and with the predictor."""
        scorer = super().without_weights(params, image_size, device)
        if scorer is not None:
            _drop_text(scorer.model)
            with torch.device("meta"):
                layers = [nn.Linear(a, b) for a, b in pairwise(WIDTHS)]
            scorer.head = nn.Sequential(*layers).requires_grad_(False)
        return scorer
