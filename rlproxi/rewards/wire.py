"""The format of requests and answers between the ``http`` scorer and its server: arrays, PNGs and text, no pickles.

Both sides use this module. docs/rewards/http.md describes the format for a server in another language.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

NPZ, JSON = "application/x-npz", "application/json"

#: The ``format`` parameter -> the content type of the request.
CONTENT_TYPES = {"npz": NPZ, "json": JSON}


class WireError(ValueError):
    """A body that does not have the format."""


def media_type(header: str | None) -> str:
    """'Application/JSON; charset=utf-8' -> 'application/json'."""
    return (header or "").partition(";")[0].strip().lower()


def request_id(images: np.ndarray, prompts: Sequence[str]) -> str:
    """The SHA-256 (hex) of a request's content: the same for a repeated request, in either format."""
    head = json.dumps([list(images.shape), list(prompts)]).encode()
    return hashlib.sha256(head + b"\0" + np.ascontiguousarray(images).tobytes()).hexdigest()


def answer_limit(count: int) -> int:
    """The largest answer of ``count`` scores in bytes: several times what either format needs."""
    return 65536 + 64 * count


def encode_request(content_type: str, images: np.ndarray, prompts: Sequence[str]) -> bytes:
    """images uint8 [B, H, W, 3] and B prompts -> the body of one POST."""
    if content_type == NPZ:
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(list(prompts)).encode(), np.uint8)
        np.savez(buffer, images=np.ascontiguousarray(images), prompts=text)
        return buffer.getvalue()
    pictures = [base64.b64encode(_png(image)).decode() for image in images]
    return json.dumps({"images": pictures, "prompts": list(prompts)}).encode()


def decode_request(content_type: str, body: bytes, limit: int) -> tuple[np.ndarray, list[str]]:
    """The body of a POST -> (images uint8 [B, H, W, 3], B prompts).

    Raises WireError for anything else, and where the arrays or decoded images would have more than ``limit`` bytes: a
    small compressed body may hold large ones.
    """
    if media_type(content_type) == NPZ:
        arrays = _members(body, ("images", "prompts"), limit)
        images, prompts = arrays["images"], _texts(arrays["prompts"])
    elif media_type(content_type) == JSON:
        value = _json(body)
        if not isinstance(value, dict) or not {"images", "prompts"} <= set(value):
            raise WireError('the JSON body is not of the form {"images": [...], "prompts": [...]}')
        images, prompts = _pictures(value["images"], limit), value["prompts"]
    else:
        raise WireError(f"content type {content_type!r} is neither {NPZ} nor {JSON}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise WireError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError("prompts are not a list of texts")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:
        raise WireError(f"prompts are no text: {error.reason}") from None
    if len(prompts) != len(images):
        raise WireError(f"{len(prompts)} prompts for {len(images)} images")
    return images, prompts


def encode_scores(content_type: str, scores: np.ndarray) -> bytes:
    """float32 [B] -> the body of an answer."""
    if media_type(content_type) == NPZ:
        buffer = io.BytesIO()
        np.savez(buffer, scores=np.asarray(scores, np.float32))
        return buffer.getvalue()
    return json.dumps({"scores": [float(score) for score in scores]}).encode()


def decode_scores(content_type: str | None, body: bytes, count: int) -> np.ndarray:
    """The body of an answer -> float32 [count], all finite. Raises WireError for anything else."""
    if media_type(content_type) == NPZ:
        scores = _members(body, ("scores",), answer_limit(count))["scores"]
        if scores.dtype.kind != "f":
            raise WireError(f"scores are {scores.dtype}, expected float32")
    elif media_type(content_type) == JSON:
        value = _json(body)
        listed = value.get("scores") if isinstance(value, dict) else None
        # isinstance() would accept a bool, and numpy the text "1.0".
        if not isinstance(listed, list) or not all(type(x) in (int, float) for x in listed):
            raise WireError('the answer is not of the form {"scores": [numbers]}')
        try:
            scores = np.array(listed, np.float64)
        except OverflowError:
            raise WireError("a score is larger than a number can be") from None
    else:
        raise WireError(f"content type {content_type!r} is neither {NPZ} nor {JSON}")
    if scores.shape != (count,):
        raise WireError(f"scores of shape {list(scores.shape)} for {count} images")
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise WireError(f"{int((~np.isfinite(scores)).sum())} of {count} scores are NaN or infinite")
    return scores


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON: {error}") from None


def _members(body: bytes, names: Sequence[str], limit: int) -> dict[str, np.ndarray]:
    """The named arrays of an npz, read-only. ``np.load`` would allocate what a header claims before it reads it."""
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            infos = {name: archive.getinfo(f"{name}.npy") for name in names}
            size = sum(info.file_size for info in infos.values())
            if size > limit:
                raise WireError(f"the arrays have {size} bytes, {limit} are allowed")
            return {name: _array(name, _content(archive, info)) for name, info in infos.items()}
    except KeyError as error:
        raise WireError(f"the npz lacks an array: {error.args[0]}") from None
    except WireError:
        raise
    except Exception as error:  # zipfile and zlib raise many types for damaged numbers
        raise WireError(f"the body is not an npz: {error}") from None


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WireError(f"{info.filename} is compressed by a method that an npz does not use")
    with archive.open(info) as stream:
        return stream.read(info.file_size)  # no more than the entry claims, however much it inflates to


def _array(name: str, raw: bytes) -> np.ndarray:
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise WireError(f"array {name!r} is of npy version {version}, expected 1.0 or 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise WireError(f"array {name!r} holds objects, which only a pickle can carry: refused")
        if math.prod(shape) * dtype.itemsize != len(raw) - stream.tell():
            raise WireError(f"array {name!r} claims {dtype} {list(shape)} and holds {len(raw) - stream.tell()} bytes")
        return np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    except WireError:
        raise
    except Exception as error:  # numpy's reader evaluates the header, which can raise anything
        raise WireError(f"array {name!r} cannot be read: {error}") from None


def _texts(array: np.ndarray) -> Any:
    """Prompts as UTF-8 JSON in a uint8 array, or as an array of unicode strings."""
    if array.dtype.kind == "U" and array.ndim == 1:
        try:
            return array.tolist()
        except Exception as error:  # numpy raises several types for numbers that are no characters
            raise WireError(f"prompts are no text: {error}") from None
    if array.dtype == np.uint8 and array.ndim == 1:
        return _json(array.tobytes())
    raise WireError(f"prompts are {array.dtype} {list(array.shape)}, expected UTF-8 JSON as uint8 [N], or unicode [B]")


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _pictures(encoded: Any, limit: int) -> np.ndarray:
    """Base64 PNGs of one size -> uint8 [B, H, W, 3]. Their total size is checked before any is decoded."""
    if not isinstance(encoded, list) or not encoded:
        raise WireError("images are not a list of base64 PNGs")
    opened = []
    for i, text in enumerate(encoded):
        try:
            opened.append(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]))
        except Exception as error:  # Pillow's readers raise many types
            raise WireError(f"image {i} is not a base64 PNG: {error}") from None
    sizes = {image.size for image in opened}
    if len(sizes) > 1:
        raise WireError(f"images of one request have one size, got {sorted(sizes)}")
    width, height = sizes.pop()
    if 3 * width * height * len(opened) > limit:
        raise WireError(f"the images have {3 * width * height * len(opened)} bytes, {limit} are allowed")
    try:
        return np.stack([np.asarray(image.convert("RGB")) for image in opened])
    except Exception as error:  # as above
        raise WireError(f"an image is not a whole PNG: {error}") from None
