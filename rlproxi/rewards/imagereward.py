"""ImageReward (arXiv 2304.05977): human preference for an image given its prompt, differentiable in the pixels.

Definition: ``ImageReward.score`` in the authors' repository THUDM/ImageReward. The network is in ``blip``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..models.precision import autocast
from .base import TorchScorer, distinct, register
from .blip import load_network
from .hub import checkpoint_file, model_folder

#: The mean and standard deviation that the published model takes out of the reward.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

#: Tokens of a prompt, with [CLS] and [SEP]; longer ones are cut, shorter ones padded.
MAX_TOKENS = 35

#: CLIP's channel means and standard deviations, which the authors normalise with.
CHANNEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
CHANNEL_STD = (0.26862954, 0.26130258, 0.27577711)


@register("imagereward")
class ImageRewardScorer(TorchScorer):
    """The authors' ImageReward-v1.0: an unbounded score, higher is better, shifted and scaled by their constants.

    Args:
        checkpoint: the authors' ImageReward.pt; None downloads it from the hub (THUDM/ImageReward). The sizes of the
            network are read off its shapes.
        tokenizer: BERT's uncased WordPiece vocabulary: a folder with vocab.txt, or a hub repository.
        options: device, precision, micro_batch (``TorchScorer``). In bfloat16 the towers' matrix products are computed
            and their weights held in it; norms and the head stay float32.

    Raises:
        FileNotFoundError: no such file or folder, or it cannot be downloaded.
        ValueError: not this network's weights, or a vocabulary of another length than its embedding.
    """

    def __init__(self, checkpoint: str | None = None, tokenizer: str = "bert-base-uncased", **options: Any):
        vocabulary = model_folder(tokenizer, "tokenizer", weights=False)  # before the weights: an error shows at once
        file = checkpoint_file(checkpoint, "THUDM/ImageReward", "ImageReward.pt")
        network = load_network(file)
        self.tokenizer = load_tokenizer(vocabulary, network.sizes.vocabulary)
        super().__init__(network, files=[file], **options)
        network.hold_in(self.dtype)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, 35] each, on ``device``; a prompt that repeats is tokenised once."""
        texts, places = distinct(prompts)
        found = self.tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return found["input_ids"][places].to(self.device), found["attention_mask"][places].to(self.device)

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} images came with {len(prompts)} prompts; there must be one for each")
        images = preprocess(pixels, self.model.sizes.image)
        with autocast(self.dtype, self.device):
            features = self.model(images, *self.tokens(prompts))
        return (self.model.raw_rewards(features) - MEAN) / STD


def preprocess(pixels: Tensor, size: int = 224) -> Tensor:
    """float32 [B, 3, H, W] in [0, 1] -> [B, 3, size, size], normalised by CLIP's statistics; differentiable.

    The authors' steps: bicubic resize (antialiased) of the shorter side to ``size``, centre crop, normalise. Theirs
    runs on PIL images, which are rounded to 1/255 after the horizontal and again after the vertical pass; this one does
    not round, so before the normalisation a pixel differs by at most 1.1/255, 0.3/255 on average, measured over
    white noise (tests/rewards/test_imagereward.py). Where the shorter side is ``size`` already,
    both are exact. Overshoots of the filter are cut at 0 and 1 after each pass, as 8 bit images cut them; so a pixel
    that is cut passes no gradient on. Aspect ratios other than 1 lose their ends to the crop.
    """
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if short != size:
        target = [size * side // short for side in (height, width)]
        for shape in ((height, target[1]), target):
            pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    # Halves are rounded to the even neighbour, as Python's round does and thereby torchvision's centre crop.
    top, left = (round((side - size) / 2) for side in pixels.shape[-2:])
    pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_STD))
    return (pixels - mean) / std


def load_tokenizer(folder: Path, vocabulary: int):
    """BERT's uncased tokenizer with BLIP's two additional tokens [DEC] and [ENC] at its end.

    The score begins a prompt with [CLS], as BERT does: neither of the two is put there. They matter only in that a
    prompt that spells one out keeps it whole, and for the length of the embedding.

    Raises ValueError if it cannot be read, or its length is not ``vocabulary``.
    """
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"tokenizer {str(folder)!r} cannot be loaded: {error}; it must be a folder with the vocab.txt "
                         "of bert-base-uncased") from None
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(f"tokenizer {str(folder)!r} has {len(tokenizer)} tokens with [DEC] and [ENC], the checkpoint "
                         f"embeds {vocabulary}; ImageReward needs the vocabulary of bert-base-uncased")
    return tokenizer
