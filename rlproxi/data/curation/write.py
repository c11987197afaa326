"""Writing of one curated shard: its samples are read again, captioned and tagged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ...config.curation import Curate
from ..images import decode
from ..shards import Sample, ShardUnreadable, read_shard, write_shard
from .captions import Captioner
from .hands import HandFinder, hand_words
from .plan import Output
from .records import Place, Record, load_records


class Writer:
    """Writes curated shards, with the models of captions and hands, which it loads once.

    Raises FileNotFoundError or ValueError for a model that cannot be loaded.
    """

    def __init__(self, settings: Curate, device: str = "cpu"):
        self.settings = settings
        self.captioner = Captioner(settings.caption, device) if settings.caption else None
        detector = settings.hands and settings.hands.detector
        self.detector = HandFinder(detector, device) if detector else None

    def write(self, plan: Output, place: Place) -> int:
        """Write the shard and then its part of the manifest, both atomically; return the number of samples.

        Raises ShardUnreadable if a raw shard no longer matches its records.
        """
        rows: list[dict] = []
        count = write_shard(place.shard(plan.number), self._samples(plan, place, rows), place.drafts)
        place.write_lines(place.part(plan.number), rows, plan.fingerprint)
        return count

    def _samples(self, plan: Output, place: Place, rows: list[dict]) -> Iterator[Sample]:
        """The samples to write; their lines of the manifest are appended to ``rows``."""
        chosen = _chosen(plan, place)
        while batch := list(islice(chosen, self.settings.batch)):
            captions = [sample.caption for _, sample, _ in batch]
            found: list[list[dict]] = [[] for _ in batch]
            if self.captioner or self.detector:
                images = [decode(sample.image, self.settings.max_pixels) for _, sample, _ in batch]
                captions = self.captioner(images, captions) if self.captioner else captions
                found = self.detector(images) if self.detector else found
            for (shard, sample, record), caption, hands in zip(batch, captions, found, strict=True):
                key = f"{plan.number:05d}{len(rows):04d}"  # as img2dataset counts; unique in the whole output
                meta = self._meta(sample, record, caption, hands)
                meta |= {"key": key, "source": {"shard": shard, "key": record.key}}
                row = {"shard": shard, "index": record.index, "output": place.shard(plan.number).name}
                rows.append({**row, "output_key": key, "tags": meta["tags"], "caption": caption})
                yield Sample(key, sample.image, caption, meta)

    def _meta(self, sample: Sample, record: Record, caption: str, hands: list[dict]) -> dict:
        settings = self.settings.hands
        words = hand_words(f"{sample.caption}\n{caption}", settings.words) if settings else []
        return {
            **sample.meta,
            "caption": caption,
            "caption_original": sample.meta.get("caption_original", sample.caption),
            "width": record.width,
            "height": record.height,
            "phash": record.phash,
            "faces": record.faces,
            "scores": record.scores,
            "tags": ["hands"] if words or hands else [],
            "hand_words": words,
            "hands": hands,
        }


def _chosen(plan: Output, place: Place) -> Iterator[tuple[str, Sample, Record]]:
    """(raw shard, sample, record) of each sample of ``plan``, in its order."""
    for shard, indices in plan.sources:
        wanted = set(indices)
        records = {r.index: r for r in load_records(place.records(shard)) if r.index in wanted}
        for index, item in enumerate(read_shard(shard)):
            record = records.pop(index, None)
            if record is not None:
                if not isinstance(item, Sample) or item.key != record.key:
                    raise ShardUnreadable(
                        f"{shard} has changed since it was examined: sample {index} was {record.key!r} and is "
                        f"{item.key!r}; delete {place.records(shard)} and resume"
                    )
                yield shard, item, record
            if not records:
                break
        if records:
            raise ShardUnreadable(f"{shard}: {len(records)} examined samples cannot be read any more")
