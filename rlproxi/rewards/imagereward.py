"""ImageReward (arXiv 2304.05977): human preference for an image given its prompt, differentiable in the pixels.

Definition: ``ImageReward.score`` in the authors' repository THUDM/ImageReward. The network is in ``blip``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.precision import autocast
from .base import TorchScorer, distinct, hold_in
from .blip import ImageRewardNetwork, Sizes, load_network
from .clip import shortest_side
from .hub import checkpoint_file, model_folder
from .registry import register

#: The mean and standard deviation that the published model takes out of the reward.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

#: The published network: BLIP with a ViT-L/16 image tower and a BERT-base text encoder.
PUBLISHED = Sizes(224, 16, 1024, 24, 4096, 768, 12, 3072, 30524, 512)

#: Tokens of a prompt, with [CLS] and [SEP]; longer ones are cut, shorter ones padded.
MAX_TOKENS = 35


@register("imagereward")
class ImageRewardScorer(TorchScorer):
    """The authors' ImageReward-v1.0: an unbounded score, higher is better, shifted and scaled by their constants.

    Args:
        checkpoint: the authors' ImageReward.pt; None downloads it from the hub (THUDM/ImageReward). The sizes of the
            network are read off its shapes.
        tokenizer: BERT's uncased WordPiece vocabulary: a folder with vocab.txt, or a hub repository.
        eight_bit: resize as the authors' PIL images are, rounded to 8 bits; see ``clip.shortest_side``.
        options: device, precision, micro_batch (``TorchScorer``). In bfloat16 the towers' matrix products are computed
            and their weights held in it; norms and the head stay float32.

    Raises:
        FileNotFoundError: no such file or folder, or it cannot be downloaded.
        ValueError: not this network's weights, or a vocabulary of another length than its embedding.
    """

    file_parameters = ("checkpoint",)
    published_parameters = 446_206_689

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer: str = "bert-base-uncased",
        eight_bit: bool = True,
        **options: Any,
    ):
        vocabulary = model_folder(tokenizer, "tokenizer", weights=False)  # before the weights: an error shows at once
        file = checkpoint_file(checkpoint, "THUDM/ImageReward", "ImageReward.pt")
        network = load_network(file)
        self.tokenizer = load_tokenizer(vocabulary, network.sizes.vocabulary)
        super().__init__(network, files=[file], **options)
        self.eight_bit = eight_bit
        hold_in(self.dtype, network.vision, network.text)  # the head stays float32

    model: ImageRewardNetwork

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, 35] each, on ``device``; a prompt that repeats is tokenised once."""
        texts, places = distinct(prompts)
        found = self.tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return found["input_ids"][places].to(self.device), found["attention_mask"][places].to(self.device)

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels."""
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} images came with {len(prompts)} prompts; there must be one for each")
        images = shortest_side(pixels, self.model.sizes.image, self.eight_bit)
        with autocast(self.dtype, self.device):
            features = self.model(images, *self.tokens(prompts))
        return (self.model.raw_rewards(features) - MEAN) / STD

    @classmethod
    def without_weights(cls, params: Mapping[str, Any], image_size: int, device: str) -> ImageRewardScorer:
        """The published network, whatever ``checkpoint`` names."""
        with torch.device("meta"):
            model = ImageRewardNetwork(PUBLISHED)
        scorer = cls.on_meta(model, params, device, model.vision, model.text)
        # In the place of the method: the tokenizer's files need not be here.
        vars(scorer)["tokens"] = lambda prompts: torch.ones(2, len(prompts), MAX_TOKENS, dtype=torch.long).unbind()
        return scorer


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
        raise ValueError(
            f"tokenizer {str(folder)!r} cannot be loaded: {error}; it must be a folder with the vocab.txt "
            "of bert-base-uncased"
        ) from None
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"tokenizer {str(folder)!r} has {len(tokenizer)} tokens with [DEC] and [ENC], the checkpoint "
            f"embeds {vocabulary}; ImageReward needs the vocabulary of bert-base-uncased"
        )
    return tokenizer
