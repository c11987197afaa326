"""One run directory while it grows, read on by byte offset in bounded memory, for pages that show it live.

Until all of a large log is read, a page sees a sample: lines from a few thousand places, which give curves over the
whole range. Only a resume that takes back a part of points that are merged already makes it read a log again.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import yaml

from ...config.plain_yaml import read_yaml
from ...run_directory import RunDirectory
from ..runlog import ended, parse
from ..values import dig, whole
from .digest import Digest
from .files import Timeline
from .lines import Lines, spread

#: A log of more bytes is sampled before it is read.
SAMPLE_OVER = 2 << 20
SAMPLES = 1500
#: More changes than this at once are not sent one by one: a page fetches the curves again.
MOST_CHANGES = 500
_CONFIG_LIMIT = 1 << 20


class LiveRun:
    """The reader of one run directory, for threads that share it and take its ``lock``.

    ``open`` gives something to show at once, ``advance`` reads on and returns what is new, ``snapshot`` returns all
    that is known. None of them raises for a log that is missing, torn, malformed or replaced.
    """

    def __init__(self, path: Path):
        self.path, self.log = Path(path), RunDirectory(path).log
        self.timeline, self.lock = Timeline(self.path), threading.Lock()
        #: stage -> (offset, step) of the "resume" records that have no later one at the same or an earlier step.
        self._cuts: dict[str, list[tuple[int, int]]] = {}
        #: What a page sees while the reader is behind: a sample, or what was read before the reader began again.
        self._shown: Digest | None = None
        self._evaluations: float | None = None
        self._config: tuple[float, str, dict] | None = None
        self._begin()

    def _begin(self) -> None:
        """Start at the beginning of the log. The resumes that are known stay known."""
        self._lines, self._digest = Lines(self.log), Digest()
        #: Whether the end of the log was reached.
        self.complete = False

    @property
    def digest(self) -> Digest:
        """What a page sees now."""
        return self._shown or self._digest

    def open(self, seconds: float = 0.5) -> None:
        """Read something to show at once: all of a small log, a sample of a large one."""
        size = self._lines.size()
        if size <= SAMPLE_OVER:
            self.advance(seconds)
            return
        sample = Digest(sampled=True)
        with suppress(OSError):
            for line in spread(self.log, SAMPLES, size):
                if (record := parse(line)) is not None:
                    sample.apply(record)
            self._shown = sample

    def advance(self, seconds: float = 0.05) -> list | None:
        """Read on for about ``seconds`` and return the changes since the last call (see ``Digest.apply``).

        None: a page must take a new snapshot. []: nothing new, or a large log is still being read.
        """
        end, known, again = time.monotonic() + seconds, self.complete, self._lines.again
        changes: list = []
        while (found := self._read()) is not None:
            changes += found if known and len(changes) <= MOST_CHANGES else []
            if time.monotonic() > end:
                break
        if self._lines.again != again:
            return None
        if found is None:
            self.complete, self._shown = True, None
            if not self._digest.sharp:
                shown = self._digest
                self._begin()
                self._shown = shown
            changes += self._new_evaluations()
        elif not known:
            return []
        return changes if known and len(changes) <= MOST_CHANGES else None

    def _read(self) -> list | None:
        """The changes of the next block of the log; None at its end."""
        again = self._lines.again
        lines = self._lines.read()
        if self._lines.again != again:  # another log in the place of the old one
            self._digest = Digest()
            self._cuts.clear()
        return None if lines is None else [change for one in lines if (change := self._take(*one))]

    def _take(self, offset: int, line: bytes) -> list | None:
        """The change that the line at ``offset`` makes; None for one that no page needs."""
        record = parse(line)
        if record is None:
            self._digest.malformed += 1
            return None
        if record["event"] == "resume":
            self._cut(record["stage"], offset, record["step"])
        elif self._superseded(record, offset):
            return None
        return self._digest.apply(record)

    def _cut(self, stage: str, offset: int, step: int) -> None:
        cuts = self._cuts.setdefault(stage, [])
        if cuts and offset <= cuts[-1][0]:
            return  # known from the reading before
        while cuts and cuts[-1][1] >= step:
            cuts.pop()
        cuts.append((offset, step))

    def _superseded(self, record: dict, offset: int) -> bool:
        """Whether a later resume took the record back."""
        stage, step = record.get("stage"), record.get("step")
        cuts = self._cuts.get(stage) if self._cuts and isinstance(stage, str) else None
        if cuts is None or type(step) is not int or record["event"] not in ("metrics", "evaluation", "samples"):
            return False
        at = bisect_right(cuts, offset, key=itemgetter(0))  # steps ascend too: the next cut goes back furthest
        return at < len(cuts) and cuts[at][1] < step

    def _new_evaluations(self) -> list:
        """[["evaluations"]] if the folder of evaluations has changed: a file follows its record in the log."""
        before = self._evaluations
        with suppress(OSError):
            self._evaluations = RunDirectory(self.path).evaluations.stat().st_mtime
        return [] if self._evaluations == before else [["evaluations"]]

    def snapshot(self) -> dict:
        """Curves, events and progress. "exact": all of the log is read; else "read" is the share that is."""
        return {
            "headline_steps": whole(dig(self.config()[1], "sampler", "num_inference_steps")),
            **self.digest.snapshot(),
            "exact": self.complete and self.digest.sharp,
            "read": self.share_read(),
            "progress": self.progress(),
        }

    def share_read(self) -> float:
        """The share of the log that is read, from 0 to 1."""
        size = self._lines.size()
        return 1.0 if self.complete or not size else min(1.0, self._lines.offset / size)

    def progress(self) -> dict:
        """How far the run is, see ``Digest.progress``. "finished": all of its stages are done."""
        values, summary = self.config()[1], RunDirectory(self.path).summary.is_file()
        finished = ended(self.digest.listed["stage"], dig(values, "run", "stages"), summary)
        return {**self.digest.progress(totals(values)), "finished": finished}

    def config(self) -> tuple[str, dict]:
        """(text, values) of config.yaml; ("", {}) if it is missing or unreadable. Read again when it changes."""
        file = RunDirectory(self.path).config
        try:
            found = file.stat()
            if self._config is None or self._config[0] != found.st_mtime:
                text = file.read_text("utf-8") if found.st_size <= _CONFIG_LIMIT else ""
                values = read_yaml(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                self._config = (found.st_mtime, text, values if isinstance(values, dict) else {})
        except (OSError, ValueError):
            return "", {}
        return self._config[1], self._config[2]


def totals(config: dict) -> dict[str, int]:
    """The steps of each stage that a config states."""
    places = {
        "pretrain": ("pretrain", "steps"),
        "rl": ("rl", "steps"),
        "prepare/text": ("prepare", "text_steps"),
        "prepare/reward": ("prepare", "classifier_steps"),
        "prepare/judge": ("prepare", "classifier_steps"),
    }
    return {stage: count for stage, place in places.items() if (count := whole(dig(config, *place))) is not None}
