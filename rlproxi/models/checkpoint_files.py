"""Reading a published checkpoint's folders, with errors that name the folder."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

#: Keys of a config.json that say how often a layer is there.
_LAYERS = ("blocks", "layers", "num_layers", "layers_per_block", "transformer_layers_per_block", "num_single_layers")


def read_json(file: Path) -> dict:
    """Raises FileNotFoundError or ValueError, naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: not a diffusers-shaped model folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Inside, whatever a library trips over is a ValueError that names ``place``: folders come from strangers, and
    loaders raise KeyError, AttributeError and their like for what they did not expect. FileNotFoundError stays."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError and str(place) in str(error):
            raise
        told = " ".join(str(error).split())[:500]
        raise ValueError(f"{place} cannot be loaded: {type(error).__name__}: {told}") from error


def load_network(kind: type, folder: Path, stem: str, **options) -> nn.Module:
    """``kind.from_pretrained`` for a class of diffusers or transformers; safetensors only, nothing from the network.

    Args:
        stem: of the weights' file: diffusion_pytorch_model or model.

    Raises FileNotFoundError for a folder without weights, ValueError for damaged ones or ones that do not fill the
    network: what is missing would be left random.
    """
    variant = _variant(folder, stem)
    if hasattr(kind, "load_config"):  # diffusers' and ours; transformers looks first by itself
        _size_fits(kind, folder, stem, variant)
    try:
        network, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True, **options
        )
    except Exception as error:  # the libraries' own, and what values that they did not expect lead to
        raise ValueError(f"{folder}: the weights are damaged or do not fit config.json ({error})") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder}: the weights do not fit config.json; missing: {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}"
        )
    return network


def _size_fits(kind: type, folder: Path, stem: str, variant: str | None) -> None:
    """Raises ValueError where config.json asks for far more than the weights hold, before memory is taken for it."""
    from safetensors import safe_open

    told, shapes = f"{folder}: the weights are damaged or do not fit config.json", []
    for file in folder.glob(f"{stem}*.safetensors"):
        if (".fp16" in file.name) == (variant is not None):
            try:
                with safe_open(file, framework="pt") as found:
                    shapes += [found.get_slice(name).get_shape() for name in found.keys()]
            except Exception as error:
                raise ValueError(f"{told} ({error})") from None
    held, tensors = sum(math.prod(shape) for shape in shapes), len(shapes)
    values = read_json(folder / "config.json")
    # A loop over so many layers would not end.
    layers = [n for key in _LAYERS for n in _integers(values.get(key))]
    if max(layers, default=0) > tensors:
        raise ValueError(f"{told} ({max(layers)} layers of {tensors} tensors)")
    try:
        with torch.device("meta"):
            asked = sum(p.numel() for p in kind.from_config(values).parameters())
    except Exception as error:
        raise ValueError(f"{told} ({type(error).__name__}: {error})") from None
    if asked > 2 * held + 10**6:
        raise ValueError(f"{told} (it asks for {asked} numbers, and they hold {held})")


def _integers(value: object) -> list[int]:
    """Those in a value or in its lists."""
    if isinstance(value, (list, tuple)):
        return [n for part in value for n in _integers(part)]
    return [value] if type(value) is int else []


def _variant(folder: Path, stem: str) -> str | None:
    """None, or fp16 where only weights in half precision were downloaded."""
    for variant, names in (
        (None, (f"{stem}.safetensors", f"{stem}.safetensors.index.json")),
        ("fp16", (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json")),
    ):
        if any((folder / name).is_file() for name in names):
            return variant
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors, the only kind of weights that is loaded")
