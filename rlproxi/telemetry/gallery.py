"""Galleries of training samples: ``samples/<step>.json`` and one picture for each group."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import draft, write_text
from ..run_directory import INSIDE, RunDirectory


@dataclass
class GalleryGroup:
    """One prompt's samples: images uint8 [G, H, W, 3], their weighted rewards [G] and the parts; NaN: no reward."""

    prompt: str
    index: int
    images: np.ndarray
    rewards: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)


def due(iteration: int, every: int) -> bool:
    """Return whether ``iteration`` writes a gallery: the first and every ``every``-th do, and none if that is 0."""
    return bool(every) and (iteration == 0 or (iteration + 1) % every == 0)


def write(run_dir: Path, step: int, version: int, groups: list[GalleryGroup]) -> str:
    """Write a gallery, pictures first, and return its JSON file's path within the run directory. Raises OSError."""
    from PIL import Image

    run = RunDirectory(run_dir)
    run.samples.mkdir(exist_ok=True)
    entries = []
    for number, group in enumerate(groups):
        count, height, width, _ = group.images.shape
        row = group.images.transpose(1, 0, 2, 3).reshape(height, count * width, 3)
        with draft(run.gallery_picture(step, number)) as scratch:
            Image.fromarray(np.ascontiguousarray(row)).save(scratch, format="PNG")
        entry = {"prompt": group.prompt, "index": int(group.index), "rewards": _scores(group.rewards)}
        entry |= {"parts": {name: _scores(part) for name, part in group.parts.items()}, **_extremes(group.rewards)}
        entries.append({**entry, "size": [height, width], "image": str(INSIDE.gallery_picture(step, number))})
    write_text(run.gallery(step), json.dumps({"step": step, "version": version, "groups": entries}, ensure_ascii=False))
    return str(INSIDE.gallery(step))


def _scores(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values)]


def _extremes(rewards: np.ndarray) -> dict[str, int | None]:
    """Return the numbers of the best and the worst sample; None where no sample has a reward."""
    rewards = np.where(np.isfinite(rewards), rewards, np.nan)
    if np.isnan(rewards).all():
        return {"best": None, "worst": None}
    return {"best": int(np.nanargmax(rewards)), "worst": int(np.nanargmin(rewards))}
