"""Image-text shards, which are read sample by sample: tars in img2dataset's layout, or parquet files.

A tar holds ``<key>.jpg`` (or jpeg, png, webp), ``<key>.txt`` and optionally ``<key>.json``; the members of a sample
follow each other. A parquet file has a column ``image`` or ``jpg`` (bytes, or a struct with ``bytes``), a column
``caption`` or ``text``, and any other columns. A sample that cannot be read becomes a ``Skip``, never an exception.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import draft
from .addresses import PARQUETS, filesystem
from .tars import Archive, Header, Source

#: Endings of the images in a tar, and names of columns, the preferred ones first.
IMAGES = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS, CAPTION_COLUMNS, KEY_COLUMNS = ("image", *IMAGES), ("caption", "text", "txt"), ("key", "__key__")
#: Bytes of a member. A larger one is not an image, and would be read into memory whole.
MEMBER_LIMIT = 256 * 1024**2
#: The kind of a Skip that may go away by itself (a network, a full disk), unlike damage inside a file.
UNREADABLE = "unreadable file"


@dataclass(frozen=True)
class Sample:
    """One sample. ``image`` is the encoded file, unchecked; ``meta`` is the json member, {} without one."""

    key: str
    image: bytes
    caption: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A sample that cannot be used; with the key "" a whole shard, or the rest of one."""

    shard: str
    key: str
    reason: str  # ``kind`` or ``kind: detail``; there are few kinds, so they can be counted

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


class ShardUnreadable(OSError):
    """A shard could not be opened or read to its end; a later try may succeed."""


class _Unusable(Exception):
    """A fault of a sample, which becomes a Skip."""


def read_shard(url: str) -> Iterator[Sample | Skip]:
    """Stream the samples of one shard in the file's order, with a Skip for each that cannot be read. Never raises.

    A file that is missing, or whose reading fails, gives a Skip of kind ``UNREADABLE`` with the key "". Of several
    samples with one key only the first is kept.
    """
    read = _read_parquet if url.endswith(PARQUETS) else _read_tar
    seen: set[str] = set()
    try:
        fs, path = filesystem(url)
        with fs.open(path, "rb") as file:
            for item in read(Source(file), url):
                if isinstance(item, Sample) and item.key in seen:
                    item = Skip(url, item.key, "duplicate key")
                seen.add(item.key)
                yield item
    except Exception as error:  # the storages' packages raise errors without a common base
        yield Skip(url, "", f"{UNREADABLE}: {_words(error)}")


def read_whole_shard(url: str) -> Iterator[Sample | Skip]:
    """Stream as ``read_shard``, but raise ShardUnreadable where the storage fails."""
    for item in read_shard(url):
        if isinstance(item, Skip) and item.kind == UNREADABLE:
            raise ShardUnreadable(item.reason)
        yield item


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _read_tar(source: Source, url: str) -> Iterator[Sample | Skip]:
    key, whole, fault = None, True, None
    members: dict[str, Any] = {}
    try:
        with Archive.open(fileobj=source, mode="r|*", tarinfo=Header) as archive:
            for info in archive:
                name, _, ending = _split(info.name)
                if not info.isfile() or not name or not ending:
                    continue
                if key is not None and (name != key or ending in members):
                    yield _sample(url, key, members)
                    members = {}
                key, whole = name, False
                # Other members are never read into memory; their names still belong to the sample.
                members[ending] = _content(archive, info) if ending in (*IMAGES, "txt", "json") else b""
                whole = True
            fault = _ending(archive)
    except Exception as error:  # errors of zlib and tarfile, and of damaged numbers in a header
        if source.error is not None:
            raise source.error from None
        fault = _words(error)
    if key is not None and whole:  # a member that was cut takes its sample with it
        yield _sample(url, key, members)
    if fault:
        yield Skip(url, "", f"damaged tar: the rest of it is lost ({fault})")


def _split(path: str) -> tuple[str, str, str]:
    """'./a/b.seg.png' -> ('a/b', '.', 'seg.png'); hidden files have no key."""
    folder, name = os.path.split(path.removeprefix("./"))
    stem, dot, ending = name.partition(".")
    return (f"{folder}/{stem}" if folder and stem else stem), dot, ending.lower()


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | _Unusable:
    if info.size > MEMBER_LIMIT:
        return _Unusable(f"member too large: {info.name} has {info.size} bytes")
    if info.issparse():  # a small file could claim a hole of any size; no tool for image-text data writes them
        return _Unusable("sparse member: its holes are not stored")
    member = archive.extractfile(info)
    data = member.read() if member is not None else b""
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} is cut short")
    return data


def _ending(archive: Archive) -> str | None:
    """What is wrong with the end of the archive, None if nothing is."""
    if not isinstance(archive.ending, tarfile.EOFHeaderError):  # type: ignore[attr-defined]  # typeshed lacks it
        return f"{archive.ending}; there is no end-of-archive mark"
    # Zeros in the middle, as an interrupted download leaves them, look like the end; only zeros follow a true end.
    while archive.fileobj is not None and (data := archive.fileobj.read(2**20)):
        if data.strip(b"\0"):
            return "data after the end-of-archive mark"
    return None


def _sample(url: str, key: str, members: dict[str, Any]) -> Sample | Skip:
    """``members``: ending -> bytes, or what makes the sample unusable."""
    try:
        for content in members.values():
            if isinstance(content, _Unusable):
                raise content
        image = next((members[ending] for ending in IMAGES if ending in members), None)
        return _checked(key, image, members.get("txt"), _object(members.get("json")))
    except _Unusable as error:
        return Skip(url, key, str(error))


def _checked(key: str, image: Any, caption: Any, meta: dict) -> Sample:
    if image is None:
        raise _Unusable("no image")
    if not isinstance(image, bytes):
        raise _Unusable(f"no image: a {type(image).__name__} instead of bytes")
    if not image:
        raise _Unusable("empty image")
    if caption is None:
        raise _Unusable("no caption")
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _Unusable(f"caption is not UTF-8: byte {error.start} ({error.reason})") from None
    if not isinstance(caption, str):
        raise _Unusable(f"caption is no text: a {type(caption).__name__}")
    if not caption.strip():
        raise _Unusable("empty caption")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise _Unusable("name is not UTF-8") from None
    if key.startswith("/") or ".." in key.split("/"):
        raise _Unusable("name leads out of its folder")  # where somebody unpacks the tar that is written from it
    return Sample(key, image, caption.strip(), meta)


def _object(data: bytes | None) -> dict:
    if data is None:
        return {}
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"json is not readable: {_words(error)}") from None
    if not isinstance(meta, dict):
        raise _Unusable(f"json is not an object: a {type(meta).__name__}")
    return meta


def _read_parquet(source: Source, url: str) -> Iterator[Sample | Skip]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(source)
        names = table.schema_arrow.names
        image, caption, key = (
            next((c for c in wanted if c in names), None) for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS, KEY_COLUMNS)
        )
        if image is None or caption is None:
            wanted = IMAGE_COLUMNS if image is None else CAPTION_COLUMNS
            yield Skip(url, "", f"no such column: none of {', '.join(wanted)} among {', '.join(names[:20])}")
            return
        rows = (row for batch in table.iter_batches(batch_size=64) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield _row(url, number, row, image, caption, key)
    except Exception as error:  # errors of pyarrow, also for text that is not UTF-8
        if source.error is not None:
            raise source.error from None
        yield Skip(url, "", f"damaged parquet: the rest of it is lost ({_words(error)})")


def _row(url: str, number: int, row: dict, image: str, caption: str, key: str | None) -> Sample | Skip:
    # A dot would end the key where the sample is written to a tar.
    name = f"{number:09d}" if key is None or row[key] in (None, "") else str(row[key]).replace(".", "_")
    content = row[image]
    if isinstance(content, dict):
        content = content.get("bytes")
    meta = {k: v for k, v in row.items() if k not in (image, caption, key) and not isinstance(v, bytes)}
    try:
        return _checked(name, content, row[caption], meta)
    except _Unusable as error:
        return Skip(url, name, str(error))


def write_shard(path: str | os.PathLike, samples: Iterable[Sample], drafts: Path | None = None) -> int:
    """Write samples as a tar in img2dataset's layout, by ``draft`` in ``drafts``; return their number.

    The same samples give the same bytes. Raises ValueError for a key that the layout cannot hold or that comes twice.
    """
    path = Path(path)
    keys: set[str] = set()
    with draft(path, drafts) as scratch, tarfile.open(scratch, "w", format=tarfile.GNU_FORMAT) as archive:
        for sample in samples:
            same = _split(f"{sample.key}.txt")[::2] == (sample.key, "txt")
            if not sample.key or sample.key.startswith("/") or not same:
                raise ValueError(f"{path}: {sample.key!r} cannot be a key: keys are non-empty and without dots")
            if sample.key in keys:
                raise ValueError(f"{path}: the key {sample.key!r} comes twice")
            keys.add(sample.key)
            members = {_image_ending(sample.image): sample.image, "txt": sample.caption.encode()}
            if sample.meta:
                text = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True, default=str)
                # JSON can spell half of a surrogate pair. With its backslash it is written as it was read.
                members["json"] = text.encode("utf-8", "backslashreplace")
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{sample.key}.{ending}")  # mtime 0, no owner
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return len(keys)


def _image_ending(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"
