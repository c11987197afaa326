"""Raw shards for the curation's tests: photographs that scikit-image ships, and portraits drawn here, written by the
webdataset library in img2dataset's layout."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from rlproxi.data import faces


@lru_cache(maxsize=None)
def photograph(name: str) -> Image.Image:
    """One of scikit-image's own photographs: astronaut (512 x 512, a face of 95 pixels), coffee, chelsea, rocket."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    return Image.open(next(folder.glob(f"{name}.*"))).convert("RGB")


@lru_cache(maxsize=None)
def real_face(index: int, size: int = 256) -> Image.Image:
    """Face ``index`` of the hundred of scikit-image's part of Labeled Faces in the Wild, enlarged from 25 x 25."""
    import skimage.data

    grey = np.load(Path(skimage.data.__file__).parent / "lfw_subset.npy")[index]
    grey = np.pad((grey.clip(0, 1) * 255).astype(np.uint8), 8, mode="edge")
    return Image.fromarray(grey).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def portrait(index: int, size: int = 256) -> tuple[Image.Image, str]:
    """A drawn portrait and its caption."""
    drawn = faces.portrait(7, index)
    return Image.fromarray(faces.render([drawn], size)[0]), drawn.caption


def encoded(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, bytes, str | None, dict | None]]) -> Path:
    """(key, image file, caption or None, json or None) -> a tar, by the webdataset library."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, image, caption, meta in samples:
            sample = {"__key__": key, "png" if image.startswith(b"\x89PNG") else "jpg": image}
            extra = {"txt": caption, "json": meta}
            writer.write(sample | {ending: value for ending, value in extra.items() if value is not None})
    return path


def write_mixed(folder: Path) -> list[Path]:
    """Two shards with one case of everything; ``MIXED`` tells what becomes of each at faces of 64 pixels."""
    astronaut = photograph("astronaut")
    smaller = astronaut.resize((384, 384), Image.Resampling.LANCZOS)
    first = [
        ("000000000", encoded(astronaut, "PNG"), "an astronaut in front of a flag", {"url": "a", "status": "success"}),
        ("000000001", encoded(photograph("coffee"), quality=90), "a cup of coffee", None),
        ("000000002", encoded(photograph("chelsea"), quality=90), "a tabby cat", {"url": "b"}),
        ("000000003", encoded(astronaut.resize((200, 200))), "a tiny astronaut", None),
        ("000000004", encoded(astronaut.resize((800, 300)), "PNG"), "a wide astronaut", None),
        ("000000005", encoded(photograph("rocket"))[:5000], "half a rocket", None),
        ("000000006", encoded(photograph("coffee"), "PNG"), None, None),
        ("000000007", encoded(real_face(0)), "a man waves a Hand", {"similarity": 0.3}),
    ]
    second = [
        ("000010000", encoded(smaller, quality=60), "the same astronaut, small and re-encoded", None),
        ("000010001", encoded(real_face(1)), "portrait of a person", None),
        ("000010002", encoded(real_face(0).resize((320, 320)), quality=50), "the man again, larger", None),
        ("000010003", b"not an image at all", "nothing", None),
        ("000010004", encoded(portrait(0)[0], "PNG"), portrait(0)[1], None),
        ("000010005", encoded(real_face(2, 1024).crop((120, 120, 376, 376))), "skin", None),
    ]
    return [write_tar(folder / "00000.tar", first), write_tar(folder / "00001.tar", second)]


#: key -> (stage that drops it, part of the reason), or (None, tags).
MIXED = {
    "000000000": (None, []),
    "000000001": ("faces", "no face"),
    "000000002": ("faces", "no face"),
    "000000003": ("size", "shorter side 200 px, needs 256"),
    "000000004": ("size", "aspect 2.667, at most 2"),
    "000000005": ("unreadable", "damaged image"),
    "000000006": ("unreadable", "no caption"),
    "000000007": ("duplicates", "copy of 00001.tar/000010002 (320 x 320)"),
    "000010000": ("duplicates", "copy of 00000.tar/000000000 (512 x 512)"),
    "000010001": (None, []),
    "000010002": (None, []),
    "000010003": ("unreadable", "unknown image format"),
    "000010004": ("faces", "no face"),
    "000010005": ("faces", "no face"),
}
