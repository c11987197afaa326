"""CLIP score (Hessel et al., arXiv 2104.08718): how well an image matches its prompt, and nothing about its beauty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .clip import VIT_L_14, ClipScorer, shortest_side
from .clip_text import load_tokens
from .hub import model_folder, reason, weight_files
from .registry import register

if TYPE_CHECKING:
    from transformers import CLIPModel


def load_clip(name: str) -> tuple[CLIPModel, list[Path]]:
    """The CLIPModel of the parameter ``clip``, a folder or hub id, and its weight files.

    Raises FileNotFoundError or ValueError.
    """
    from transformers import CLIPModel

    folder = model_folder(name, "clip")
    try:
        found: Any = CLIPModel.from_pretrained(folder, dtype="float32", output_loading_info=True)
    except Exception as error:  # safetensors, pickle, json and transformers each raise their own
        raise ValueError(f"clip {name!r}: {folder} holds no CLIP that transformers can load: {reason(error)}") from None
    model, loaded = found
    if loaded["missing_keys"]:  # transformers would draw them at random and only warn
        missing = sorted(loaded["missing_keys"])
        raise ValueError(f"clip {name!r}: {folder} lacks {len(missing)} of CLIP's weights, first {missing[0]!r}")
    return model, weight_files(folder)


@register("clip")
class ClipScore(ClipScorer):
    """scale x max(cosine of image and text features, 0), in [0, scale]; usually 15 to 40 at scale 100.

    100 is torchmetrics' definition and the usual one in papers on text-to-image models; the original paper's w is 2.5.
    Where the cosine is negative the score is 0 and its gradient too, which real CLIPs do not reach; ``clamp=False``
    is the plain cosine.

    Args:
        clip: a folder with a transformers CLIPModel, or a hub id.
        tokenizer: a folder, a hub id or a file like bpe_simple_vocab_16e6.txt.gz; None: that of ``clip``.
        scale: of the score.
        clamp: whether a negative cosine is a 0.
        eight_bit: whether the resized image is rounded to 8 bits as the authors' is (``shortest_side``).
        options: device, precision, micro_batch (``TorchScorer``).
    """

    checkpoint_parameter = "clip"
    published = VIT_L_14
    published_parameters = 427_616_513

    def __init__(
        self,
        clip: str = "openai/clip-vit-large-patch14",
        tokenizer: str | None = None,
        scale: float = 100.0,
        clamp: bool = True,
        eight_bit: bool = True,
        **options: Any,
    ):
        tokens = load_tokens(tokenizer or clip)
        super().__init__(*load_clip(clip), **options)
        self.scale, self.clamp, self.eight_bit = scale, clamp, eight_bit
        self._ready(tokens)

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels."""
        images = shortest_side(pixels, self.size, self.eight_bit, crop_down=True)
        cosines = self.scale * self.cosines(images, prompts)
        return cosines.clamp(min=0) if self.clamp else cosines

    @classmethod
    def parameter_count(cls, params: Mapping[str, Any]) -> int | None:
        """Another ``clip`` has another size."""
        return None if "clip" in params else cls.published_parameters
