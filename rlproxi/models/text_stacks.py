"""The text encoders of published checkpoints: Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3, PixArt.

Each is a stack of tokenizers and text models, which gives what diffusers' ``encode_prompt`` gives.

A caption is encoded alone, never in a batch. In a batch its states would depend, in the last digits, on the other
captions, and rollout and learner have different ones. So encoded captions can also be cached.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import autocast
from .text import TextConditioning, TextStates, as_null, unknown_words

#: Bytes of encoded captions that are kept: 1,100 of Stable Diffusion 1, 425 of SDXL, 49 of Stable Diffusion 3.
CACHE_BYTES = 256 * 2**20
#: A file in a folder of our own, beside the encoders' folders: the settings that diffusers keeps in a pipeline's class.
SETTINGS = "text.json"
#: The ends of the names of the folders tokenizer*/ and text_encoder*/, in the order of a stack's encoders.
ENDS = ("", "_2", "_3")


@dataclass(frozen=True)
class TextSettings:
    """Settings of a stack that its folders do not hold.

    Attributes:
        kind: clip, sdxl, sd3 or pixart.
        t5_length: tokens of T5's input. t5_width: width of its states, for a stack without it.
        zero_null: the unconditional input is zero (SDXL), not the empty caption.
    """

    kind: str
    t5_length: int = 0
    t5_width: int = 0
    zero_null: bool = False


class CheckpointText(TextConditioning):
    """A frozen stack of text encoders.

    Args:
        parts: tokenizers and transformers models by the names of their folders; None for one left out.
        cache_bytes: of encoded captions that are kept on the CPU, the last used ones; 0 keeps none.
    """

    #: The classes of text_encoder, text_encoder_2, ...
    ENCODERS: tuple[str, ...] = ()

    def __init__(self, parts: dict[str, Any], settings: TextSettings, cache_bytes: int = CACHE_BYTES):
        self.parts = parts
        self.settings = settings
        self.cache_bytes = cache_bytes
        #: The encoded captions, the least recently used first.
        self.rows: dict[str, TextStates] = {}
        for model in self._parts("text_encoder"):
            model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes each part's folder and ``text.json``."""
        folder = Path(folder)
        for name, part in self.parts.items():
            if part is not None:
                part.save_pretrained(folder / name)
        self.save_settings(folder)

    def save_settings(self, folder: str | Path) -> None:
        """Writes ``text.json`` alone, for a folder that has the parts already."""
        file = Path(folder) / SETTINGS
        file.unlink(missing_ok=True)  # it may be a link to another model's
        file.write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")

    def components(self) -> dict[str, Any]:
        """The parts by the names of their folders, for model_index.json; None for one left out."""
        return dict(self.parts)

    def to(self, device: str | torch.device) -> CheckpointText:
        """Moves the text models."""
        for model in self._parts("text_encoder"):
            model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the text models are."""
        return next(iter(self._parts("text_encoder"))).device

    def unknown_words(self, prompt: str) -> list[str]:
        """The words no tokenizer can spell. CLIP's spell every word, by its bytes."""
        unknown = [unknown_words(tokenizer, prompt) for tokenizer in self._parts("tokenizer")]
        return [word for word in unknown[0] if all(word in words for words in unknown)]

    def encode(self, captions: Sequence[str]) -> TextStates:
        """As ``TextConditioning.encode``, on the stack's device. Raises ValueError for no captions."""
        if not captions:
            raise ValueError("no captions to encode: give at least one (an empty string is the unconditional one)")
        rows = {caption: self._known(caption) for caption in dict.fromkeys(captions)}
        return TextStates.join(*(rows[caption] for caption in captions)).to(self.device)

    def null_like(self, text: TextStates) -> TextStates:
        """The unconditional input, as many rows as ``text`` and on its device: the empty caption, or SDXL's zeros."""
        null = self._known("")
        if self.settings.zero_null:
            null = TextStates(torch.zeros_like(null.states), torch.zeros_like(null.pooled), null.mask)
        return as_null(null, text)

    def _known(self, caption: str) -> TextStates:
        row = self.rows.pop(caption, None)
        if row is None:
            # Kept beyond this call, perhaps for one with gradients; and the same under a caller's autocast.
            with torch.inference_mode(False), torch.no_grad(), autocast(torch.float32, self.device):
                states, pooled, mask = self._row(caption)
                row = TextStates(states.float().cpu(), pooled.float().cpu(), mask.float().cpu())
        self.rows[caption] = row
        size = row.states.nbytes + row.pooled.nbytes + row.mask.nbytes  # all rows of a stack have the same
        while len(self.rows) * size > self.cache_bytes:
            del self.rows[next(iter(self.rows))]
        return row

    @abstractmethod
    def _row(self, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        """(states [1, L, D], pooled [1, P], mask [1, L]) of one caption."""

    def _parts(self, kind: str) -> list[Any]:
        return [part for name, part in self.parts.items() if name.startswith(kind) and part is not None]

    def _tokens(self, tokenizer: str, caption: str, length: int) -> tuple[Tensor, Tensor]:
        """(ids, mask), each int64 [1, length]."""
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.parts[tokenizer]([caption], **options)
        return tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)

    def _clip(self, end: str, caption: str) -> Any:
        """Output of the CLIP text model text_encoder<end>. Published CLIPs attend to their padding."""
        model = self.parts["text_encoder" + end]
        # All CLIPs of a checkpoint have 77 positions; diffusers too takes the first tokenizer's number.
        ids, mask = self._tokens("tokenizer" + end, caption, self.parts["tokenizer"].model_max_length)
        attended = mask if getattr(model.config, "use_attention_mask", False) else None
        return model(input_ids=ids, attention_mask=attended, output_hidden_states=True)


class ClipText(CheckpointText):
    """Stable Diffusion 1 and 2: the last states of one CLIP."""

    ENCODERS = ("CLIPTextModel",)

    def _row(self, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        out = self._clip("", caption)
        return out.last_hidden_state, out.pooler_output, _ones(out.last_hidden_state)


class SdxlText(CheckpointText):
    """SDXL: the last but one states of two CLIPs side by side; pooled is the second one's text embedding."""

    ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")

    def _row(self, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        first, second = self._clip("", caption), self._clip("_2", caption)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return states, second.text_embeds, _ones(states)


class Sd3Text(CheckpointText):
    """Stable Diffusion 3: two CLIPs side by side, then T5, or zeros where its folder is left out."""

    ENCODERS = ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel")

    def _row(self, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        first, second = self._clip("", caption), self._clip("_2", caption)
        clip, t5 = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), self._t5(caption)
        states = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5.to(clip)], 1)
        return states, torch.cat([first.text_embeds, second.text_embeds], -1), _ones(states)

    def _t5(self, caption: str) -> Tensor:
        length, model = self.settings.t5_length, self.parts["text_encoder_3"]
        if model is None:
            return torch.zeros(1, length, self.settings.t5_width, device=self.device)
        return model(input_ids=self._tokens("tokenizer_3", caption, length)[0]).last_hidden_state


class PixartText(CheckpointText):
    """PixArt: T5 on the caption in lower case, with its mask; pooled is empty."""

    ENCODERS = ("T5EncoderModel",)

    def _row(self, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self._tokens("tokenizer", caption.lower().strip(), self.settings.t5_length)
        states = self.parts["text_encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        return states, states.new_zeros(1, 0), mask


KINDS: dict[str, type[CheckpointText]] = {"clip": ClipText, "sdxl": SdxlText, "sd3": Sd3Text, "pixart": PixartText}


def _ones(states: Tensor) -> Tensor:
    return states.new_ones(states.shape[:2])
