"""PickScore (Kirstain et al., arXiv 2305.01569): how a user of Pick-a-Pic would choose between images of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .clip import VIT_H_14, ClipScorer, shortest_side
from .clip_score import load_clip
from .clip_text import load_tokens
from .registry import register


@register("pickscore")
class PickScore(ClipScorer):
    """exp(logit_scale) x cosine of a ViT-H-14's image and text features, as yuvalkirstain/PickScore computes it.

    The logit scale's exponential is about 100, the most that CLIP's training lets it grow to, and scores are about 18
    to 24. The difference between two images is the log-odds that the first is preferred.

    Args:
        clip: a folder with a transformers CLIPModel, or a hub id.
        tokenizer: a folder, a hub id or a file like bpe_simple_vocab_16e6.txt.gz.
        eight_bit: whether the resized image is rounded to 8 bits as the authors' is (``shortest_side``).
        options: device, precision, micro_batch (``TorchScorer``).
    """

    checkpoint_parameter = "clip"
    published = VIT_H_14
    published_parameters = 986_109_441

    def __init__(
        self,
        clip: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        eight_bit: bool = True,
        **options: Any,
    ):
        tokens = load_tokens(tokenizer)
        super().__init__(*load_clip(clip), **options)
        self.eight_bit = eight_bit
        self._ready(tokens)

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels."""
        images = shortest_side(pixels, self.size, self.eight_bit, crop_down=True)
        return self.model.logit_scale.exp() * self.cosines(images, prompts)
