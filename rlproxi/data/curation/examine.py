"""The steps that examine one image at a time: size, faces, scores, hash. They turn a raw shard into records."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from PIL import Image

from ...config.curation import Curate, Filter
from ...rewards import build, parameters
from ...rewards.base import RewardError, Scorer
from ..images import FORMATS, BadImage, decode
from ..shards import Sample, read_whole_shard
from . import faces
from .phash import phash
from .records import FACES, SIZE, UNREADABLE, Record, filter_stage

#: A sample that passed so far, its pixels, and its caption.
_Decoded = tuple[Record, np.ndarray, str]


class Examiner:
    """Examines raw shards, with the models of the steps, which it loads once.

    Raises ImportError, FileNotFoundError or ValueError for a model that cannot be loaded.
    """

    def __init__(self, settings: Curate, device: str = "cpu"):
        self.settings = settings
        self.detector = faces.build_detector(settings.faces) if settings.faces else None
        self.scorers: dict[str, Scorer] = {}
        for f in settings.filters:
            own = {"device": device} if "device" in parameters(f.kind) else {}
            self.scorers[f.name] = build(f.kind, {**own, **f.params})

    def examine(self, shard: str) -> list[Record]:
        """The records of all samples of ``shard``, in order. Raises ShardUnreadable, RewardError if a scorer fails."""
        records: list[Record] = []
        decoded = self._decoded(shard, records)
        while batch := list(islice(decoded, self.settings.batch)):
            self._look(batch)
        return records

    def _decoded(self, shard: str, records: list[Record]) -> Iterator[_Decoded]:
        """The samples of a good size; the records of all samples are appended to ``records``."""
        for index, item in enumerate(read_whole_shard(shard)):
            record = Record(index, item.key)
            records.append(record)
            if isinstance(item, Sample):
                record.words = len(item.caption.split())
                image = self._pixels(item, record)
                if image is not None:
                    yield record, image, item.caption
            else:
                record.drop(UNREADABLE, item.reason)

    def _pixels(self, sample: Sample, record: Record) -> np.ndarray | None:
        """None if the sample was dropped. The header reveals most small images before they are decoded."""
        limit = self.settings.max_pixels
        try:
            header = _header_size(sample.image)
            if header and header[0] * header[1] <= limit and self._size_drops(record, *header):
                return None
            image = decode(sample.image, limit)
        except BadImage as error:
            record.drop(UNREADABLE, str(error).replace("data.max_pixels", "curate.max_pixels"))
            return None
        return None if self._size_drops(record, image.shape[1], image.shape[0]) else image

    def _size_drops(self, record: Record, width: int, height: int) -> bool:
        """Record the size; return whether it drops the sample."""
        record.width, record.height = width, height
        short, long = sorted((width, height))
        if short < self.settings.min_size:
            record.drop(SIZE, f"shorter side {short} px, needs {self.settings.min_size}")
        elif long > self.settings.max_aspect * short:
            record.drop(SIZE, f"aspect {long / short:.4g}, at most {self.settings.max_aspect:g}")
        return record.stage is not None

    def _look(self, batch: list[_Decoded]) -> None:
        if self.settings.faces and self.detector:
            for record, image, _ in batch:
                record.faces = self.detector(image)
                reason = faces.objection(record.faces, self.settings.faces)
                if reason:
                    record.drop(FACES, reason)
        for f in self.settings.filters:
            sizes: dict[tuple, list[_Decoded]] = {}
            for one in batch:
                if one[0].stage is None:
                    sizes.setdefault(one[1].shape, []).append(one)
            for group in sizes.values():
                _score(group, f, self.scorers[f.name])
        for record, image, _ in batch:
            if record.stage is None:
                record.phash = f"{phash(image):016x}"


def _header_size(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # Pillow's parsers have no common error, and `decode` reports what is wrong
        return None


def _score(group: Sequence[_Decoded], settings: Filter, scorer: Scorer) -> None:
    records, images, captions = zip(*group, strict=True)
    name, stage = settings.name, filter_stage(settings.name)
    try:
        scores = np.asarray(scorer.score(np.stack(images), list(captions)), np.float32)
    except Exception as error:  # a user's scorer may raise anything
        raise RewardError(f"filter {name!r} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(group),):
        raise RewardError(f"filter {name!r} returned shape {scores.shape} for {len(group)} images")
    for record, score in zip(records, scores.tolist(), strict=True):
        if not np.isfinite(score):
            record.drop(stage, f"{name} gave no score ({score})")
            continue
        record.scores[name] = score = round(score, 6)
        if settings.min is not None and score < settings.min:
            record.drop(stage, f"{name} {score:.6g}, needs {settings.min:g}")
        elif settings.max is not None and score > settings.max:
            record.drop(stage, f"{name} {score:.6g}, at most {settings.max:g}")
