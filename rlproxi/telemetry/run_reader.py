"""Read what a run directory holds, and name what is missing or half written, which is no error here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.plain_yaml import read_yaml
from ..run_directory import INSIDE, PARTS, RunDirectory
from . import runlog
from .values import dig, number, whole


@dataclass(frozen=True)
class Samples:
    """An evaluation's images uint8 [P * S, H, W, 3], prompt-major, and the held-out score of each, float32 [P * S].

    For a judge of attributes, ``attributes`` names A of them. ``correct`` [P * S, A] is then 1 for right, 0 for wrong
    and NaN for an attribute that the caption does not claim.
    """

    images: np.ndarray
    heldout: np.ndarray
    attributes: tuple[str, ...] = ()
    correct: np.ndarray | None = None


class RunReader:
    """Config, summary, log records and evaluations of a run directory; ``missing`` says what could not be read.

    Raises FileNotFoundError for a folder that holds no part of a run.
    """

    def __init__(self, path: str | os.PathLike):
        self.files = files = RunDirectory(path)
        self.path = files.path
        self.missing: list[str] = []
        parts = (*PARTS, INSIDE.evaluations)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: expected a run directory ({INSIDE.config}, ...)")
        if not any((self.path / part).exists() for part in parts):
            raise FileNotFoundError(f"{path} is not a run directory: it holds none of {', '.join(map(str, parts))}")
        self.config: dict[str, Any] = self._mapping_in(files.config, read_yaml)
        self.summary: dict[str, Any] = self._mapping_in(files.summary, json.loads)
        self.records: list[dict] = runlog.read(path)
        if not self.records:
            self._note(f"{files.log.name} is missing or empty: no curves")
        self.evaluations: dict[str, dict] = {
            file.stem: self._mapping_in(file, json.loads) for file in sorted(files.evaluations.glob("*.json"))
        }
        for tag in ("before", "after"):
            if tag not in self.evaluations:
                self._note(f"{INSIDE.evaluation(tag)} is missing: the run has no evaluation '{tag}' (yet)")

    @property
    def headline_steps(self) -> int | None:
        """The config's number of denoising steps, else the one that an evaluation names."""
        count = dig(self.config, "sampler", "num_inference_steps")
        found = [e.get("headline_steps") for e in self.evaluations.values()]
        return next((n for n in [count, *found] if type(n) is int and abs(n) < 10**6), None)

    @property
    def judge(self) -> str | None:
        """The name of the first held-out reward."""
        for evaluation in self.evaluations.values():
            for entry in _mapping(evaluation.get("by_steps")).values():
                for name in _mapping(dig(entry, "heldout")):
                    return name
        return None

    def entry(self, tag: str, steps: int | None = None) -> dict:
        """Return the scores of evaluation ``tag`` at one number of denoising steps; {} where there are none."""
        steps = self.headline_steps if steps is None else steps
        return _mapping(dig(self.evaluations, tag, "by_steps", str(steps)))

    def score(self, tag: str, name: str | None, steps: int | None = None) -> tuple[float, float] | None:
        """Return (mean, standard error) of a held-out or training reward in an evaluation; None where it is missing."""
        entry = self.entry(tag, steps)
        found = dig(entry, "heldout", name) or dig(entry, "train", name)
        mean, sem = number(dig(found, "mean")), number(dig(found, "sem"))
        return None if mean is None else (mean, sem or 0.0)

    def samples(self, tag: str, steps: int | None = None) -> Samples | None:
        """Return the images of an evaluation; None where the file is missing, or damaged and named in ``missing``."""
        steps = self.headline_steps if steps is None else steps
        path = self.files.evaluation_samples(tag, steps)
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

    @property
    def finished(self) -> bool:
        """Whether the run has ended. The stage report counts as done once it wrote the summary, before the report."""
        stages = [record for record in self.records if record["event"] == "stage"]
        if stages and stages[-1].get("name") == "report" and self.summary:
            return True
        return runlog.ended(stages, dig(self.config, "run", "stages"), bool(self.summary))

    @property
    def moments(self) -> list[tuple[int, str]]:
        """(RL step, tag) of every evaluation whose step is known, in order: before, step-<iteration>, after."""
        last, found = runlog.last_step(self.records, "rl"), []
        for tag, evaluation in self.evaluations.items():
            match = re.fullmatch(r"step-(\d+)", tag)
            named = {"before": 0, "after": last}.get(tag, int(match[1]) if match else None)
            step = whole(evaluation.get("iteration"))
            step = named if step is None else step
            if step is not None:
                found.append((step, tag))
        order = {"before": -1, "after": 1}
        return sorted(found, key=lambda moment: (moment[0], order.get(moment[1], 0)))

    def reasons(self, *place: str | int) -> list[str]:
        """Return the warnings about missing scores that the log holds of one record.

        Args:
            place: ("evaluation", tag) or ("metrics", stage, step). The warnings stand before the record in the log.
        """
        found: list[str] = []
        pending: dict[str, list[str]] = {"evaluation": [], "metrics": []}
        for record in self.records:
            event, message = record["event"], record.get("message")
            if event == "warning" and isinstance(message, str):
                if message.startswith("evaluation:"):
                    pending["evaluation"].append(message.removeprefix("evaluation:").strip())
                elif re.search(r"no score|missing|NaN", message):
                    pending["metrics"].append(message)
            elif event in pending:
                keys = ("tag",) if event == "evaluation" else ("stage", "step")
                if (event, *(record.get(key) for key in keys)) == place:
                    found += pending[event]
                pending[event] = []
        return list(dict.fromkeys(found))

    def curve(self, *key: str) -> tuple[list[int], list[float]]:
        """Return (RL steps, values) of a figure in the evaluations, at ``headline_steps``: ("distance", "total")."""
        points = {step: number(dig(self.entry(tag), *key)) for step, tag in self.moments}
        known = {step: value for step, value in points.items() if value is not None}
        return list(known), list(known.values())

    def heldout_curve(self, name: str) -> tuple[list[int], list[float], list[float]]:
        """Return (RL steps, means, standard errors) of a reward in every evaluation, at ``headline_steps``."""
        points = {step: score for step, tag in self.moments if (score := self.score(tag, name)) is not None}
        steps = sorted(points)
        return steps, [points[s][0] for s in steps], [points[s][1] for s in steps]

    def _mapping_in(self, file: Path, parse: Callable[[str], Any]) -> dict:
        """The mapping that a file holds, or {} and a note."""
        try:
            values = parse(file.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
            problem = "holds no mapping"
        except FileNotFoundError:
            problem = "is missing"
        except (OSError, ValueError, RecursionError) as error:
            problem = f"is not readable ({' '.join(str(error).split())[:120]})"
        self._note(f"{file.relative_to(self.path)} {problem}")
        return {}

    def _note(self, sentence: str) -> None:
        if sentence not in self.missing:
            self.missing.append(sentence)


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}
