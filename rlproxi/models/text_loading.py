"""Which text encoders a model folder holds, and loading them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from .checkpoint_files import load_network, read_json
from .text import TextEncoder
from .text_stacks import CACHE_BYTES, KINDS, SETTINGS, CheckpointText, TextSettings

ENDS = ("", "_2", "_3")


def load_text(
    folder: str | Path, dtype: torch.dtype | None = None, cache_bytes: int = CACHE_BYTES
) -> TextEncoder | CheckpointText:
    """The text side of a model folder: a published checkpoint's stack, one saved from it, or the built-in encoder.

    Args:
        folder: a diffusers pipeline's folder, or what ``save_pretrained`` of one of the classes wrote.
        dtype: of a stack's weights; None is float32. bfloat16 halves a T5-XXL to 9.5 GB. States are float32 anyway.
        cache_bytes: of encoded captions that a stack keeps.

    Raises FileNotFoundError naming what is missing, ValueError for encoders that are not known here or files that are
    damaged.
    """
    folder = Path(folder)
    found, settings = _look(folder)
    if settings is None:
        return TextEncoder.from_pretrained(folder)
    for end in found:
        if not (folder / f"tokenizer{end}").is_dir():
            raise FileNotFoundError(f"{folder / f'tokenizer{end}'} is missing, the tokenizer of text_encoder{end}")
    stack, parts = KINDS[settings.kind], {}
    for end, kind in zip(ENDS, stack.ENCODERS):
        tokenizer, encoder = folder / f"tokenizer{end}", folder / f"text_encoder{end}"
        parts[tokenizer.name] = _tokenizer(tokenizer) if end in found else None
        parts[encoder.name] = _encoder(encoder, kind, dtype or torch.float32) if end in found else None
    return stack(parts, settings, cache_bytes)


def text_widths(folder: str | Path) -> tuple[int, int]:
    """Widths of (states, pooled) that ``load_text(folder)`` will give, from the config files alone.

    Raises as ``load_text``.
    """
    folder = Path(folder)
    found, settings = _look(folder)
    configs = [read_json(folder / f"text_encoder{end}" / "config.json") for end in found]
    width = [values.get("hidden_size", values.get("d_model")) for values in configs]
    if settings is None or settings.kind == "clip":
        return width[0], width[0]
    if settings.kind == "sdxl":
        return sum(width), configs[1]["projection_dim"]
    if settings.kind == "sd3":
        return settings.t5_width, configs[0]["projection_dim"] + configs[1]["projection_dim"]
    return width[0], 0


def _look(folder: Path) -> tuple[list[str], TextSettings | None]:
    """(the ends of the names of the encoders' folders, their settings); no settings for the built-in encoder."""
    found = [end for end in ENDS if (folder / f"text_encoder{end}").is_dir()]
    if not found:
        raise FileNotFoundError(f"{folder / 'text_encoder'} is missing: not a diffusers-shaped model folder")
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    return found, _settings(folder, found, index)


def _settings(folder: Path, found: list[str], index: dict) -> TextSettings | None:
    """From our own file, else from the pipeline's class and the encoders'; None for the built-in encoder's folder."""
    classes = tuple(_class(folder / f"text_encoder{end}", index) for end in found)
    if (folder / SETTINGS).is_file():
        values = read_json(folder / SETTINGS)
        if set(values) != {x.name for x in fields(TextSettings)} or values["kind"] not in KINDS:
            raise ValueError(
                f"{folder / SETTINGS} is not of this version: its kind must be one of {', '.join(KINDS)}, "
                f"its other keys {', '.join(x.name for x in fields(TextSettings)[1:])}"
            )
        settings = TextSettings(**values)
        if classes not in _allowed(settings.kind) or found != list(ENDS[: len(found)]):
            raise ValueError(
                f"{folder} holds {_names(found, classes)}, which is not the text side of the kind "
                f"{settings.kind} that {SETTINGS} names"
            )
        return settings
    pipeline = str(index.get("_class_name", ""))
    if not pipeline.endswith("Pipeline") or pipeline == "ProxT2IPipeline":
        return None
    kinds = [kind for kind in KINDS if classes in _allowed(kind) and found == list(ENDS[: len(found)])]
    # Other pipelines too have one T5, but with lengths and captions of their own.
    if not kinds or (kinds == ["pixart"] and not pipeline.startswith("PixArt")):
        raise ValueError(
            f"{folder} is a {pipeline} with {_names(found, classes)}: its text side is not known here; "
            "known are those of Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3 and PixArt"
        )
    if kinds == ["sd3"]:  # diffusers' lengths, defaults of its pipelines
        return TextSettings("sd3", t5_length=256, t5_width=_t5_width(folder, found))
    if kinds == ["pixart"]:
        return TextSettings("pixart", t5_length=300 if "Sigma" in pipeline else 120)
    return TextSettings(kinds[0], zero_null=kinds == ["sdxl"] and index.get("force_zeros_for_empty_prompt", True))


def _allowed(kind: str) -> list[tuple[str, ...]]:
    """The encoders a kind may have: T5 may be left out of Stable Diffusion 3."""
    encoders = KINDS[kind].ENCODERS
    return [encoders, encoders[:-1]] if kind == "sd3" else [encoders]


def _names(found: list[str], classes: tuple[str, ...]) -> str:
    return ", ".join(f"text_encoder{end} of class {kind}" for end, kind in zip(found, classes))


def _class(folder: Path, index: dict) -> str:
    """The class that an encoder's folder was saved from."""
    named = (read_json(folder / "config.json").get("architectures") or [None])[0]
    return named or (index.get(folder.name) or [None, "?"])[1]


def _t5_width(folder: Path, found: list[str]) -> int:
    """The width of T5's states: its own, or what the denoiser wants in their place."""
    if "_3" in found:
        return read_json(folder / "text_encoder_3" / "config.json")["d_model"]
    return read_json(folder / "transformer" / "config.json")["joint_attention_dim"]


def _tokenizer(folder: Path):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers' Rust has an error without a class, and converters raise anything
        raise ValueError(
            f"{folder} is not a tokenizer that can be loaded here ({error}); one that is a spiece.model "
            "alone needs the package sentencepiece"
        ) from None


def _encoder(folder: Path, kind: str, dtype: torch.dtype):
    import transformers

    return load_network(getattr(transformers, kind), folder, "model", dtype=dtype)
