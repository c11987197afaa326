"""Image grids for people to look at, and PNG bytes for files and pages. PIL and numpy only."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 4  # pixels between images
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 28, 34), (110, 118, 129)
_LOW, _HIGH = (207, 63, 63), (46, 140, 87)


def check(images: np.ndarray) -> np.ndarray:
    """``images`` if it is uint8 [N, H, W, 3] with N >= 1; ValueError says what it is instead."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 3] with N >= 1, got {images.dtype} {list(images.shape)}")
    return images


def enlarge(image: np.ndarray, scale: int = 1) -> Image.Image:
    """[H, W, 3] uint8 -> PIL image, each pixel a ``scale`` x ``scale`` square: small images stay honest."""
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be at least 1")
    picture = Image.fromarray(image)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def grid(images: np.ndarray, columns: int | None = None, scale: int = 1) -> Image.Image:
    """uint8 [N, H, W, 3] -> one picture, row by row; the last row may be short.

    ``columns`` defaults to about a square. Raises ValueError for other dtypes or shapes.
    """
    images = check(images)
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(count**0.5))
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    columns = min(columns, count)
    rows = -(-count // columns)
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    sheet = Image.new("RGB", (columns * step_x - _GAP, rows * step_y - _GAP), _PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(enlarge(image, scale), (column * step_x, row * step_y))
    return sheet


@dataclass(frozen=True)
class Row:
    """One prompt: images uint8 [S, H, W, 3] and optionally their scores [S], before and after."""

    caption: str
    before: np.ndarray
    after: np.ndarray
    before_scores: Sequence[float] | None = None
    after_scores: Sequence[float] | None = None


def score_colour(score: float, low: float = 0.0, high: float = 1.0) -> tuple[int, int, int]:
    """Red at ``low``, green at ``high``, grey for a missing score."""
    if not np.isfinite(score):
        return _FAINT
    share = float(np.clip((score - low) / (high - low if high > low else 1.0), 0, 1))
    return tuple(round(a + share * (b - a)) for a, b in zip(_LOW, _HIGH))


def captioned_grid(rows: Sequence[Row], scale: int = 4, titles: tuple[str, str] = ("before", "after")) -> Image.Image:
    """Rows of captions, with the images before on the left and those after on the right.

    Under each image with a score stands the number, and a bar that is as long as the score is high
    between the lowest and the highest score shown.
    """
    if not rows:
        raise ValueError("captioned_grid needs at least one row")
    font = ImageFont.load_default(size=12)
    line, mark = 16, 20
    shape = check(rows[0].before).shape
    cell_w, cell_h = shape[2] * scale + _GAP, shape[1] * scale + _GAP + mark
    most = max(max(len(check(r.before)), len(check(r.after))) for r in rows)
    side, middle = most * cell_w, 16
    width = 2 * side + middle + 2 * _GAP
    captions = [textwrap.wrap(r.caption or "(no caption)", max(16, width // 7)) for r in rows]
    height = line + sum(len(c) * line + cell_h + _GAP for c in captions) + _GAP
    scores = [s for r in rows for part in (r.before_scores, r.after_scores) if part is not None for s in part]
    finite = [s for s in scores if np.isfinite(s)] or [0.0]
    low, high = min(0.0, *finite), max(finite)

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = (_GAP, _GAP + side + middle)
    for left, title in zip(lefts, titles):
        draw.text((left, 0), title, _FAINT, font)
    top = line
    for row, caption in zip(rows, captions):
        for text in caption:
            draw.text((_GAP, top), text, _INK, font)
            top += line
        for left, images, marks in zip(lefts, (row.before, row.after), (row.before_scores, row.after_scores)):
            for index, image in enumerate(images):
                x = left + index * cell_w
                picture = enlarge(image, scale)
                sheet.paste(picture, (x, top))
                if marks is not None:
                    _mark(draw, font, x, top + picture.height + 2, picture.width, float(marks[index]), low, high)
        top += cell_h + _GAP
    return sheet


def _mark(draw, font, x: int, y: int, width: int, score: float, low: float, high: float) -> None:
    colour = score_colour(score, low, high)
    share = (score - low) / (high - low) if np.isfinite(score) and high > low else 0.0
    draw.rectangle((x, y, x + max(1, round(share * width)) - 1, y + 3), colour)
    draw.text((x, y + 4), f"{score:.2f}" if np.isfinite(score) else "no score", colour, font)


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """The image ([H, W, 3] uint8 or PIL) as a PNG file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: Image.Image | np.ndarray, longest: int = 256) -> str:
    """A ``data:`` address that holds the whole PNG; images beyond ``longest`` pixels are scaled down first."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if max(picture.size) > longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def save_png(image: Image.Image | np.ndarray, path: str | Path) -> Path:
    """Writes a PNG, making its folder, and returns the path. Raises ValueError for another file ending."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png: that is what is written")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image))
    return path
