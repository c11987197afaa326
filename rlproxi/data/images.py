"""Decoding of image files of unknown origin."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image

#: The formats of image-text data sets. Pillow's other readers are not used: some of them start other programs.
FORMATS = ("JPEG", "PNG", "WEBP")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """Bytes are not a usable image. The message is ``kind`` or ``kind: detail``, as the reason of a Skip."""


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file to uint8 [H, W, 3].

    EXIF orientation is applied, transparency is laid over white, and every other mode becomes RGB. Of an animation it
    is the first frame. Raises BadImage, for too many pixels before any is decoded.
    """
    if not data:
        raise BadImage("empty image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at half of its limit; ours is max_pixels
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    limit = f"data.max_pixels = {max_pixels}"
                    raise BadImage(f"image too large: {width} x {height} pixels are more than {limit}")
                turn = _UPRIGHT.get(_orientation(image))
                pixels = _rgb(image)
                return np.array(pixels if turn is None else pixels.transpose(turn))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"image too large: {error}") from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"unknown image format: none of {', '.join(FORMATS)}, or a damaged header") from None
    except Exception as error:  # Pillow's readers raise errors without a common base
        raise BadImage(f"damaged image: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
