"""Checkpoint folders in the run directory: written whole or not at all, checksummed, newest usable one first.

Only files: ``saving`` decides what is in them. Nothing here, and nothing that reads a checkpoint, unpickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlproxi import files

MARK = "complete.json"
#: What a full or failing disk raises; safetensors has an exception of its own for its writes.
WRITE_ERRORS = (OSError, SafetensorError)
_THREADS = 8  # hashlib lets go of the interpreter lock

#: [bytes, checksum] of a file, as a list because it is stored as JSON.
Seal = list[int | str]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, with ``step`` steps behind it.

    world: the number of ranks that wrote it, 0 where unknown. made_by: the circumstances of its run (see ``resume``),
    {} where unknown. files: name -> ``seal``.
    """

    folder: Path
    step: int
    world: int
    made_by: dict[str, Any]
    files: dict[str, Seal]


def scratch(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it has its name."""
    return root / f".writing-{step:06d}"


def begin(root: Path, step: int) -> Path:
    """A fresh scratch folder for the checkpoint of ``step``; ``finish`` gives it its name. Raises OSError."""
    folder = scratch(root, step)
    abandon(root)
    folder.mkdir(parents=True)
    return folder


def abandon(root: Path) -> None:
    """Removes what was begun and not finished, by this run or by one that was killed."""
    for folder in [*root.glob(".writing-*"), *root.glob(".dropped-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def digest(file: Path) -> str:
    """blake2b of a file's content, 32 bytes in hexadecimal."""
    return files.digest(file, hashlib.blake2b(digest_size=32))


def seal(file: Path) -> Seal:
    """[bytes, checksum] of a file that was just written, which is on the disk when this returns. Raises OSError."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())
    return [file.stat().st_size, digest(file)]


def finish(root: Path, step: int, world: int, made_by: dict[str, Any], sealed: dict[str, Seal], keep: int) -> Path:
    """Marks the scratch folder complete, renames it to step-<n> and drops all but the newest ``keep``.

    ``sealed``: name -> ``seal`` of the files that other processes wrote. They are read back here; the rest is sealed.
    Raises OSError where something cannot be written, or is not read back as it was written; nothing is dropped then.
    """
    written, final = scratch(root, step), root / f"step-{step:06d}"
    if wrong := _wrong(written, sealed):
        raise OSError(f"{written}: not read back as it was written: {_some(wrong)}")
    own = {name: seal(written / name) for name in _names(written) if name not in sealed}
    mark = written / MARK
    facts = {"step": step, "files": {**sealed, **own}, "world": world, "made_by": made_by}
    mark.write_text(json.dumps(facts), encoding="utf-8")
    seal(mark)
    for folder in [written, *(p for p in written.rglob("*") if p.is_dir())]:
        _sync(folder)
    if final.exists():  # damaged, or the run would not have come from before it
        os.replace(final, root / f".dropped-{step:06d}")
    os.replace(written, final)
    _sync(root)
    abandon(root)
    # Newer steps than this one are damaged or superseded, or the run would not have come from before them.
    kept = [folder for folder in _all(root) if int(folder.name[5:]) <= step][:keep]
    for old in set(_all(root)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def space(folder: Path) -> str:
    """Which disk ``folder`` is on and what is free there, for a message."""
    place = folder.resolve()
    while not (place.exists() and place.is_mount()) and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    return f"the disk at {place} has {usage.free:,} of {usage.total:,} bytes free"


def _sync(folder: Path) -> None:
    """Names, too, are on the disk only after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]


def _all(root: Path) -> list[Path]:
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{1,18}", p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _wrong(folder: Path, sealed: dict[str, Seal]) -> list[str]:
    """The files that are not as they were sealed, each with what is wrong with it."""

    def wrong(name: str) -> str | None:
        (size, checksum), file = sealed[name], folder / name
        if not file.is_file() or file.stat().st_size != size:
            return "missing or cut short"
        return "changed since it was written" if digest(file) != checksum else None

    return _checked(sealed, wrong)


def _foreign(folder: Path, sealed: dict[str, Seal]) -> list[str]:
    """The files that would be loaded and are not what this program writes, whatever their checksums say."""

    def wrong(name: str) -> str | None:
        if name not in sealed:
            return "not one of its files"
        with contextlib.suppress(SafetensorError), safe_open(folder / name, framework="np") as stored:
            stored.keys()
            return None
        return "not a safetensors file"

    return _checked([name for name in _names(folder) if name.endswith(".safetensors")], wrong)


def _checked(names: Iterable[str], wrong: Callable[[str], str | None]) -> list[str]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return [f"{name} ({found})" for name, found in zip(names, pool.map(wrong, names), strict=True) if found]


def latest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest usable checkpoint, of which every byte is read; ``warn`` takes a message for each damaged one."""
    folders = _all(root)
    for folder in folders:
        try:
            found = _read(folder)
            wrong = _wrong(folder, found.files) or _foreign(folder, found.files)
        except (OSError, ValueError, RecursionError) as error:
            warn(f"checkpoint {folder} is unusable ({error}); trying the one before")
            continue
        if not wrong:
            return found
        warn(f"checkpoint {folder} is damaged: {_some(wrong)}; trying the one before")
    if folders:
        warn(f"no checkpoint in {root} can be used: the stage starts anew")
    return None


def _read(folder: Path) -> Checkpoint:
    """The checkpoint that the folder's mark describes. Raises OSError or ValueError where it is of another shape."""
    facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or type(facts.get("step")) is not int or facts["step"] != int(folder.name[5:]):
        raise ValueError(f"{MARK} does not say which step and files it is of")
    if not all(isinstance(value, list) and [type(part) for part in value] == [int, str] for value in files.values()):
        raise ValueError(f"{MARK} has no checksums")
    if any(os.path.normpath(name) != name or name.startswith(("/", "..")) for name in files):
        raise ValueError(f"{MARK} names files outside of the folder")
    made_by = facts.get("made_by")
    return Checkpoint(folder, facts["step"], facts.get("world", 0), made_by if isinstance(made_by, dict) else {}, files)
