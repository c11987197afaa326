"""Writing of one curated shard: its samples are read again, captioned and tagged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...config.curation import Curate
from ..images import decode
from ..shards import Sample, read_shard, write_shard
from .captions import Captioner
from .examine import ShardUnreadable
from .hands import HandFinder, hand_words
from .plan import Output
from .records import Place, Record, load_records, write_lines


@dataclass
class WriteTools:
    """The models of captions and hands, loaded once and used for many shards."""

    captioner: Captioner | None = None
    detector: HandFinder | None = None

    @classmethod
    def load(cls, settings: Curate, device: str) -> WriteTools:
        """Load the models. Raises FileNotFoundError or ValueError for one that cannot be loaded."""
        hands = settings.hands.detector if settings.hands else None
        return cls(
            Captioner(settings.caption, device) if settings.caption else None,
            HandFinder(hands, device) if hands else None,
        )


def write(plan: Output, place: Place, settings: Curate, tools: WriteTools) -> int:
    """Write the shard and then its part of the manifest, both atomically; return the number of samples.

    Raises ShardUnreadable if a raw shard no longer matches its records.
    """
    rows: list[dict] = []
    count = write_shard(place.shard(plan.number), _samples(plan, place, settings, tools, rows), place.drafts)
    write_lines(place.part(plan.number), plan.fingerprint, rows, place.drafts)
    return count


@dataclass
class _Chosen:
    shard: str
    sample: Sample
    record: Record


def _samples(plan: Output, place: Place, settings: Curate, tools: WriteTools, rows: list[dict]) -> Iterator[Sample]:
    """The samples to write; their lines of the manifest are appended to ``rows``."""
    waiting: list[_Chosen] = []
    for chosen in _chosen(plan, place):
        waiting.append(chosen)
        if len(waiting) == settings.batch:
            yield from _finish(waiting, plan, settings, tools, rows)
            waiting = []
    yield from _finish(waiting, plan, settings, tools, rows)


def _chosen(plan: Output, place: Place) -> Iterator[_Chosen]:
    for shard, indices in plan.sources:
        wanted = set(indices)
        records = {r.index: r for r in load_records(place.records(shard)) if r.index in wanted}
        left = len(indices)
        for index, item in enumerate(read_shard(shard)):
            record = records.get(index)
            if record is not None:
                if not isinstance(item, Sample) or item.key != record.key:
                    raise ShardUnreadable(
                        f"{shard} has changed since it was examined: sample {index} was "
                        f"{record.key!r} and is "
                        f"{item.key!r}; delete {place.records(shard)} and resume"
                    )
                yield _Chosen(shard, item, record)
                left -= 1
            if not left:
                break
        if left:
            raise ShardUnreadable(
                f"{shard}: {left} samples that were there when it was examined cannot be read any more"
            )


def _finish(
    waiting: list[_Chosen], plan: Output, settings: Curate, tools: WriteTools, rows: list[dict]
) -> Iterator[Sample]:
    captions = [one.sample.caption for one in waiting]
    found: list[list[dict]] = [[] for _ in waiting]
    if waiting and (tools.captioner or tools.detector):
        images: list[np.ndarray] = [decode(one.sample.image, settings.max_pixels) for one in waiting]
        if tools.captioner:
            captions = tools.captioner(images, captions)
        if tools.detector:
            found = tools.detector(images)
    for one, caption, hands in zip(waiting, captions, found, strict=True):
        key = f"{plan.number:05d}{len(rows):04d}"  # as img2dataset counts; unique in the whole output
        sample, row = _finished(one, key, caption, hands, settings)
        rows.append({"shard": one.shard, "index": one.record.index, "output": f"{plan.number:05d}.tar", **row})
        yield sample


def _finished(one: _Chosen, key: str, caption: str, hands: list[dict], settings: Curate) -> tuple[Sample, dict]:
    """(the sample to write, its values in the manifest)."""
    original, record = one.sample.caption, one.record
    words = hand_words(f"{original}\n{caption}", settings.hands.words) if settings.hands else []
    tags = ["hands"] if words or hands else []
    meta = {
        **one.sample.meta,
        "key": key,
        "caption": caption,
        "caption_original": one.sample.meta.get("caption_original", original),
        "width": record.width,
        "height": record.height,
        "phash": record.phash,
        "faces": record.faces,
        "scores": record.scores,
        "tags": tags,
        "hand_words": words,
        "hands": hands,
        "source": {"shard": one.shard, "key": record.key},
    }
    return Sample(key, one.sample.image, caption, meta), {"output_key": key, "tags": tags, "caption": caption}
