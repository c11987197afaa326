"""Decoding: every mode to RGB, and every kind of damage to a reason."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fixtures.shards import encoded, jpeg, png_chunk, png_header, smooth
from rlproxi.data.images import BadImage, decode

LIMIT = 10_000_000
PICTURE = smooth(12, 20)
NO_PIXELS = png_chunk(b"IDAT", b"")


@pytest.mark.parametrize("format, tolerance", [("PNG", 0), ("WEBP", 0), ("JPEG", 12)])
def test_rgb_comes_back(format, tolerance):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(format, {})
    image = decode(encoded(PICTURE, format, **options), LIMIT)
    assert image.shape == (12, 20, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert np.abs(image.astype(int) - PICTURE).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_what_pillow_shows(mode):
    data = encoded(PICTURE, "JPEG" if mode == "CMYK" else "PNG", mode)
    assert Image.open(io.BytesIO(data)).mode == mode
    grey = np.repeat(PICTURE @ [[0.299], [0.587], [0.114]], 3, -1)
    reference = PICTURE.astype(float) if mode in ("P", "CMYK") else grey
    error = np.abs(decode(data, LIMIT) - reference).mean()
    assert error < {"L": 1, "P": 30, "1": 130, "CMYK": 12}[mode]


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.array_equal(decode(encoded(grey, "PNG"), LIMIT)[..., 1], np.arange(256).reshape(16, 16))


def test_transparency_lies_over_white():
    rgba = np.dstack([PICTURE, np.full((12, 20), 64, np.uint8)])
    expected = PICTURE * (64 / 255) + 255 * (1 - 64 / 255)
    assert np.abs(decode(encoded(rgba, "PNG"), LIMIT) - expected).max() <= 1
    # A palette with one transparent entry, and a colour key in RGB.
    index = np.zeros((4, 4), np.uint8)
    index[0] = 1
    image = Image.fromarray(index).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    data = io.BytesIO()
    image.save(data, "PNG", transparency=0)
    pixels = decode(data.getvalue(), LIMIT)
    assert (pixels[0] == [200, 100, 50]).all() and (pixels[1:] == 255).all()
    keyed = decode(encoded(np.full((2, 2, 3), 7, np.uint8), "PNG", transparency=(7, 7, 7)), LIMIT)
    assert (keyed == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """The table of the EXIF standard: where the stored row 0 and column 0 are in the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(PICTURE, "PNG", exif=exif.tobytes()), LIMIT)
    p = PICTURE
    upright = {
        1: p,
        2: p[:, ::-1],
        3: p[::-1, ::-1],
        4: p[::-1],
        5: p.transpose(1, 0, 2),
        6: p[::-1].transpose(1, 0, 2),
        7: p[::-1, ::-1].transpose(1, 0, 2),
        8: p[:, ::-1].transpose(1, 0, 2),
    }
    assert np.array_equal(image, upright[orientation])


def test_broken_exif_is_not_a_broken_image():
    good = encoded(PICTURE, "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode(good, LIMIT).shape == (12, 20, 3)


def test_a_huge_image_is_refused_from_its_header():
    data = png_header(20_000, 20_000) + NO_PIXELS  # and no pixels: a decoder would complain of that
    tracemalloc.start()
    with pytest.raises(BadImage, match="^image too large: "):
        decode(data, LIMIT)
    with pytest.raises(BadImage, match="^image too large: "):
        decode(data, 10**9)  # Pillow's own guard stays
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    with pytest.raises(BadImage, match="4000 x 4000 pixels are more than data.max_pixels = 10000000"):
        decode(png_header(4000, 4000) + NO_PIXELS, LIMIT)
    assert decode(encoded(PICTURE, "PNG"), 240).shape == (12, 20, 3)
    with pytest.raises(BadImage, match="too large"):
        decode(encoded(PICTURE, "PNG"), 239)


def test_bombs_are_bounded():
    # A small picture with 64 MiB of pixels behind it: what the header does not announce is not unpacked.
    row = b"\0" + bytes(3 * 8)
    packer = zlib.compressobj(1)
    rows = packer.compress(row * 8) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    bomb = png_header(8, 8) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    assert len(bomb) < 2**19
    try:
        assert decode(bomb, LIMIT).shape == (8, 8, 3)
    except BadImage as error:
        assert str(error).startswith("damaged image")
    # A text that unpacks to 16 MiB.
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**24)))
    with pytest.raises(BadImage, match="damaged image: .*text|Decompressed"):
        decode(png_header(8, 8) + text + png_chunk(b"IDAT", zlib.compress(row * 8)) + png_chunk(b"IEND", b""), LIMIT)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty image"),
        (b"<html>not found</html>", "unknown image format"),
        (b"\xff\xd8\xff", "unknown image format"),
        (encoded(PICTURE, "GIF"), "unknown image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown image format"),
        (jpeg(200, 200)[:-1000], "damaged image: OSError: image file is truncated"),
        (encoded(smooth(64, 64), "PNG")[:-200], "damaged image"),
        (encoded(smooth(64, 64), "WEBP")[:-200], "unknown image format|damaged image"),
    ],
)
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(BadImage, match=f"^({reason})"):
        decode(data, LIMIT)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    at=st.floats(0, 1),
    junk=st.binary(min_size=1, max_size=40),
    cut=st.booleans(),
)
def test_damage_is_an_image_or_a_bad_image_and_nothing_else(kind, at, junk, cut):
    data = bytearray(encoded(PICTURE, kind))
    start = int(at * len(data))
    data[start:] = b"" if cut else junk + data[start + len(junk) :]
    try:
        assert decode(bytes(data), LIMIT).dtype == np.uint8
    except BadImage as error:
        assert str(error)


def test_a_truncated_jpeg_with_its_end_marker_is_found_too():
    assert struct.pack(">H", 0xFFD9) == jpeg()[-2:]
    with pytest.raises(BadImage):
        decode(jpeg(200, 200)[:300], LIMIT)
