"""The steps that examine one image at a time: size, faces, scores, hash. They turn a raw shard into records."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ...config.curation import Curate, Filter
from ...rewards import build, parameters
from ...rewards.base import RewardError, Scorer
from ..images import FORMATS, BadImage, decode
from ..shards import UNREADABLE as UNREADABLE_FILE
from ..shards import Sample, read_shard
from . import faces
from .phash import phash
from .records import FACES, SIZE, UNREADABLE, Record, filter_stage


class ShardUnreadable(OSError):
    """A raw shard could not be opened or read to its end; a later try may succeed."""


@dataclass
class Tools:
    """The models of the steps, loaded once and used for many shards."""

    detector: faces.FaceDetector | None = None
    scorers: dict[str, Scorer] = field(default_factory=dict)

    @classmethod
    def load(cls, settings: Curate, device: str) -> Tools:
        """Load the models. Raises ImportError, FileNotFoundError or ValueError for one that cannot be loaded."""
        scorers = {}
        for f in settings.filters:
            own = {"device": device} if "device" in parameters(f.kind) else {}
            scorers[f.name] = build(f.kind, {**own, **f.params})
        return cls(faces.build_detector(settings.faces) if settings.faces else None, scorers)


def examine(shard: str, settings: Curate, tools: Tools) -> list[Record]:
    """The records of all samples of ``shard``, in its order.

    Memory holds at most ``settings.batch`` decoded images. Raises ShardUnreadable, and RewardError if a scorer fails.
    """
    records: list[Record] = []
    waiting: list[_Decoded] = []
    for index, item in enumerate(read_shard(shard)):
        record = Record(index, item.key)
        records.append(record)
        if not isinstance(item, Sample):
            if item.kind == UNREADABLE_FILE and not item.key:
                raise ShardUnreadable(f"{shard}: {item.reason}")
            record.drop(UNREADABLE, item.reason)
            continue
        record.words = len(item.caption.split())
        image = _decoded(item, record, settings)
        if image is not None:
            waiting.append(_Decoded(record, image, item.caption))
        if len(waiting) == settings.batch:
            _look(waiting, settings, tools)
            waiting = []
    _look(waiting, settings, tools)
    return records


@dataclass
class _Decoded:
    record: Record
    image: np.ndarray
    caption: str


def _decoded(sample: Sample, record: Record, settings: Curate) -> np.ndarray | None:
    """The pixels; None if the sample was dropped. The header reveals most small images before they are decoded."""
    try:
        header = _header_size(sample.image)
        if header is not None and header[0] * header[1] <= settings.max_pixels and _size(record, *header, settings):
            return None
        image = decode(sample.image, settings.max_pixels)
    except BadImage as error:
        record.drop(UNREADABLE, str(error).replace("data.max_pixels", "curate.max_pixels"))
        return None
    return None if _size(record, image.shape[1], image.shape[0], settings) else image


def _header_size(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # Pillow's parsers have no common error, and `decode` reports what is wrong
        return None


def _size(record: Record, width: int, height: int, settings: Curate) -> bool:
    """Record the size; return whether it drops the sample."""
    record.width, record.height = width, height
    short, long = sorted((width, height))
    if short < settings.min_size:
        record.drop(SIZE, f"shorter side {short} px, needs {settings.min_size}")
    elif long > settings.max_aspect * short:
        record.drop(SIZE, f"aspect {long / short:.4g}, at most {settings.max_aspect:g}")
    return record.stage is not None


def _look(waiting: list[_Decoded], settings: Curate, tools: Tools) -> None:
    if settings.faces and tools.detector:
        for one in waiting:
            one.record.faces = tools.detector(one.image)
            reason = faces.objection(one.record.faces, settings.faces)
            if reason:
                one.record.drop(FACES, reason)
    for f in settings.filters:
        for group in _same_size([one for one in waiting if one.record.stage is None]):
            _score(group, f, tools.scorers[f.name])
    for one in waiting:
        if one.record.stage is None:
            one.record.phash = f"{phash(one.image):016x}"


def _same_size(waiting: list[_Decoded]) -> Iterator[list[_Decoded]]:
    sizes: dict[tuple, list[_Decoded]] = {}
    for one in waiting:
        sizes.setdefault(one.image.shape, []).append(one)
    yield from sizes.values()


def _score(group: list[_Decoded], settings: Filter, scorer: Scorer) -> None:
    images, captions = np.stack([one.image for one in group]), [one.caption for one in group]
    try:
        scores = np.asarray(scorer.score(images, captions), np.float32)
    except Exception as error:  # a user's scorer may raise anything
        raise RewardError(f"filter {settings.name!r} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(group),):
        raise RewardError(f"filter {settings.name!r} returned shape {scores.shape} for {len(group)} images")
    for one, score in zip(group, scores.tolist(), strict=True):
        if not np.isfinite(score):
            one.record.drop(filter_stage(settings.name), f"{settings.name} gave no score ({score})")
            continue
        one.record.scores[settings.name] = score = round(score, 6)
        if settings.min is not None and score < settings.min:
            one.record.drop(filter_stage(settings.name), f"{settings.name} {score:.6g}, needs {settings.min:g}")
        elif settings.max is not None and score > settings.max:
            one.record.drop(filter_stage(settings.name), f"{settings.name} {score:.6g}, at most {settings.max:g}")
