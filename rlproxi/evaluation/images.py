"""Image grids for people to look at, and PNG bytes for files and pages. PIL and numpy only."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

_GAP = 4  # pixels between images
_PAPER, _FAINT = (255, 255, 255), (110, 118, 129)
_LOW, _HIGH = (207, 63, 63), (46, 140, 87)


def check(images: np.ndarray) -> np.ndarray:
    """Return ``images`` as an array. Raises ValueError unless it is uint8 [N, H, W, 3] with N >= 1."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 3] with N >= 1, got {images.dtype} {list(images.shape)}")
    return images


def enlarge(image: np.ndarray, scale: int = 1) -> Image.Image:
    """Return uint8 [H, W, 3] as a PIL image with each pixel a square of ``scale`` pixels, without smoothing."""
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be at least 1")
    picture = Image.fromarray(image)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def grid(images: np.ndarray, columns: int | None = None, scale: int = 1) -> Image.Image:
    """Return uint8 [N, H, W, 3] as one picture, row by row; the last row may be short.

    ``columns`` None makes about a square. Raises ValueError for other dtypes or shapes.
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


def score_colour(score: float, low: float = 0.0, high: float = 1.0) -> tuple[int, int, int]:
    """Return RGB: red at ``low``, green at ``high``, grey for a missing score (NaN)."""
    if not np.isfinite(score):
        return _FAINT
    share = float(np.clip((score - low) / (high - low if high > low else 1.0), 0, 1))
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_LOW, _HIGH, strict=True))
    return red, green, blue


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """Return an image (uint8 [H, W, 3] or PIL) as the bytes of a PNG file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: Image.Image | np.ndarray, longest: int = 256) -> str:
    """Return a ``data:`` address that holds the whole PNG; images beyond ``longest`` pixels are scaled down first."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if max(picture.size) > longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def save_png(image: Image.Image | np.ndarray, path: str | Path) -> Path:
    """Write a PNG, make its folder, and return the path. Raises ValueError for another file ending."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png: that is what is written")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image))
    return path
