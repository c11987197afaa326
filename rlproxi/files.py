"""Files and folders that are written whole or not at all; checksums and links of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


@contextlib.contextmanager
def draft(path: str | os.PathLike, folder: Path | None = None) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; the file is renamed to ``path`` when the block ends without an error.

    A reader sees the old file or the new one, never a half. The draft's name is random, so that writers on several
    nodes do not meet. It begins with a dot and does not keep the file's ending. Missing parent folders are made.

    ``folder``: where the draft is instead; it must exist, on the same file system. Once it is gone, the block fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}"
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_draft(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a folder to make beside ``path``; it replaces ``path`` when the block ends without an error.

    An older folder stays where it is until then, and comes back where the rename fails. Missing parents are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    fresh, old = (path.with_name(f".{path.name}.{word}-{mark}") for word in ("new", "old"))
    try:
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all (see ``draft``)."""
    with draft(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, values: Any, indent: int | None = 1) -> None:
    """Write ``values`` as JSON, whole or not at all (see ``draft``)."""
    write_text(path, json.dumps(values, indent=indent))


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append ``line`` and a line end in one write. A line that a killed writer left without its end is ended first."""
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size and file.read(1) != b"\n"
        file.write(("\n" * bool(torn) + line + "\n").encode("utf-8"))


def digest(file: str | os.PathLike, summed: hashlib._Hash | hashlib.blake2b) -> str:
    """Return the checksum of a file's content in hexadecimal, by the fresh hash object ``summed``."""
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):  # hashlib.file_digest came with Python 3.11
            summed.update(block)
    return summed.hexdigest()


def sha256(file: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    return digest(file, hashlib.sha256())


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Make ``target`` hard links of the files of a folder, or of one file; copies where the file system cannot.

    For files that are never written in place, such as models: a link costs no space and keeps its content. Symbolic
    links, as Hugging Face's cache has them, are followed: a hard link to a relative one would point nowhere.
    """

    def one(a: str, b: str) -> None:
        try:
            os.link(os.path.realpath(a), b)
        except OSError:
            shutil.copy2(a, b)

    if os.path.isdir(source):
        shutil.copytree(source, target, copy_function=one)
    else:
        one(os.fspath(source), os.fspath(target))
