"""Loads the text encoders of a model folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint_files import load_network
from .folders import ModelFolder
from .text import TextEncoder
from .text_stacks import CACHE_BYTES, ENDS, KINDS, CheckpointText

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_text(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, cache_bytes: int = CACHE_BYTES
) -> TextEncoder | CheckpointText:
    """The text encoders of a model folder: a published checkpoint's stack, one saved from it, or the built-in encoder.

    Args:
        folder: a diffusers pipeline's folder, or what ``save_pretrained`` of one of the classes wrote.
        dtype: of a stack's weights; None is float32. bfloat16 halves a T5-XXL to 9.5 GB. States are float32 anyway.
        cache_bytes: of encoded captions that a stack keeps.

    Raises FileNotFoundError naming what is missing, ValueError for encoders that are not supported or damaged files.
    """
    found = ModelFolder.at(folder)
    path, settings, ends = found.path, found.text, found.text_ends
    if settings is None:
        return TextEncoder.from_pretrained(path)
    for end in ends:
        if not (path / f"tokenizer{end}").is_dir():
            raise FileNotFoundError(f"{path / f'tokenizer{end}'} is missing, the tokenizer of text_encoder{end}")
    stack = KINDS[settings.kind]
    parts: dict[str, Any] = {}
    for end, kind in zip(ENDS, stack.ENCODERS, strict=False):
        tokenizer, encoder = path / f"tokenizer{end}", path / f"text_encoder{end}"
        parts[tokenizer.name] = _tokenizer(tokenizer) if end in ends else None
        parts[encoder.name] = _encoder(encoder, kind, dtype or torch.float32) if end in ends else None
    return stack(parts, settings, cache_bytes)


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers' Rust has an error without a class, and converters raise anything
        raise ValueError(
            f"{folder} is not a tokenizer that can be loaded here ({error}); one that is a spiece.model "
            "alone needs the package sentencepiece"
        ) from None


def _encoder(folder: Path, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    return load_network(getattr(transformers, kind), folder, "model", dtype=dtype)
