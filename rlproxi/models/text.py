"""Text conditioning: a denoiser's text input, and one tokenizer and text model of transformers that make it.

``text_stacks`` has the same methods for the text encoders of published checkpoints.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..proximal.operator import Denoiser, ProximalOperator
from .precision import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextStates:
    """A denoiser's text input, float32: states [B, L, D], pooled [B, P], mask [B, L] (1 = token, 0 = padding).

    ``time_ids`` [B, 6] is SDXL's micro-conditioning (height and width of the original image, top and left of its crop,
    height and width of the target, in pixels); None where they are not known.
    """

    states: Tensor
    pooled: Tensor
    mask: Tensor
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.states.shape[0]

    def __getitem__(self, index: Any) -> TextStates:
        """The rows that ``index`` picks, as it does of a tensor's first dimension."""
        return self._each(lambda x: x[index])

    def repeat(self, count: int) -> TextStates:
        """Each row ``count`` times in a row: [B] -> [B * count]."""
        return self._each(lambda x: x.repeat_interleave(count, 0))

    def to(self, device: str | torch.device) -> TextStates:
        """The same states on ``device``."""
        return self._each(lambda x: x.to(device))

    @staticmethod
    def join(*parts: TextStates) -> TextStates:
        """Concatenates along the batch. Raises ValueError where only some parts have time_ids."""
        sizes = [part.time_ids for part in parts if part.time_ids is not None]
        if sizes and len(sizes) < len(parts):
            raise ValueError("text states with and without time_ids cannot be joined: give all of them, or none")
        columns = ([getattr(part, name) for part in parts] for name in ("states", "pooled", "mask"))
        states, pooled, mask = (torch.cat(column) for column in columns)
        return TextStates(states, pooled, mask, torch.cat(sizes) if sizes else None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextStates:
        sizes = None if self.time_ids is None else change(self.time_ids)
        return TextStates(change(self.states), change(self.pooled), change(self.mask), sizes)


class TextConditioning(ABC):
    """What losses and samplers need of a text encoder."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> TextStates:
        """Captions -> TextStates, without gradient and in the model's own precision, whatever the caller's autocast."""

    @abstractmethod
    def null_like(self, text: TextStates) -> TextStates:
        """The unconditional input, as many rows as ``text`` and on its device."""

    def groups(self, captions: Sequence[str], size: int) -> TextStates:
        """P captions -> P * size rows, each caption's rows side by side."""
        return self.encode(captions).repeat(size)


class TextEncoder(TextConditioning):
    """A frozen tokenizer and text model; without a ``pooler_output``, the mean of the states is the pooled vector."""

    KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")

    def __init__(self, tokenizer: Any, model: Any, max_length: int):
        self.tokenizer = tokenizer
        self.model = model.eval()
        self.max_length = max_length
        self._null: TextStates | None = None

    def components(self) -> dict[str, object]:
        """The parts by the names of their folders, for model_index.json."""
        return {"text_encoder": self.model, "tokenizer": self.tokenizer}

    def to(self, device: str | torch.device) -> TextEncoder:
        """Moves the text model."""
        self.model.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``folder``/tokenizer and ``folder``/text_encoder."""
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        self.model.save_pretrained(Path(folder) / "text_encoder")

    def unknown_words(self, prompt: str) -> list[str]:
        """The words the tokenizer has no token for: the model cannot tell them from each other."""
        return unknown_words(self.tokenizer, prompt)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask), each [B, L] int64, L = max_length."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def encode(self, captions: Sequence[str]) -> TextStates:
        """As ``TextConditioning.encode``."""
        ids, mask = self.tokenize(captions)
        device = next(self.model.parameters()).device
        # Rollout and learner enter their autocast at different places.
        with torch.no_grad(), autocast(torch.float32, device):
            out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        states = out.last_hidden_state.float()
        mask = mask.to(device).float()
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return TextStates(states, pooled.float(), mask)

    def null_like(self, text: TextStates) -> TextStates:
        """The unconditional input, the empty caption, as many rows as ``text`` and on its device."""
        if self._null is None:
            with torch.inference_mode(False):  # kept beyond this call, perhaps for one with gradients
                self._null = self.encode([""])
        return as_null(self._null, text)


def as_null(row: TextStates, text: TextStates) -> TextStates:
    """The one unconditional ``row`` for every row of ``text``: on its device, with the same time_ids."""
    return replace(row.to(text.states.device).repeat(len(text)), time_ids=text.time_ids)


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of ``prompt`` that ``tokenizer`` cannot spell without its token for unknown ones."""
    words = re.findall(r"\w+", prompt)
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]]


def word_tokenizer(captions: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer over the words of ``captions``, as a transformers fast tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for c in captions for w in re.findall(r"\w+|[^\w\s]", c.lower())})
    vocab = {w: i for i, w in enumerate(["<pad>", "<bos>", "<unk>", *words, "<eos>"])}
    marks = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=max_length, **marks)


def build_text_encoder(
    captions: list[str], dim: int = 64, layers: int = 2, max_length: int = 40, seed: int = 0
) -> TextEncoder:
    """A new CLIP-shaped text encoder for the words of ``captions``; ``seed`` names its initial weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer(captions, max_length)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        projection_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=max(1, dim // 32),
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPTextModel(config)
    return TextEncoder(tokenizer, model, max_length)


def operator(denoiser: Denoiser, text: TextConditioning, guidance_scale: float) -> ProximalOperator:
    """The prox of a text-conditional denoiser, with ``text``'s unconditional input for guidance.

    Learner and sampler share it.
    """
    return ProximalOperator(denoiser, guidance_scale, lambda cond: TextStates.join(cond, text.null_like(cond)))
