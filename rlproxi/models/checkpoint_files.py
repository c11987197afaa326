"""Reading a published checkpoint's folders, with errors that name the folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn


def read_json(file: Path) -> dict:
    """Raises FileNotFoundError or ValueError, naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: not a diffusers-shaped model folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def load_network(kind: type, folder: Path, stem: str, **options) -> nn.Module:
    """``kind.from_pretrained`` for a class of diffusers or transformers; safetensors only, nothing from the network.

    Args:
        stem: of the weights' file: diffusion_pytorch_model or model.

    Raises FileNotFoundError for a folder without weights, ValueError for damaged ones or ones that do not fill the
    network: what is missing would be left random.
    """
    from safetensors import SafetensorError

    variant = _variant(folder, stem)
    try:
        network, info = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, variant=variant,
                                             output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights are damaged or do not fit config.json ({error})") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: the weights do not fit config.json; missing: {', '.join(missing[:4])}"
                         f"{', ...' if len(missing) > 4 else ''}")
    return network


def _variant(folder: Path, stem: str) -> str | None:
    """None, or fp16 where only weights in half precision were downloaded."""
    for variant, names in ((None, (f"{stem}.safetensors", f"{stem}.safetensors.index.json")),
                           ("fp16", (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"))):
        if any((folder / name).is_file() for name in names):
            return variant
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors, the only kind of weights that is loaded")
