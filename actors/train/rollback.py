"""Rollbacks on disk, beside a stage's checkpoints: how many there were, and the checkpoint that was no good."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rlproxi.files import write_json

from . import checkpoints

_FILE = "rollbacks.json"


def count(root: Path) -> int:
    """How many rollbacks the stage had. Raises ValueError where the file that says so cannot be read."""
    file = root / _FILE
    if not file.is_file():
        return 0
    try:
        found = json.loads(file.read_text())["rollbacks"]
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise ValueError(f"rollbacks is {found!r}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not readable ({error}): it keeps the lowered learning rate; delete it to go on with the "
            "config's learning rate"
        ) from None


def remember(root: Path, rollbacks: int) -> None:
    """Writes the number of rollbacks, whole or not at all."""
    write_json(root / _FILE, {"rollbacks": rollbacks}, indent=None)


def set_aside(root: Path, warn: Callable[[str], None]) -> None:
    """Renames the newest usable checkpoint, from which training leads to NaN, so that the one before is the newest."""
    if found := checkpoints.latest(root, warn):
        folder, aside = found.folder, found.folder.with_name(f"spoilt-{found.folder.name}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        folder.rename(aside)
        warn(f"checkpoint {folder} is set aside as {aside.name}: training from there fails; going to the one before")
