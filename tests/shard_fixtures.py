"""Encoded images and shards for tests; tars by the webdataset library, in img2dataset's layout."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import webdataset
from PIL import Image


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture, so that JPEG keeps it: uint8 [H, W, 3]."""
    phase = np.random.default_rng(seed).random((3, 3)) * 6
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(4 * y * p[0] + p[1]) * np.cos(4 * x + p[2]) for p in phase]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "JPEG", mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels)
    data = io.BytesIO()
    (image.convert(mode) if mode else image).save(data, format, **options)
    return data.getvalue()


def jpeg(height: int = 24, width: int = 32, seed: int = 0) -> bytes:
    return encoded(smooth(height, width, seed), quality=95)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG, up to where its pixels begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sample(number: int, image: bytes | None = None, caption: str | bytes | None = None, **more) -> dict:
    """One sample as img2dataset hands it to webdataset; ``more``: members by their ending, None leaves one out."""
    key = f"{number:09d}"
    members = {"__key__": key, "jpg": jpeg(seed=number) if image is None else image,
               "txt": f"picture number {number}" if caption is None else caption,
               "json": {"key": key, "status": "success", "width": 32}, **more}
    return {name: value for name, value in members.items() if value is not None}


def write_tar(path, samples: list[dict]) -> str:
    # As img2dataset does: the encoder takes bytes as they are and encodes str and json.
    with open(path, "wb") as file, webdataset.TarWriter(file) as writer:
        for one in samples:
            writer.write({name: value.encode() if name == "txt" and isinstance(value, str) else value
                          for name, value in one.items()})
    return str(path)
