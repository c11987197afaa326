"""Addresses of shards: files, folders, globs and ranges on anything that fsspec can open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: File name endings of shards.
TARS, PARQUETS = (".tar", ".tar.gz", ".tgz"), (".parquet",)


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system of an address, the path in it). Raises ValueError, which names a missing package."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"data.urls: {url!r} needs a package that is not installed here: {error}") from None
    except ValueError as error:
        raise ValueError(f"data.urls: {url!r} is not an address that fsspec can open ({error})") from None


def list_shards(urls: Sequence[str]) -> list[str]:
    """All shards that ``urls`` name, sorted and distinct; local ones as absolute paths.

    Each entry is a file, a folder (its tars and parquet files, without subfolders), a glob, or an fsspec address, each
    with optional ``{00000..00099}`` ranges. In folders and globs, a parquet file beside a tar of the same name is left
    out: img2dataset writes the tar's metadata there. A gap in a range stays in the list, and ``read_shard`` reports it.
    Raises ValueError for an entry that matches nothing, and as ``filesystem``.
    """
    return sorted({shard for url in urls for shard in _expand(url)})


def _expand(url: str) -> list[str]:
    parts = _ranges(url)
    fs = filesystem(parts[0])[0]
    paths = {filesystem(part)[1].rstrip("/"): part for part in parts}
    kinds = _kinds(fs, list(paths))
    shards: list[str] = []
    missing: list[str] = []
    for path, part in paths.items():
        if "*" in path or "?" in path:
            shards += _shards_among(fs, fs.glob(path))
        elif kinds.get(path) == "directory":
            shards += _shards_among(fs, fs.ls(path, detail=False))
        else:
            (shards if path in kinds else missing).append(_address(fs, path, part))
    if not shards:
        endings = ", ".join((*TARS, *PARQUETS))
        remedy = f"name a {endings} file, a folder that holds some, a glob or a {{00000..00099}} range"
        raise ValueError(f"data.urls: {url!r} matches no file: {remedy}")
    return shards + missing


def _kinds(fs: Any, paths: Sequence[str]) -> dict[str, str]:
    """path -> 'file' or 'directory', for each path that exists."""
    if len(paths) == 1:
        return {path: fs.info(path)["type"] for path in paths if fs.exists(path)}
    if "http" in fs.protocol:  # has no lists
        return dict.fromkeys(paths, "file")
    # Folders are listed, because a remote storage answers only some twenty requests a second.
    folders = {path.rpartition("/")[0] for path in paths}
    entries = [entry for folder in folders if fs.isdir(folder) for entry in fs.ls(folder, detail=True)]
    return {entry["name"].rstrip("/"): entry["type"] for entry in entries}


def _ranges(url: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if not found:
        return [url]
    first, last = found.groups()
    if int(last) < int(first):
        raise ValueError(f"data.urls: the range {found.group()} of {url!r} ends before it begins")
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [rest for number in numbers for rest in _ranges(url[: found.start()] + number + url[found.end() :])]


def _shards_among(fs: Any, paths: Sequence[str]) -> list[str]:
    tars = [path for path in paths if path.endswith(TARS)]
    beside = {path.removesuffix(end) + ".parquet" for path in tars for end in TARS if path.endswith(end)}
    tables = [path for path in paths if path.endswith(PARQUETS) and path not in beside]
    return [_address(fs, path, path) for path in tars + tables]


def _address(fs: Any, path: str, given: str) -> str:
    if "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol):
        return path
    return given if "::" in given else fs.unstrip_protocol(path)
