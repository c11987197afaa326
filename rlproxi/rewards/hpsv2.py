"""HPSv2 and HPSv2.1: how a person would choose between images of one prompt (Wu et al., arXiv 2306.09341).

The authors' package, tgxs002/HPSv2, is the definition. It scores one image at a time and loads its weights again at
every call; this scorer gives the same scores in batches, without its dependencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .clip import VIT_H_14, ClipScorer, longest_side
from .clip_text import load_tokens, open_clip_clean
from .hub import checkpoint_file
from .open_clip import load_open_clip
from .registry import register


@register("hpsv2", "hpsv2.1")
class HPSv21(ClipScorer):
    """Cosine of a ViT-H-14's image and text features, without logit scale: about 0.2 to 0.37, higher is better.

    Args:
        checkpoint: a file {"state_dict": weights in open_clip's names}; None downloads HPS_v2.1_compressed.pt of the
            hub repository xswu/HPSv2.
        tokenizer: a transformers folder, a hub id, or a file like bpe_simple_vocab_16e6.txt.gz. All give the same ids.
        antialias: whether shrinking smooths, as the authors' package does with torchvision 0.17 or later; False for
            scores comparable with those of an older torchvision.
        options: device, precision, micro_batch (``TorchScorer``).
    """

    #: The checkpoint's name in the hub repository.
    FILE: ClassVar[str] = "HPS_v2.1_compressed.pt"
    file_parameters = ("checkpoint",)
    published = VIT_H_14
    published_parameters = 986_109_441

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        **options: Any,
    ):
        tokens = load_tokens(tokenizer, open_clip_clean)  # before the weights: a wrong name shows at once
        file = checkpoint_file(checkpoint, "xswu/HPSv2", self.FILE)
        super().__init__(load_open_clip(file), [file], **options)
        self.antialias = antialias
        self._ready(tokens)

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels."""
        return self.cosines(longest_side(pixels, self.size, self.antialias), prompts)


@register("hpsv2.0")
class HPSv20(HPSv21):
    """The first HPSv2: the same network with the weights of HPS_v2_compressed.pt. Not comparable with v2.1's scores."""

    FILE = "HPS_v2_compressed.pt"
