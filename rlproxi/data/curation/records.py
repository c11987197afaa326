"""The records of samples between the steps, and their files: JSON lines that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...config.curation import Curate
from ...files import draft

#: Version of the records. It rises when older records would mean something else.
FORMAT = 1

#: The stages in the order in which samples pass them. Each filter has its own, between faces and duplicates.
UNREADABLE, SIZE, FACES, DUPLICATES = "unreadable", "size", "faces", "duplicates"


def stages(settings: Curate) -> list[str]:
    """The names of the stages that can drop a sample, in their order."""
    return [
        UNREADABLE,
        SIZE,
        *([FACES] if settings.faces else []),
        *(filter_stage(f.name) for f in settings.filters),
        *([DUPLICATES] if settings.duplicates else []),
    ]


def filter_stage(name: str) -> str:
    """The stage of a filter."""
    return f"filter/{name}"


@dataclass
class Record:
    """One sample of a raw shard."""

    index: int  # among all samples and skips of the shard, so (shard, index) is unique even if keys repeat
    key: str
    stage: str | None = None  # what dropped the sample; None while nothing has
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    phash: str | None = None  # perceptual hash, 16 hex digits
    faces: list[dict] = field(default_factory=list)  # {x, y, w, h, confidence} in pixels
    scores: dict[str, float] = field(default_factory=dict)
    words: int | None = None  # of the original caption

    def drop(self, stage: str, reason: str) -> None:
        """Record the stage that the sample failed at, with the reason in words."""
        self.stage, self.reason = stage, reason

    @property
    def hash(self) -> int:
        """The perceptual hash of a sample that passed."""
        return int(self.phash or "", 16)


class Place:
    """The folder of one curation: ``<number>.tar``, manifest.jsonl, curation.json, curation.html; steps/ in between.

    A new object stands for a new attempt, also in the processes that get a copy of it.
    """

    def __init__(self, out: str | os.PathLike):
        self.out = Path(out).resolve()
        self.examined, self.written = self.out / "steps" / "examined", self.out / "steps" / "written"
        self.drafts = self.out / "steps" / f"drafts-{uuid.uuid4().hex}"

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Files can be written inside the block only, and not after another attempt in this folder has begun.

        A worker may outlive its killed driver. It cannot finish a file once the drafts of its attempt are gone.
        """
        for folder in self.drafts.parent.glob("drafts-*"):
            _remove(folder)
        self.drafts.mkdir(parents=True)
        try:
            yield
        finally:
            _remove(self.drafts)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the result, whole or not at all."""
        with draft(self.out / name, self.drafts) as scratch:
            scratch.write_text(text, encoding="utf-8")

    def write_lines(self, path: Path, rows: Iterable[dict], mark: str | None = None) -> None:
        """Write JSON lines, whole or not at all. A fingerprint ``mark`` goes into a first line of its own."""
        header = [] if mark is None else [{"fingerprint": mark}]
        with draft(path, self.drafts) as scratch, open(scratch, "w", encoding="utf-8") as file:
            for row in chain(header, rows):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def records(self, shard: str) -> Path:
        """The file of a raw shard's records. A hash of the address keeps shards with one name apart."""
        name = os.path.basename(shard).partition(".")[0]
        return self.examined / f"{name}-{hashlib.sha256(shard.encode()).hexdigest()[:12]}.jsonl"

    def shard(self, number: int) -> Path:
        """A curated shard."""
        return self.out / f"{number:05d}.tar"

    def part(self, number: int) -> Path:
        """The manifest of a curated shard. It is written after the shard, so it exists only together with it."""
        return self.written / f"{number:05d}.jsonl"


def _remove(folder: Path) -> None:
    """Remove a folder of drafts. It is renamed first, so that no process can add a draft meanwhile."""
    shutil.rmtree(folder.rename(folder.with_name(f"drafts-{uuid.uuid4().hex}")), ignore_errors=True)


def fingerprint(*facts: Any) -> str:
    """A short hash of all that a file's content depends on."""
    return hashlib.sha256(json.dumps([FORMAT, *facts], sort_keys=True).encode()).hexdigest()[:16]


def examine_fingerprint(settings: Curate, shard: str) -> str:
    """The fingerprint of a raw shard's records: the settings of the steps of single images, and the file."""
    keys = {"min_size", "max_aspect", "max_pixels", "faces", "filters"}
    size = os.path.getsize(shard) if os.path.isfile(shard) else None
    return fingerprint(settings.model_dump(mode="json", include=keys), shard, size)


def is_done(path: Path, mark: str) -> bool:
    """Whether the file exists and has the same fingerprint."""
    with suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        return json.loads(file.readline()).get("fingerprint") == mark
    return False


def read_lines(path: Path) -> Iterator[dict]:
    """The rows of a file that ``write_lines`` wrote."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, islice(file, 1, None))


def load_records(path: Path) -> Iterator[Record]:
    """A raw shard's records, in the order of its samples."""
    return (Record(**row) for row in read_lines(path))
