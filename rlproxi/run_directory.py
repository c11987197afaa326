"""A run directory as a reader finds it: whatever is there, and the names of what is not.

Every part may be missing or half written (a run in progress, a killed one); nothing here raises for that.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .config.plain_yaml import read_yaml
from .telemetry import runlog


@dataclass(frozen=True)
class Samples:
    """samples/<tag>-N<steps>.npz: images uint8 [P * S, H, W, 3], prompt-major, and the held-out score of each.

    Where the judge tells attributes apart: ``attributes`` names A of them and ``correct`` [P * S, A] is 1 right,
    0 wrong, NaN not claimed by the caption.
    """

    images: np.ndarray
    heldout: np.ndarray
    attributes: tuple[str, ...] = ()
    correct: np.ndarray | None = None


@dataclass
class RunDirectory:
    """Everything a report needs. ``missing`` are sentences about what could not be read."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    evaluations: dict[str, dict] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def headline_steps(self) -> int | None:
        """The step count that the run is about: the config's, else the one an evaluation names."""
        count = dig(self.config, "sampler", "num_inference_steps")
        found = [e.get("headline_steps") for e in self.evaluations.values()]
        return next((n for n in [count, *found] if type(n) is int and abs(n) < 10**6), None)

    @property
    def judge(self) -> str | None:
        """The first held-out reward."""
        for evaluation in self.evaluations.values():
            for steps in _mapping(evaluation.get("by_steps")):
                for name in _mapping(dig(evaluation, "by_steps", steps, "heldout")):
                    return name
        return None

    def entry(self, tag: str, steps: int | None = None) -> dict:
        """One step count's scores in evaluation ``tag``; {} where there are none."""
        steps = self.headline_steps if steps is None else steps
        return _mapping(dig(self.evaluations, tag, "by_steps", str(steps)))

    def score(self, tag: str, name: str, steps: int | None = None) -> tuple[float, float] | None:
        """(mean, standard error) of a held-out or training reward in an evaluation."""
        entry = self.entry(tag, steps)
        found = dig(entry, "heldout", name) or dig(entry, "train", name)
        mean, sem = finite(dig(found, "mean")), finite(dig(found, "sem"))
        return None if mean is None else (mean, sem or 0.0)

    def samples(self, tag: str, steps: int | None = None) -> Samples | None:
        """The images of an evaluation; None where the file is missing or damaged (then it is in ``missing``)."""
        steps = self.headline_steps if steps is None else steps
        path = self.path / "samples" / f"{tag}-N{steps}.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
            images, heldout = data["images"], np.asarray(data["heldout"], np.float32)
            if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(heldout):
                raise ValueError(f"images are {images.dtype} {list(images.shape)} for {len(heldout)} scores")
            names = tuple(str(name) for name in data.get("attributes", ()))
            correct = data.get("correct") if names else None
            if correct is not None and correct.shape != (len(images), len(names)):
                names, correct = (), None
            return Samples(images, heldout, names, correct)
        except Exception as error:  # numpy raises zipfile's, zlib's and its own errors for a damaged file
            self._note(f"{path.relative_to(self.path)} is not readable ({error})")
            return None

    def heldout_curve(self, name: str) -> tuple[list[int], list[float], list[float]]:
        """(RL steps, means, standard errors) of every evaluation of a reward at the headline step count."""
        last = runlog.last_step(self.records, "rl")
        points = {}
        for tag in self.evaluations:
            match = re.fullmatch(r"step-(\d+)", tag)
            step = {"before": 0, "after": last}.get(tag, int(match[1]) if match else None)
            score = self.score(tag, name)
            if step is not None and score is not None:
                points[step] = score
        steps = sorted(points)
        return steps, [points[s][0] for s in steps], [points[s][1] for s in steps]

    def _note(self, sentence: str) -> None:
        if sentence not in self.missing:
            self.missing.append(sentence)


def dig(values: Any, *keys: str) -> Any:
    """values[a][b]..., or None where a part of the path is missing or is not a mapping."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> float | None:
    """A number that can be drawn; None for anything else."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def load(path: str | os.PathLike) -> RunDirectory:
    """Reads a run directory. Raises FileNotFoundError for a folder that holds no part of a run."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: expected a run directory (config.yaml, metrics.jsonl, ...)")
    parts = ("config.yaml", runlog.FILE_NAME, "summary.json", "evaluation")
    if not any((path / part).exists() for part in parts):
        raise FileNotFoundError(f"{path} is not a run directory: it holds none of {', '.join(parts)}")
    run = RunDirectory(path)
    run.config = _read(run, "config.yaml", read_yaml)
    run.summary = _read(run, "summary.json", json.loads)
    run.records = runlog.read(path)
    if not run.records:
        run._note(f"{runlog.FILE_NAME} is missing or empty: no curves")
    for file in sorted((path / "evaluation").glob("*.json")):
        run.evaluations[file.stem] = _read(run, f"evaluation/{file.name}", json.loads)
    for tag in ("before", "after"):
        if tag not in run.evaluations:
            run._note(f"evaluation/{tag}.json is missing: the run has no evaluation '{tag}' (yet)")
    return run


def _read(run: RunDirectory, name: str, parse) -> dict:
    """One file as a mapping, or {} and a note."""
    try:
        values = parse((run.path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        run._note(f"{name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        run._note(f"{name} is not readable ({' '.join(str(error).split())[:120]})")
        return {}
    if not isinstance(values, dict):
        run._note(f"{name} holds no mapping")
        return {}
    return values
