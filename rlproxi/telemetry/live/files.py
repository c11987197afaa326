"""What a run directory holds beside its log: galleries, the pictures of evaluations, the timeline. Read-only, bounded.

Names come from outside, so each is matched against the one form it may have, and what it leads to must be a plain file
inside the run directory, symbolic links followed.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from ...run_directory import INSIDE, RunDirectory
from .lines import Lines

#: Larger files are none of ours.
JSON_LIMIT, PICTURE_LIMIT, ARCHIVE_LIMIT = 8 << 20, 64 << 20, 4 << 30
#: Iterations of the timeline that are kept, and spans of one iteration.
ITERATIONS, SPANS = 60, 3000
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_PICTURE = re.compile(rf"{INSIDE.samples}/[A-Za-z0-9][\w-]{{0,99}}\.png")
_MAX_PROMPTS = 512


class NotThere(FileNotFoundError):
    """There is nothing of that name that may be shown; the message says what is missing."""


def open_inside(run_dir: Path, name: str, limit: int) -> BinaryIO:
    """Opens run_dir/name, which must be a plain file inside run_dir of at most ``limit`` bytes. Raises NotThere."""
    root, path = os.path.realpath(run_dir), os.path.realpath(Path(run_dir) / name)
    if os.path.commonpath([root, path]) != root:
        raise NotThere(f"{name} leads out of the run directory")
    try:
        # The last part is no link any more; not waiting, as a pipe would have us do.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise NotThere(f"{name} is not there") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
        os.close(handle)
        raise NotThere(f"{name} is no plain file of at most {limit} bytes")
    return open(handle, "rb")


def read_inside(run_dir: Path, name: str, limit: int) -> bytes:
    """All of what ``open_inside`` opens."""
    with open_inside(run_dir, name, limit) as file:
        return file.read(limit)


def _json(run_dir: Path, name: str) -> dict:
    try:
        values = json.loads(read_inside(run_dir, name, JSON_LIMIT))
    except (ValueError, RecursionError):
        raise NotThere(f"{name} is not readable") from None
    if not isinstance(values, dict):
        raise NotThere(f"{name} holds no object")
    return values


def gallery(run_dir: Path, step: int) -> dict:
    """What samples/<step>.json says of a gallery: {"step", "groups": [{"prompt", "size", "rewards", "parts", "best",
    "worst", "picture": whether its picture can be had}]}. Raises NotThere."""
    values = _json(run_dir, _gallery_name(step))
    groups = values.get("groups")
    if not isinstance(groups, list):
        raise NotThere(f"the gallery of step {step} has no groups")
    return {"step": step, "version": _whole(values.get("version")), "groups": [_group(g) for g in groups[:64]]}


def _group(group: Any) -> dict:
    group = group if isinstance(group, dict) else {}
    rewards, parts = _numbers(group.get("rewards")), group.get("parts")
    size = group.get("size")
    known = isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= 8192 for n in size)
    return {
        "prompt": _text(group.get("prompt")),
        "rewards": rewards,
        "size": size if known else None,
        "parts": {str(k)[:100]: _numbers(v) for k, v in list(parts.items())[:16]} if isinstance(parts, dict) else {},
        **{key: _whole(group.get(key)) for key in ("index", "best", "worst")},
        "picture": isinstance(group.get("image"), str) and bool(_PICTURE.fullmatch(group["image"])),
    }


def gallery_picture(run_dir: Path, step: int, number: int) -> bytes:
    """The PNG of a gallery's group ``number``: its samples side by side. Raises NotThere."""
    groups = _json(run_dir, _gallery_name(step)).get("groups")
    if not isinstance(groups, list) or not 0 <= number < min(len(groups), 64):
        raise NotThere(f"the gallery of step {step} has no group {number}")
    name = groups[number].get("image") if isinstance(groups[number], dict) else None
    if not isinstance(name, str) or not _PICTURE.fullmatch(name):
        raise NotThere(f"group {number} of step {step} names no picture in samples/")
    return _png_only(read_inside(run_dir, name, PICTURE_LIMIT), name)


def _png_only(data: bytes, name: str) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise NotThere(f"{name} is no PNG")
    return data


def evaluations(run_dir: Path) -> list[dict]:
    """The evaluations in order of iteration: {"tag", "iteration", "prompts", "samples", "steps": [..], "headline"}.
    "steps" are the numbers of denoising steps of which there are pictures. Unreadable ones are left out."""
    found = []
    for file in sorted(RunDirectory(run_dir).evaluations.glob("*.json"))[:2000]:
        try:
            entry = evaluation(run_dir, file.stem)
        except NotThere:
            continue
        found.append(entry)
    order = {"before": -1, "after": 1}
    return sorted(found, key=lambda e: (e["iteration"] or 0, order.get(e["tag"], 0)))


def evaluation(run_dir: Path, tag: str) -> dict:
    """One evaluation, see ``evaluations``. Raises NotThere."""
    if not _TAG.fullmatch(tag):
        raise NotThere("an evaluation's tag is made of letters, digits, '.', '_' and '-'")
    values = _json(run_dir, str(INSIDE.evaluation(tag)))
    prompts, by_steps = values.get("prompts"), values.get("by_steps")
    prompts = [_text(p) for p in prompts[:_MAX_PROMPTS]] if isinstance(prompts, list) else []
    steps = [int(n) for n in by_steps if n.isdecimal() and len(n) < 6] if isinstance(by_steps, dict) else []
    return {
        "tag": tag,
        "iteration": _whole(values.get("iteration")),
        "prompts": prompts,
        "samples": _whole(values.get("samples")) or 1,
        "headline": _whole(values.get("headline_steps")),
        "steps": [n for n in steps if RunDirectory(run_dir).evaluation_samples(tag, n).is_file()],
    }


def evaluation_picture(run_dir: Path, tag: str, steps: int, prompt: int) -> tuple[bytes, list[float | None]]:
    """(PNG of one prompt's samples side by side, their held-out scores). Raises NotThere.

    Only these samples are held in memory, however many the evaluation has.
    """
    import numpy as np
    from PIL import Image

    count = evaluation(run_dir, tag)["samples"]
    name = str(INSIDE.evaluation_samples(tag, int(steps)))
    try:
        with open_inside(run_dir, name, ARCHIVE_LIMIT) as file, zipfile.ZipFile(file) as archive:
            images = _rows(archive, "images.npy", prompt * count, count)
            scores = _rows(archive, "heldout.npy", prompt * count, count)
    except Exception as error:  # zipfile's, its decompressors' and numpy's readers raise whatever they trip over
        raise error if isinstance(error, NotThere) else NotThere(f"{name} is not readable ({error})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or scores.dtype.kind != "f":
        raise NotThere(f"{name} holds no images with scores")
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(stream, "PNG", compress_level=3)
    return stream.getvalue(), _numbers(scores.astype(float).ravel().tolist())


def _rows(archive: zipfile.ZipFile, member: str, start: int, count: int):
    """Rows [start, start + count) of an array in an npz; what comes before is read and dropped piece by piece."""
    import numpy as np
    from numpy.lib import format as layout

    if archive.getinfo(member).file_size > ARCHIVE_LIMIT:
        raise ValueError(f"{member} is larger than {ARCHIVE_LIMIT} bytes")
    with archive.open(member) as file:
        read_header = {(1, 0): layout.read_array_header_1_0, (2, 0): layout.read_array_header_2_0}.get(
            layout.read_magic(file)
        )
        shape, by_column, dtype = read_header(file) if read_header else ((), True, np.dtype(object))
        if by_column or dtype.hasobject or not shape or not 0 <= start <= start + count <= shape[0] or not count:
            raise ValueError(f"{member} has no rows {start} to {start + count}")
        if not all(type(side) is int and side > 0 for side in shape):  # a row of -1 bytes would be the whole member
            raise ValueError(f"{member} has the shape {shape}")
        row = math.prod(shape[1:]) * dtype.itemsize
        if row * count > PICTURE_LIMIT * 4:
            raise ValueError(f"{member} has rows of {row} bytes")
        left = row * start
        while left:
            piece = file.read(min(left, 1 << 20))
            if not piece:
                raise EOFError(f"{member} ends early")
            left -= len(piece)
        return np.frombuffer(file.read(row * count), dtype).reshape(count, *shape[1:])


class Timeline:
    """The last iterations of timeline.jsonl, followed by offset. Of a long file only the end is read."""

    def __init__(self, run_dir: Path, iterations: int = ITERATIONS, tail: int = 4 << 20):
        self.lines, self.tail = Lines(RunDirectory(run_dir).timeline), tail
        self.kept: deque[dict] = deque(maxlen=iterations)

    def read(self) -> list[dict]:
        """The iterations as they are now: [{"stage", "step", "spans": [[role, who, phase, start, seconds], ..]}]."""
        if self.lines.offset == 0 and self.lines.size() > self.tail:
            self.lines.offset = self.lines.size() - self.tail  # the first line is cut, and no JSON
        again = self.lines.again
        while (found := self.lines.read()) is not None:
            if self.lines.again != again:
                self.kept.clear()
                again = self.lines.again
            for _, line in found:
                self._take(line)
        return list(self.kept)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            spans = [
                [
                    str(role)[:40],
                    who if type(who) is int else str(who)[:60],
                    str(phase)[:40],
                    float(start),
                    float(seconds),
                ]
                for role, who, phase, start, seconds in record["spans"][:SPANS]
            ]
            step, stage = record["step"], str(record["stage"])[:40]
        except (ValueError, RecursionError, KeyError, TypeError, OverflowError):
            return
        spans = [s for s in spans if math.isfinite(s[3]) and math.isfinite(s[4]) and s[4] >= 0]
        if type(step) is not int:
            return
        # A resumed run repeats iterations: what was later, or the same, is superseded.
        while self.kept and self.kept[-1]["stage"] == stage and self.kept[-1]["step"] >= step:
            self.kept.pop()
        self.kept.append({"stage": stage, "step": step, "spans": spans})


def _gallery_name(step: int) -> str:
    if not 0 <= step < 10**12:
        raise NotThere(f"there is no step {step}")
    return str(INSIDE.gallery(step))


def _whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 2**53 else None


def _text(value: Any) -> str:
    return value[:2000] if isinstance(value, str) else ""


def _numbers(values: Any) -> list[float | None]:
    if not isinstance(values, list):
        return []
    return [_number(v) for v in values[:4096]]


def _number(value: Any) -> float | None:
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
