"""The layout of a run directory: the one place that spells a path inside it."""

from __future__ import annotations

import os
from pathlib import Path


class RunDirectory:
    """The paths inside the run directory ``path``. Nothing is read and nothing is made.

    ``RunDirectory(".")`` gives the paths relative to any run directory (see ``INSIDE``).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = run = Path(path)
        self.config = run / "config.yaml"  #: the config as resolved
        self.log = run / "metrics.jsonl"  #: the run log (telemetry/runlog.py)
        self.timeline = run / "timeline.jsonl"  #: what each role did when (telemetry/timeline.py)
        self.summary = run / "summary.json"  #: what a script needs (pages/summary.py)
        self.report = run / "report.html"  #: the page for people (pages/report.py)
        self.models = run / "models"  #: model folders and the scorers that the run made
        self.start = self.model("start")  #: the new network that pre-training starts from
        self.pretrained = self.model("pretrained")
        self.best = self.model("best")  #: the best held-out score so far
        self.final = self.model("final")
        self.text = self.models / "text"  #: the built-in text encoder
        self.evaluations = run / "evaluation"  #: scores on held-out prompts, a JSON file for each tag
        self.samples = run / "samples"  #: images: of evaluations, and the galleries of training samples
        self.cache = run / "cache"  #: encoded shards, where data.cache names no other folder
        self.curated = run / "curated"  #: curated shards, where curate.out names no other folder
        self.ray_train = run / "ray_train"  #: what Ray Train keeps
        self.tensorboard = run / "tensorboard"  #: event files

    @property
    def name(self) -> str:
        """The run's name: the folder's."""
        return self.path.name

    def model(self, name: str) -> Path:
        """Return the folder of the model ``name``."""
        return self.models / name

    def merged(self, name: str) -> Path:
        """Return the folder of the model ``name`` with its adapters merged into the base."""
        return self.models / f"{name}-merged"

    def scorer(self, name: str) -> Path:
        """Return the file of a scorer that the stage prepare trains: ``reward`` or ``judge``."""
        return self.models / f"{name}.safetensors"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def evaluation(self, tag: str) -> Path:
        """Return the file of the evaluation ``tag``: before, after or step-<iteration>."""
        return self.evaluations / f"{tag}.json"

    def evaluation_samples(self, tag: str, steps: int | None) -> Path:
        """Return the file of an evaluation's images made in ``steps`` denoising steps."""
        return self.samples / f"{tag}-N{steps}.npz"

    def gallery(self, step: int) -> Path:
        """Return the file that describes the gallery of an iteration."""
        return self.samples / f"{step:06d}.json"

    def gallery_picture(self, step: int, number: int) -> Path:
        """Return the picture of group ``number`` in the gallery of an iteration."""
        return self.samples / f"{step:06d}-{number}.png"


#: Paths relative to any run directory, for messages and for entries in its files.
INSIDE = RunDirectory(".")
#: What a folder holds at least one of, if it is a run directory.
PARTS = (INSIDE.config, INSIDE.log, INSIDE.summary)
