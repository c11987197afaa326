"""Loading of transformers' models for captions and hands, with errors that name the config key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...rewards.hub import reason


def check_name(name: str, key: str) -> None:
    """Raise FileNotFoundError for a name that is neither a folder nor a hub id (owner/name)."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"{key}: {name!r} is neither a folder on this machine nor a hub id (owner/name)")


def load(name: str, key: str, load_one: Callable[[str], Any]) -> Any:
    """Return ``load_one(name)``. Raises FileNotFoundError or ValueError, naming ``key``, if transformers fails."""
    check_name(name, key)
    try:
        return load_one(name)
    except Exception as error:  # transformers, its hub client and its processors have no common ancestor
        if Path(name).is_dir():
            raise ValueError(f"{key}: {name!r} cannot be loaded ({reason(error)})") from None
        message = f"{name!r} is not on this machine and cannot be downloaded ({reason(error)})"
        raise FileNotFoundError(f"{key}: {message}; download it elsewhere and set {key} to its path") from None
