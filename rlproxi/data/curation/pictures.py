"""Thumbnails of single samples for the statistics page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, islice

from PIL import Image, ImageDraw

from ..images import BadImage, decode
from ..shards import Sample, read_shard
from .merge import Statistics

_SIDE = 176  # pixels


def wanted(statistics: Statistics, stages: Sequence[str]) -> dict[str, dict[int, list[dict]]]:
    """shard -> index -> faces, for every example of ``stages``."""
    needed: dict[str, dict[int, list[dict]]] = {}
    for example in chain.from_iterable(map(statistics.examples, stages)):
        needed.setdefault(example.shard, {})[example.index] = example.faces
    return needed


def peek(shard: str, chosen: dict[int, list[dict]], max_pixels: int) -> dict[int, str]:
    """index -> a ``data:`` address of its thumbnail with frames around the faces."""
    found: dict[int, str] = {}
    for index, item in enumerate(islice(read_shard(shard), max(chosen) + 1)):
        if index in chosen and isinstance(item, Sample):
            with suppress(BadImage):
                found[index] = thumbnail(Image.fromarray(decode(item.image, max_pixels)), chosen[index])
    return found


def thumbnail(picture: Image.Image, faces: Sequence[dict]) -> str:
    """The picture as a small JPEG in a ``data:`` address, with a frame around each face."""
    scale = _SIDE / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(small)
    for face in faces:
        x, y, w, h = (face[k] * scale for k in "xywh")
        draw.rectangle((x, y, x + w, y + h), outline=(63, 185, 80), width=2)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
