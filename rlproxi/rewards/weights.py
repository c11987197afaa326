"""Reading published checkpoints: torch files of plain tensors, into networks that were built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .hub import reason


def read_tensors(file: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict of a torch file, or the one under its ``key``. Runs no code that the file may hold.

    Raises ValueError for a file that is damaged, or that holds something else.
    """
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types for a file that is none of its own
        raise ValueError(f"{file} is not a torch checkpoint of plain tensors: {reason(error)}") from None
    weights = stored.get(key) if key is not None and isinstance(stored, dict) else stored
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        held = list(stored)[:5] if isinstance(stored, dict) else type(stored).__name__
        wanted = "state dict of tensors" if key is None else f"key {key!r} with tensors"
        raise ValueError(f"{file} has no {wanted}; it holds {held}")
    return weights


def fill(network: nn.Module, weights: Mapping[str, Tensor], file: str | Path, what: str) -> None:
    """Gives a network on the meta device exactly these weights, as float32, without ever holding random ones.

    Position ids, which some versions of transformers save, are neither needed nor given.

    Raises ValueError with ``file``, ``what`` was expected, and the weights that are missing, unexpected or of another
    shape.
    """
    wanted = {name: x.shape for name, x in network.state_dict().items() if not name.endswith(".position_ids")}
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "other shape": [
            f"{name} is {tuple(weights[name].shape)}, not {tuple(shape)}"
            for name, shape in wanted.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    if any(faults.values()):
        listed = [
            f"{fault}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for fault, names in faults.items()
            if names
        ]
        raise ValueError(f"{file} does not fit {what}; {'; '.join(listed)}")
    network.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False, assign=True)
