"""The end of a curation: the manifest of all samples, the funnel, and the statistics for the page."""

from __future__ import annotations

import heapq
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...config.curation import Curate
from . import faces
from .phash import distance
from .plan import Output, Survivors
from .records import DUPLICATES, UNREADABLE, Place, Record, load_records, read_lines, stages

KEPT, HANDS = "kept", "hands"


@dataclass
class Series:
    """One number of each sample that has it, and whether the sample was kept: 5 bytes a sample."""

    values: array = field(default_factory=lambda: array("f"))
    kept: array = field(default_factory=lambda: array("b"))


@dataclass(frozen=True)
class Example:
    """A sample that the page shows: its position, a description, and the faces to draw."""

    shard: str
    index: int
    words: str
    faces: list[dict]


@dataclass
class Statistics:
    """The numbers and examples for the page."""

    settings: Curate
    raw_shards: int = 0
    shards: int = 0
    total: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    series: dict[str, Series] = field(default_factory=dict)
    _picks: dict[str, list] = field(default_factory=dict)

    def funnel(self) -> list[dict]:
        """For each stage the number of samples that reached it, that it dropped, and that were left."""
        rows, left = [], self.total
        for stage in stages(self.settings):
            rows.append({"stage": stage, "in": left, "dropped": self.dropped[stage], "out": left - self.dropped[stage]})
            left -= self.dropped[stage]
        return rows

    def summary(self) -> dict:
        """The contents of curation.json."""
        return {
            "raw_shards": self.raw_shards,
            "samples": self.total,
            "kept": self.total - self.dropped.total(),
            "tags": dict(self.tags),
            "shards": self.shards,
            "funnel": self.funnel(),
            "settings": self.settings.model_dump(mode="json"),
        }

    def drop(self, record: Record, shard: str, stage: str, reason: str) -> None:
        """Count a sample that ``stage`` dropped."""
        self.dropped[stage] += 1
        if stage == UNREADABLE:
            self.unreadable[reason.partition(":")[0]] += 1
        example = Example(shard, record.index, f"{record.key}: {reason}", record.faces)
        self._add(record, stage, example, record.words, [])

    def keep(self, record: Record, shard: str, caption: str, tags: list[str]) -> None:
        """Count a sample that is in the curated shards."""
        words = f"{record.width} x {record.height}: {caption}" + (f" [{', '.join(tags)}]" if tags else "")
        self._add(record, None, Example(shard, record.index, words, record.faces), len(caption.split()), tags)

    def _add(self, record: Record, stage: str | None, example: Example, words: int | None, tags: list[str]) -> None:
        self.total += 1
        self.tags.update(tags)
        short, long = sorted((record.width or 0, record.height or 0))
        values = {
            "shorter side, px": short or None,
            "aspect (longer : shorter side)": long / short if short else None,
            "largest face, px": max((faces.size(f) for f in record.faces), default=None),
            "face confidence": max((f["confidence"] for f in record.faces), default=None),
            **{f"score {name}": score for name, score in record.scores.items()},
            "caption, words": words,
        }
        for name, value in values.items():
            if value is not None:
                series = self.series.setdefault(name, Series())
                series.values.append(value)
                series.kept.append(stage is None)
        if record.width and stage != UNREADABLE:
            self._pick(KEPT if stage is None else stage, example)
            for tag in tags:
                self._pick(tag, example)

    def _pick(self, stage: str, example: Example) -> None:
        """Keep the examples with the smallest hashes, so that the choice is unbiased."""
        heap = self._picks.setdefault(stage, [])
        entry = (-zlib.crc32(f"{example.shard}/{example.index}".encode()), example.shard, example.index, example)
        heapq.heappush(heap, entry)
        if len(heap) > self.settings.examples:
            heapq.heappop(heap)

    def examples(self, stage: str) -> list[Example]:
        """The examples of a stage, of "kept", or of a tag."""
        return [entry[3] for entry in sorted(self._picks.get(stage, []), key=lambda e: e[:3], reverse=True)]


def merge(
    place: Place, shards: Sequence[str], found: Survivors, plans: Sequence[Output], settings: Curate
) -> Statistics:
    """Write manifest.jsonl, one line for each raw sample in the order (shard, index), and return the statistics."""
    statistics = Statistics(settings, len(shards), len(plans))
    place.write_lines(place.out / "manifest.jsonl", _lines(place, shards, found, plans, statistics))
    return statistics


def _lines(
    place: Place, shards: Sequence[str], found: Survivors, plans: Sequence[Output], statistics: Statistics
) -> Iterator[dict]:
    originals = _originals(place, shards, found)
    written = (row for plan in plans for row in read_lines(place.part(plan.number)))
    at = 0
    for number, shard in enumerate(shards):
        for record in load_records(place.records(shard)):
            line = {"shard": shard, "index": record.index, "key": record.key}
            stage, reason, row = record.stage, record.reason, {}
            if stage is None:
                if (found.shard[at], found.index[at]) != (number, record.index):
                    raise RuntimeError(f"{place.records(shard)} changed while the manifest was written; resume the run")
                if found.duplicate[at] >= 0:
                    stage, reason = DUPLICATES, _copy_of(originals[int(found.duplicate[at])], record)
                else:
                    row = next(written)
                    if (row["shard"], row["index"]) != (shard, record.index):
                        raise RuntimeError(f"{place.written} belongs to other records; delete it and resume the run")
                at += 1
            if stage is None:
                line |= {"status": "kept", **{k: row[k] for k in ("output", "output_key", "tags")}}
                statistics.keep(record, shard, row["caption"], row["tags"])
            else:
                line |= {"status": "dropped", "stage": stage, "reason": reason}
                statistics.drop(record, shard, stage, str(reason))
            yield line


def _originals(place: Place, shards: Sequence[str], found: Survivors) -> dict[int, tuple[str, Record]]:
    """index -> (shard, record) of every kept sample that has copies."""
    places = np.unique(found.duplicate[found.duplicate >= 0])
    by_name = {(int(found.shard[p]), int(found.index[p])): int(p) for p in places}
    originals = {}
    for number in np.unique(found.shard[places]).tolist():
        for record in load_records(place.records(shards[number])):
            if (number, record.index) in by_name:
                originals[by_name[number, record.index]] = (shards[number], record)
    return originals


def _copy_of(original: tuple[str, Record], record: Record) -> str:
    shard, best = original
    kept = f"{os.path.basename(shard)}/{best.key} ({best.width} x {best.height})"
    bits = distance(best.hash, record.hash)
    return f"copy of {kept}, {bits} of 64 bits differ; this one is {record.width} x {record.height}"
