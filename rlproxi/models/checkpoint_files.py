"""Reading a published checkpoint's folders, with errors that name the folder."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

#: Keys of a config.json that give numbers of layers.
_LAYERS = ("blocks", "layers", "num_layers", "layers_per_block", "transformer_layers_per_block", "num_single_layers")


def read_json(file: Path) -> dict:
    """The JSON object in ``file``. Raises FileNotFoundError or ValueError, naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: not a diffusers-shaped model folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def check_weights(folder: Path) -> None:
    """Reads the headers of the safetensors files in ``folder``.

    Raises FileNotFoundError where there are none, ValueError naming a file that is damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file, the only kind of weights that is loaded")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}): copy or save the model again") from None


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Turns every error inside into a ValueError that names ``place``, but for FileNotFoundError and MemoryError."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError and str(place) in str(error):
            raise
        message = " ".join(str(error).split())[:500]
        raise ValueError(f"{place} cannot be loaded: {type(error).__name__}: {message}") from error


def load_network(kind: Any, folder: Path, stem: str, **options: Any) -> Any:
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
    except Exception as error:  # the libraries' own errors, and whatever unexpected values lead to
        raise ValueError(f"{folder}: the weights are damaged or do not fit config.json ({error})") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: the weights do not fit config.json; missing: {', '.join(missing[:4])}")
    return network


def _size_fits(kind: Any, folder: Path, stem: str, variant: str | None) -> None:
    """Raises ValueError where config.json asks for far more than the weights hold, before memory is taken for it."""
    from safetensors import safe_open

    message = f"{folder}: the weights are damaged or do not fit config.json"
    shapes: list[list[int]] = []
    for file in folder.glob(f"{stem}*.safetensors"):
        if (".fp16" in file.name) == (variant is not None):
            try:
                with safe_open(file, framework="pt") as found:
                    shapes += [found.get_slice(name).get_shape() for name in list(found.keys())]
            except Exception as error:
                raise ValueError(f"{message} ({error})") from None
    held, tensors = sum(math.prod(shape) for shape in shapes), len(shapes)
    values = read_json(folder / "config.json")
    # A loop over so many layers would not end.
    layers = [n for key in _LAYERS for n in _integers(values.get(key))]
    if max(layers, default=0) > tensors:
        raise ValueError(f"{message} ({max(layers)} layers of {tensors} tensors)")
    try:
        with torch.device("meta"):
            asked = sum(p.numel() for p in kind.from_config(values).parameters())
    except Exception as error:
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from None
    if asked > 2 * held + 10**6:
        raise ValueError(f"{message} (it asks for {asked} numbers, and they hold {held})")


def _integers(value: object) -> list[int]:
    """Those in a value or in its lists."""
    if isinstance(value, (list, tuple)):
        return [n for part in value for n in _integers(part)]
    return [value] if type(value) is int else []


def _variant(folder: Path, stem: str) -> str | None:
    """None, or fp16 where only weights in half precision were downloaded."""
    for variant, mark in ((None, ""), ("fp16", ".fp16")):
        names = (f"{stem}{mark}.safetensors", f"{stem}.safetensors.index{mark}.json")
        if any((folder / name).is_file() for name in names):
            return variant
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors, the only kind of weights that is loaded")
