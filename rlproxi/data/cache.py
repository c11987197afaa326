"""Encoded shards on disk, one safetensors file for each with rows grouped by bucket, and a run's lists of them.

A file's name holds a hash of all that its rows depend on, so a file that exists is valid for every run. Inside:

    <h>x<w>/image         uint8 [n, h, w, 3], or    <h>x<w>/latents   float16 [n, c, h/f, w/f]
    <h>x<w>/size          int32 [n, 4]: height and width of the original, top and left of the crop
    <h>x<w>/text_states   float16 [n, L, D], text_pooled float32 [n, P], text_mask uint8 [n, L], where text is cached
    <h>x<w>/caption, key  uint8: UTF-8 one after the other; caption_end, key_end int64 [n]: where each ends
    skips                 uint8: JSON, [[key, reason], ...]

``manifest-<hash>.jsonl`` lists a run's shards and every skipped sample, ``prompts-<hash>.txt`` some of its captions.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from ..config.loading import Config
from ..files import draft, write_text
from .addresses import filesystem
from .buckets import Size
from .shards import Skip

#: Version of the layout. It is part of every hash, so files of another layout are not found.
FORMAT = 1
STRINGS = ("caption", "key")
#: Captions that are kept as prompts: more than an RL run needs, few enough for the memory of every process.
PROMPTS = 100_000

Count = Annotated[int, Field(strict=True, ge=0)]


def digest(*facts: Any) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.blake2b(json.dumps([FORMAT, *facts], sort_keys=True).encode(), digest_size=8).hexdigest()


def source_version(url: str) -> str:
    """The version of the shard at an address: its etag or checksum, else its size and time.

    Raises OSError if the storage does not answer, ValueError as ``filesystem``.
    """
    fs, path = filesystem(url)
    info = fs.info(path)
    for name in ("ETag", "etag", "md5Hash", "crc32c"):
        if info.get(name):
            return str(info[name])
    times = (info.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "created"))
    return f"{info.get('size')} bytes, {next(filter(None, times), None)}"


def cached_file(cache: Path, url: str, version: str, fingerprint: str) -> Path:
    """The path of a shard's rows. ``fingerprint``: of the recipe."""
    stem = url.rstrip("/").rpartition("/")[2].partition(".")[0]
    return cache / f"{stem}-{digest(url, version, fingerprint)}.safetensors"


class Rows:
    """The rows of one shard while it is encoded, all of them in memory."""

    def __init__(self) -> None:
        self.columns: dict[Size, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        self.skips: list[Skip] = []

    def add(self, bucket: Size, **values: Any) -> None:
        """Add one row: strings for ``caption`` and ``key``, arrays for the others."""
        for name, value in values.items():
            self.columns[bucket][name].append(value)

    def save(self, path: Path, shard: str) -> None:
        """Write the file of the shard with address ``shard``."""
        from safetensors.numpy import save_file

        skips = json.dumps([[s.key, s.reason] for s in self.skips])
        tensors = {"skips": np.frombuffer(skips.encode(), np.uint8)}
        for (height, width), columns in self.columns.items():
            for name, values in columns.items():
                at = f"{height}x{width}/{name}"
                if name in STRINGS:
                    encoded = [value.encode() for value in values]
                    tensors[at] = np.frombuffer(b"".join(encoded), np.uint8)
                    tensors[f"{at}_end"] = np.cumsum([len(e) for e in encoded], dtype=np.int64)
                else:
                    # The file keeps the order of bytes in memory, and a network's output may have another one.
                    tensors[at] = np.ascontiguousarray(np.stack(values))
        with draft(path) as scratch:
            save_file(tensors, scratch, {"shard": shard})


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Inside, any error that a damaged file causes becomes a ValueError that names the file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # errors of safetensors, json and numpy, and of wrong names and numbers
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): delete it and encode again") from None


class CachedShard:
    """A cached file, read row by row. Raises FileNotFoundError, and every method ValueError naming a damaged file."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is gone from the cache: encode again")
        self.path = Path(path)
        self.columns: dict[Size, list[str]] = defaultdict(list)
        with _naming(self.path):
            self._file = safe_open(path, framework="np")
            names = self._file.keys()
            for bucket, _, name in (n.partition("/") for n in names if "/" in n):
                self.columns[parse_size(bucket)].append(name)
        #: Column -> the ends of its strings, which are small and needed for every row.
        self._ends: dict[str, np.ndarray] = {}

    def counts(self) -> dict[Size, int]:
        """Rows in each bucket."""
        with _naming(self.path):
            sizes = {bucket: self._file.get_slice(f"{name_of(bucket)}/size") for bucket in sorted(self.columns)}
            return {bucket: size.get_shape()[0] for bucket, size in sizes.items()}

    def row(self, bucket: Size, row: int) -> dict[str, Any]:
        """One row: strings for ``caption`` and ``key``, arrays for the others."""
        found = {}
        with _naming(self.path):
            for name in self.columns[bucket]:
                column = self._file.get_slice(f"{name_of(bucket)}/{name}")
                if name in STRINGS:
                    ends = self._end(bucket, name)
                    start = int(ends[row - 1]) if row else 0
                    found[name] = column[start : int(ends[row])].tobytes().decode()
                elif not name.endswith("_end"):
                    found[name] = column[row : row + 1][0]
        return found

    def captions(self) -> Iterator[str]:
        """The captions of all rows."""
        for bucket in sorted(self.columns):
            with _naming(self.path):
                text = self._file.get_tensor(f"{name_of(bucket)}/caption").tobytes()
                ends = self._end(bucket, "caption").tolist()
                found = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
            yield from found

    def skips(self) -> list[tuple[str, str]]:
        """(key, reason) of each sample that was left out."""
        with _naming(self.path):
            return [(str(key), str(reason)) for key, reason in json.loads(self._file.get_tensor("skips").tobytes())]

    def _end(self, bucket: Size, name: str) -> np.ndarray:
        at = f"{name_of(bucket)}/{name}_end"
        if at not in self._ends:
            self._ends[at] = self._file.get_tensor(at)
        return self._ends[at]


def name_of(bucket: Size) -> str:
    """The name of a bucket, such as 512x384."""
    return f"{bucket[0]}x{bucket[1]}"


def parse_size(name: str) -> Size:
    """The bucket of a name. Raises ValueError for anything else."""
    height, _, width = name.partition("x")
    return int(height), int(width)


@dataclass(frozen=True)
class Entry:
    """A shard of a run: its file in the cache (None if it could not be read) and its rows in each bucket."""

    shard: str
    file: str | None
    rows: dict[Size, Count]
    skipped: dict[str, Count]  # kind of reason -> count


_ENTRY = TypeAdapter(Entry)


def run_name(config: Config) -> str:
    """A hash of the config keys that decide which data a run reads. It names the run's lists in a shared cache."""
    d, m = config.data, config.model
    urls = [url if "://" in url else os.path.abspath(url) for url in d.urls]
    pixels = d.size, d.buckets, d.crop, d.crop == "random" and config.run.seed, d.max_pixels, d.cache_text
    return digest(urls, *pixels, m.init, m.encoders, m.patch, m.channels, m.kind)


def manifest_path(config: Config, cache: Path) -> Path:
    """The list of the run's shards and of all skipped samples."""
    return Path(cache) / f"manifest-{run_name(config)}.jsonl"


def prompts_path(config: Config, cache: Path) -> Path:
    """The file of captions that RL may use as prompts, one on each line, at most ``PROMPTS``."""
    return Path(cache) / f"prompts-{run_name(config)}.txt"


def write_manifest(config: Config, cache: Path, entries: list[Entry], lost: list[Skip]) -> dict[str, Any]:
    """Write the run's manifest and return its totals. ``lost``: the skips of shards without a cached file."""
    skipped: Counter[str] = sum((Counter(entry.skipped) for entry in entries), Counter())
    totals = {
        "shards": len(entries),
        "samples": sum(sum(e.rows.values()) for e in entries),
        "skipped": sum(skipped.values()),
        "reasons": dict(skipped.most_common()),
    }

    with draft(manifest_path(config, cache)) as scratch, open(scratch, "w", encoding="utf-8") as file:

        def line(**facts: Any) -> None:
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")

        line(**totals)
        for e in entries:
            line(shard=e.shard, file=e.file, rows={name_of(b): n for b, n in e.rows.items()}, skipped=e.skipped)
        for entry in entries:
            for key, reason in CachedShard(cache / entry.file).skips() if entry.file else ():
                line(shard=entry.shard, key=key, reason=reason)
        for skip in lost:
            line(**asdict(skip))
    return totals


def read_index(config: Config, cache: Path) -> list[Entry]:
    """The shards of the run's manifest. Raises FileNotFoundError without one, ValueError naming a damaged one."""
    path = manifest_path(config, cache)
    if not path.is_file():
        reason = f"nothing was encoded into {cache} for this config's data and model keys"
        raise FileNotFoundError(f"{path} does not exist: {reason}; run the stage encode first")
    entries = []
    with _naming(path), open(path, encoding="utf-8") as file:
        next(file)
        for facts in map(json.loads, file):
            if "rows" not in facts:
                break  # the skips follow
            rows = {parse_size(b): n for b, n in facts["rows"].items()}
            entries.append(_ENTRY.validate_python({**facts, "rows": rows}))
    return entries


def captions(config: Config, cache: Path) -> Iterator[str]:
    """Every caption of the run's data, shard by shard."""
    for entry in read_index(config, cache):
        if entry.file:
            yield from CachedShard(Path(cache) / entry.file).captions()


def first_samples(config: Config, cache: Path, count: int) -> np.ndarray:
    """Up to ``count`` samples of the bucket with the most rows, as a denoiser sees them.

    Returns float32 [n, C, h, w], latents or pixels in [-1, 1], in equal parts from every shard. Raises as
    ``read_index``, and ValueError if the run has no samples.
    """
    entries = [e for e in read_index(config, cache) if e.rows]
    totals: Counter[Size] = sum((Counter(entry.rows) for entry in entries), Counter())
    if not totals:
        raise ValueError(f"{manifest_path(config, cache)} lists no samples")
    bucket = totals.most_common(1)[0][0]
    each = -(-count // len(entries))
    shards = ((CachedShard(Path(cache) / str(e.file)), min(each, e.rows.get(bucket, 0))) for e in entries)
    found = list(islice((shard.row(bucket, row) for shard, rows in shards for row in range(rows)), count))
    if "latents" in found[0]:
        return np.stack([row["latents"] for row in found]).astype(np.float32)
    return np.stack([row["image"] for row in found]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def write_prompts(config: Config, cache: Path, limit: int = PROMPTS) -> int:
    """Write up to ``limit`` distinct captions, those with the smallest hashes, and return their number."""
    heap: list[tuple[int, str]] = []
    kept: set[str] = set()
    for caption in captions(config, cache):
        caption = " ".join(caption.split())
        # Negative, so that the heap's first is the next one to drop.
        item = (-int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big"), caption)
        if caption in kept:
            continue
        kept.add(caption)
        heapq.heappush(heap, item)
        if len(heap) > limit:
            kept.discard(heapq.heappop(heap)[1])
    lines = "".join(f"{caption}\n" for _, caption in sorted(heap, reverse=True))
    write_text(prompts_path(config, cache), lines)
    return len(heap)
