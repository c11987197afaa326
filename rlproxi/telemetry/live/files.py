"""The files of a run directory beside its log, read in bounded memory: galleries, evaluations' pictures, the timeline.

File names come from outside, so each must have the one form that is allowed. It must lead to a plain file inside the
run directory, symbolic links followed.
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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...run_directory import INSIDE, RunDirectory
from .. import timeline
from ..values import number, whole
from .lines import Lines

if TYPE_CHECKING:
    import numpy as np

#: Larger files are not read, in bytes.
JSON_LIMIT, PICTURE_LIMIT, ARCHIVE_LIMIT = 8 << 20, 64 << 20, 4 << 30
#: How many iterations of the timeline are kept, and how many spans of an iteration.
ITERATIONS, SPANS = 60, 3000
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_PICTURE = re.compile(rf"{INSIDE.samples}/[A-Za-z0-9][\w-]{{0,99}}\.png")
_MAX_PROMPTS, _MAX_GROUPS = 512, 64


class NotThere(FileNotFoundError):
    """Nothing of that name may be shown. The message says what is missing."""


def open_inside(run_dir: Path, name: str, limit: int) -> BinaryIO:
    """Open run_dir/name, which must be a plain file inside run_dir of at most ``limit`` bytes. Raises NotThere."""
    root, path = os.path.realpath(run_dir), os.path.realpath(Path(run_dir) / name)
    if os.path.commonpath([root, path]) != root:
        raise NotThere(f"{name} leads out of the run directory")
    try:
        # O_NOFOLLOW: the last part is no link any more. O_NONBLOCK: opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise NotThere(f"{name} is not there") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
        os.close(handle)
        raise NotThere(f"{name} is no plain file of at most {limit} bytes")
    return open(handle, "rb")


def _json(run_dir: Path, name: str) -> dict:
    values = None
    with open_inside(run_dir, name, JSON_LIMIT) as file, suppress(ValueError, RecursionError):
        values = json.loads(file.read(JSON_LIMIT))
    if not isinstance(values, dict):
        raise NotThere(f"{name} holds no JSON object")
    return values


def gallery(run_dir: Path, step: int) -> list[dict]:
    """The groups of a gallery: [{"prompt", "rewards", "parts", "best", "worst", "picture"}]. Raises NotThere."""
    return [_group(group) for group in _groups(run_dir, step)]


def _groups(run_dir: Path, step: int) -> list[dict]:
    groups = _json(run_dir, str(INSIDE.gallery(step))).get("groups")
    if not isinstance(groups, list):
        raise NotThere(f"the gallery of step {step} has no groups")
    return [group if isinstance(group, dict) else {} for group in groups[:_MAX_GROUPS]]


def _group(group: dict) -> dict:
    parts = group["parts"] if isinstance(group.get("parts"), dict) else {}
    return {
        "prompt": _text(group.get("prompt")),
        "rewards": _numbers(group.get("rewards")),
        "parts": {str(name)[:100]: _numbers(scores) for name, scores in list(parts.items())[:16]},
        **{key: whole(group.get(key)) for key in ("best", "worst")},
        "picture": _PICTURE.fullmatch(_text(group.get("image"))) is not None,
    }


def gallery_picture(run_dir: Path, step: int, index: int) -> bytes:
    """The PNG of group ``index`` of a gallery: its samples side by side. Raises NotThere."""
    groups = _groups(run_dir, step)
    if not 0 <= index < len(groups):
        raise NotThere(f"the gallery of step {step} has no group {index}")
    name = _text(groups[index].get("image"))
    if not _PICTURE.fullmatch(name):
        raise NotThere(f"group {index} of step {step} names no picture in samples/")
    with open_inside(run_dir, name, PICTURE_LIMIT) as file:
        data = file.read(PICTURE_LIMIT)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise NotThere(f"{name} is no PNG")
    return data


def evaluations(run_dir: Path) -> list[dict]:
    """The readable evaluations, in order of iteration, as ``evaluation`` returns each."""
    found = []
    for file in sorted(RunDirectory(run_dir).evaluations.glob("*.json"))[:2000]:
        with suppress(NotThere):
            found.append(evaluation(run_dir, file.stem))
    order = {"before": -1, "after": 1}
    return sorted(found, key=lambda e: (e["iteration"] or 0, order.get(e["tag"], 0)))


def evaluation(run_dir: Path, tag: str) -> dict:
    """The evaluation in evaluation/<tag>.json. Raises NotThere.

    Returns {"tag", "iteration", "prompts", "samples" (for each prompt), "headline", "steps"}, where "steps" are the
    numbers of denoising steps that have pictures.
    """
    if not _TAG.fullmatch(tag):
        raise NotThere("an evaluation's tag is made of letters, digits, '.', '_' and '-'")
    values = _json(run_dir, str(INSIDE.evaluation(tag)))
    prompts, by_steps = values.get("prompts"), values.get("by_steps")
    prompts = [_text(p) for p in prompts[:_MAX_PROMPTS]] if isinstance(prompts, list) else []
    steps = [int(n) for n in by_steps if n.isdecimal() and len(n) < 6] if isinstance(by_steps, dict) else []
    return {
        "tag": tag,
        "iteration": whole(values.get("iteration")),
        "prompts": prompts,
        "samples": whole(values.get("samples")) or 1,
        "headline": whole(values.get("headline_steps")),
        "steps": [n for n in steps if RunDirectory(run_dir).evaluation_samples(tag, n).is_file()],
    }


def evaluation_picture(run_dir: Path, tag: str, steps: int, prompt: int) -> bytes:
    """The PNG of one prompt's samples side by side, which alone are held in memory. Raises NotThere."""
    import numpy as np
    from PIL import Image

    images = _of_prompt(run_dir, tag, steps, prompt, "images.npy")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise NotThere(f"{INSIDE.evaluation_samples(tag, steps)} holds no images")
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def evaluation_scores(run_dir: Path, tag: str, steps: int, prompt: int) -> list[float | None]:
    """The held-out scores of one prompt's samples. Raises NotThere."""
    scores = _of_prompt(run_dir, tag, steps, prompt, "heldout.npy")
    if scores.dtype.kind != "f":
        raise NotThere(f"{INSIDE.evaluation_samples(tag, steps)} holds no scores")
    return _numbers(scores.astype(float).ravel().tolist())


def _of_prompt(run_dir: Path, tag: str, steps: int, prompt: int, member: str) -> np.ndarray:
    """The rows of a prompt's samples in an array of an evaluation's archive. Raises NotThere."""
    count = evaluation(run_dir, tag)["samples"]
    name = str(INSIDE.evaluation_samples(tag, steps))
    with open_inside(run_dir, name, ARCHIVE_LIMIT) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _rows(archive, member, prompt * count, count)
        except Exception as error:  # zipfile, its decompressors and numpy raise errors without a common base
            raise NotThere(f"{name} is not readable ({error})") from None


def _rows(archive: zipfile.ZipFile, member: str, start: int, count: int) -> np.ndarray:
    """Rows [start, start + count) of an array in an npz, without the rows before in memory."""
    import numpy as np
    from numpy.lib import format as layout

    if archive.getinfo(member).file_size > ARCHIVE_LIMIT:
        raise ValueError(f"{member} is larger than {ARCHIVE_LIMIT} bytes")
    with archive.open(member) as file:
        if layout.read_magic(file) != (1, 0):
            raise ValueError(f"{member} is not of NumPy's version 1.0")
        shape, by_column, dtype = layout.read_array_header_1_0(file)
        if by_column or dtype.hasobject or not shape or not 0 <= start <= start + count <= shape[0] or not count:
            raise ValueError(f"{member} has no rows {start} to {start + count}")
        if not all(type(side) is int and side > 0 for side in shape):  # a row of -1 bytes would be the whole member
            raise ValueError(f"{member} has the shape {shape}")
        row = math.prod(shape[1:]) * dtype.itemsize
        if row * count > PICTURE_LIMIT * 4:
            raise ValueError(f"{member} has rows of {row} bytes")
        file.seek(row * start, os.SEEK_CUR)
        return np.frombuffer(file.read(row * count), dtype).reshape(count, *shape[1:])


class Timeline:
    """The last iterations of timeline.jsonl, read on by offset; of a long file only the last ``tail`` bytes."""

    def __init__(self, run_dir: Path, iterations: int = ITERATIONS, tail: int = 4 << 20):
        self.lines, self.tail = Lines(RunDirectory(run_dir).timeline), tail
        self.kept: deque[dict] = deque(maxlen=iterations)

    def read(self) -> list[dict]:
        """The iterations now: [{"stage", "step", "spans": [``timeline.Span``, ..]}]."""
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
        found = timeline.parse(line)
        if found is None:
            return
        stage, step = found["stage"][:40], found["step"]
        # A resumed run repeats iterations: what was later, or the same, is superseded.
        while self.kept and self.kept[-1]["stage"] == stage and self.kept[-1]["step"] >= step:
            self.kept.pop()
        spans = [span for span in found["spans"][:SPANS] if span.seconds >= 0]
        self.kept.append({"stage": stage, "step": step, "spans": spans})


def _text(value: Any) -> str:
    return value[:2000] if isinstance(value, str) else ""


def _numbers(values: Any) -> list[float | None]:
    return [number(v) for v in values[:4096]] if isinstance(values, list) else []
