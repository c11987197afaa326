"""Shards, images, encoded shards, models of images: a bad sample is a Skip, a bad file an error that names it."""

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zlib

import pytest

from fuzz.hunt import Reader, examples, hunted
from fuzz.spoil import spoil, spoilt_json

INPUTS = {"tar": 700, "parquet": 200, "image": 700, "image file": 150, "cached shard": 300, "manifest": 250}


def _tar(members, format=tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data, *more in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in more[0].items() if more else ():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs() -> list[bytes]:
    """PNGs of few bytes that stand for many."""

    def head(width, height, depth=8, color=2):
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))

    zeros = zlib.compress(bytes(30 << 20), 1)
    return [
        head(50_000, 50_000) + _chunk(b"IDAT", zeros),
        head(2**31 - 1, 2**31 - 1),
        head(2**31 - 1, 1) + _chunk(b"IDAT", zeros),
        head(4, 4) + _chunk(b"iCCP", b"x\0\0" + zeros) + _chunk(b"IDAT", zeros),
        head(4, 4)
        + _chunk(b"zTXt", b"x\0\0" + zeros) * 30
        + _chunk(b"IDAT", zlib.compress(bytes(52)))
        + _chunk(b"IEND", b""),
        head(4, 4)
        + _chunk(b"IDAT", zlib.compress(bytes(52)))
        + _chunk(b"iTXt", b"x\0\1\0\0\0" + zeros) * 30
        + _chunk(b"IEND", b""),
        head(0, 0),
        head(1, 1, 16, 6),
        head(1, 1, 3, 9),
    ]


def readers(folder):
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    from rlproxi.data import cache
    from rlproxi.data.images import BadImage, decode
    from rlproxi.data.shards import Sample, Skip, read_shard, write_shard
    from rlproxi.rewards.api import score_images

    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 4), np.uint8)
    pictures = []
    for kind, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "L", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
    ):
        stream = io.BytesIO()
        image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
        (image.convert("I").convert("I;16") if mode == "I;16" else image).save(stream, kind, **options)
        pictures.append(stream.getvalue())

    sample = [
        ("a/0001.jpg", pictures[0]),
        ("a/0001.txt", b"a hat"),
        ("a/0001.json", b'{"width": 7}'),
        ("0002.png", pictures[3]),
        ("0002.txt", "caf\u00e9".encode()),
        ("0003.webp", pictures[6]),
        ("0003.txt", b"boat"),
    ]
    tars = [
        _tar(sample),
        _tar(sample, tarfile.PAX_FORMAT),
        _tar([*sample[:2], ("link", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})]),
    ]
    strange = [
        _tar([("0.jpg", pictures[0]), ("0.txt", b"x"), ("0.json", b"[" * 100_000)]),
        _tar([("0.jpg", pictures[0]), ("0.txt", b"\xff")]),
        _tar([("../../0.jpg", pictures[0]), ("../../0.txt", b"x")]),
        _tar([("/etc/x.jpg", pictures[0]), ("/etc/x.txt", b"x")]),
        _tar([("0.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), ("0.txt", b"x")]),
        _tar([("0.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "../x"}), ("0.txt", b"x")]),
        _tar([("0.jpg", b"", {"type": tarfile.FIFOTYPE})]),
        _tar([("d/" * 300 + "0.jpg", pictures[0]), ("n" * 70_000 + ".txt", b"x")]),
        _tar([("0.jpg", pictures[0], {"pax_headers": {"size": "9" * 40}})], tarfile.PAX_FORMAT),
        _tar(
            [
                (
                    "0.jpg",
                    pictures[0],
                    {
                        "pax_headers": {
                            "GNU.sparse.map": "0," * 5001,
                            "GNU.sparse.size": "9" * 30,
                            "GNU.sparse.major": "1",
                        }
                    },
                )
            ],
            tarfile.PAX_FORMAT,
        ),
        _huge_member(),
        _sparse_member(),
        _long_name(),
        _forged("0.jpg", b"\x80" + (2**60).to_bytes(11, "big")) + bytes(2048),
        _forged("0.jpg", b"\xff" * 12) + bytes(2048),
        gzip.compress(_forged("././@LongLink", b"\x80" + (20 << 20).to_bytes(11, "big"), b"L") + bytes(20 << 20)),
        gzip.compress(bytes(30 << 20), 1),
        bz2.compress(bytes(10 << 20)),
        lzma.compress(bytes(10 << 20), preset=0),
        b"",
        bytes(512),
        bytes(10240) + b"x",
    ]

    shard = folder / "shard.tar"
    count = [0]

    def read_tar(data, path=shard):
        path.write_bytes(data)
        found = list(read_shard(str(path)))
        assert all(isinstance(item, (Sample, Skip)) for item in found) and len(found) < 4000
        # What is read can be written, and has no name that would leave the folder of who unpacks it.
        kept = [item for item in found if isinstance(item, Sample)]
        assert not any(item.key.startswith("/") or ".." in item.key.split("/") for item in kept)
        count[0] += 1
        if kept and count[0] % 8 == 0:
            write_shard(folder / "again.tar", kept)

    table = pyarrow.table(
        {"image": pictures[:3], "caption": ["a", "b", "c"], "key": ["1", "2", "3"], "n": [1.5, None, 3]}
    )
    parquets = []
    for options in (
        {},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": False},
    ):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(table, stream, **options)
        parquets.append(stream.getvalue())

    class Mean:
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    def image_file(data):
        (folder / "image.png").write_bytes(data)
        score_images(Mean(), [folder / "image.png"], "x")

    rows = cache.Rows()
    for i in range(3):
        rows.add(
            (8, 8), image=np.zeros((8, 8, 3), np.uint8), size=np.zeros(4, np.int32), caption=f"caption {i}", key=f"{i}"
        )
    rows.skips = [Skip("s", "k", "no image")]
    rows.save(folder / "cached.safetensors", "s")
    cached = (folder / "cached.safetensors").read_bytes()
    head = int.from_bytes(cached[:8], "little")
    import json

    header, body = json.loads(cached[8 : 8 + head]), cached[8 + head :]

    def safetensors(draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return spoil(draw, cached)
        text = spoilt_json(draw, [header])
        return len(text).to_bytes(8, "little") + text + body

    def cached_shard(data):
        path = folder / "x.safetensors"
        path.write_bytes(data)
        found = cache.CachedShard(path)
        found.skips()
        list(found.captions())
        for bucket, number in found.counts().items():
            for row in range(min(number, 3)):
                found.row(bucket, row)

    class Known:
        """A config is not needed to read a manifest, only its place."""

    place = folder / "manifest-x.jsonl"
    cache.manifest_path = lambda config, where: place
    lines = [
        {"shards": 1, "samples": 3},
        {"shard": "s", "file": "f", "rows": {"8x8": 3}, "skipped": {"no image": 1}},
        {"shard": "s", "key": "k", "reason": "no image"},
    ]

    def manifest(draw: random.Random) -> bytes:
        spoilt = [spoilt_json(draw, [line]) if draw.random() < 0.5 else json.dumps(line).encode() for line in lines]
        return spoil(draw, b"\n".join(spoilt)) if draw.random() < 0.2 else b"\n".join(spoilt)

    def read_manifest(data):
        place.write_bytes(data)
        cache.read_index(Known(), folder)

    return {
        "tar": Reader(examples(strange, lambda draw: spoil(draw, draw.choice(tars), tars)), read_tar),
        "parquet": Reader(
            lambda draw, i: spoil(draw, draw.choice(parquets), parquets),
            lambda data: read_tar(data, folder / "s.parquet"),
        ),
        "image": Reader(
            examples(bombs(), lambda draw: spoil(draw, draw.choice(pictures), pictures)),
            lambda data: decode(data, 10_000_000),
            (BadImage,),
        ),
        "image file": Reader(
            examples(bombs(), lambda draw: spoil(draw, draw.choice(pictures), pictures)),
            image_file,
            (ValueError,),
            "image.png",
        ),
        "cached shard": Reader(lambda draw, i: safetensors(draw), cached_shard, (ValueError,), "x.safetensors"),
        "manifest": Reader(lambda draw, i: manifest(draw), read_manifest, (ValueError,), "manifest-x.jsonl"),
    }


def _forged(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar's header with any size."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _huge_member() -> bytes:
    return _forged("0.jpg", b"\x80" + (200 << 20).to_bytes(11, "big")) + bytes(2048)  # below the limit, and not there


def _sparse_member() -> bytes:
    block = bytearray(_forged("0.jpg", b"00000000000\0", b"S"))
    block[386:398], block[398:410], block[483:495] = (
        b"0" * 11 + b"\0",
        b"0" * 11 + b"\0",
        b"\x80" + (200 << 20).to_bytes(11, "big"),
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(2048)


def _long_name() -> bytes:
    return _forged("././@LongLink", b"\x80" + (2**60).to_bytes(11, "big"), b"L") + bytes(2048)


def test_shards_and_images():
    hunted("test_shard_files", INPUTS)


@pytest.mark.exhaustive
def test_more_shards_and_images():
    hunted("test_shard_files", {name: 20 * count for name, count in INPUTS.items()})
