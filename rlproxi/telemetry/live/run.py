"""A run directory while it grows: read on by byte offset, in bounded memory, for pages that show it live.

Small logs are read whole. A large one is first looked at in a few thousand places, which gives curves over its whole
range at once, and then read whole in the background; until that is done a snapshot says that it is sampled.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from pathlib import Path

import yaml

from ...config.plain_yaml import read_yaml
from ..runlog import FILE_NAME
from .digest import Digest, Malformed, parse
from .lines import Lines, spread

#: A log larger than this is sampled before it is read.
SAMPLE_OVER = 2 << 20
SAMPLES = 1500
#: More changes than this at once are not sent one by one: a page fetches the curves anew.
MOST_CHANGES = 500
_CONFIG_LIMIT = 1 << 20


class _Pass:
    """One reading of the log from its start to its end, and on."""

    def __init__(self, path: Path, cuts: dict[str, _Cuts]):
        self.lines, self.digest, self.cuts = Lines(path), Digest(), cuts
        self.malformed = 0

    def read(self) -> list | None:
        """The changes of the next block; None at the end of what is there."""
        again = self.lines.again
        found = self.lines.read()
        if self.lines.again != again:
            self.digest, self.malformed = Digest(), 0
            self.cuts.clear()
        if found is None:
            return None
        changes = []
        for offset, line in found:
            try:
                record = parse(line)
            except Malformed:
                self.malformed += 1
                continue
            if record["event"] == "resume":
                self.cuts.setdefault(record["stage"], _Cuts()).add(offset, record["step"])
            elif self._superseded(record, offset):
                continue
            change = self.digest.apply(record)
            if change:
                changes.append(change)
        return changes

    def _superseded(self, record: dict, offset: int) -> bool:
        cuts = self.cuts.get(record.get("stage")) if self.cuts and isinstance(record.get("stage"), str) else None
        return (
            bool(cuts)
            and record["event"] in ("metrics", "evaluation", "samples")
            and type(record.get("step")) is int
            and cuts.after(offset) < record["step"]
        )


class _Cuts:
    """The "resume" records of a stage that matter: those with no later one at the same or an earlier step."""

    def __init__(self):
        self.offsets: list[int] = []
        self.steps: list[int] = []

    def add(self, offset: int, step: int) -> None:
        if offset in self.offsets:
            return
        at = bisect_right(self.offsets, offset)
        if at < len(self.offsets) and self.steps[at] <= step:
            return  # a later one goes back further
        while at and self.steps[at - 1] >= step:
            at -= 1
            del self.offsets[at], self.steps[at]
        self.offsets.insert(at, offset)
        self.steps.insert(at, step)

    def after(self, offset: int) -> float:
        """The earliest step that a resume behind ``offset`` went back to; infinity where there is none."""
        at = bisect_right(self.offsets, offset)
        return self.steps[at] if at < len(self.steps) else float("inf")


class LiveRun:
    """One run directory.

    ``open`` gives something to show at once; ``advance`` reads on, and returns what is new; ``snapshot`` is all that is
    known. None of them raises for a log that is missing, torn, malformed or replaced.
    """

    def __init__(self, path: Path):
        self.path, self.log = Path(path), Path(path) / FILE_NAME
        self._cuts: dict[str, _Cuts] = {}
        self._exact = _Pass(self.log, self._cuts)
        self._second: _Pass | None = None
        self._sampled: Digest | None = None
        self._caught_up = False
        self._evaluations: float | None = None
        self._config: tuple[float, str, dict] | None = None

    @property
    def complete(self) -> bool:
        """Whether what is shown is all of the log."""
        return self._caught_up and self._second is None

    def open(self, seconds: float = 0.5) -> None:
        """Something to show at once: all of a small log, a sample of a large one."""
        if self._exact.lines.size() > SAMPLE_OVER:
            self._sampled = self._sample()
        else:
            self.advance(seconds)

    def _sample(self) -> Digest | None:
        digest = Digest(sampled=True)
        try:
            for line in spread(self.log, SAMPLES, self._exact.lines.size()):
                try:
                    digest.apply(parse(line))
                except Malformed:
                    continue
        except OSError:
            return None
        return digest

    def advance(self, seconds: float = 0.05) -> list | None:
        """Reads on for about ``seconds``. Returns the changes since the last call, in order (see ``Digest.apply``), or
        None where a page must take a new snapshot. [] while a large log is still being read."""
        end = time.monotonic() + seconds
        if self._second is not None:
            return self._read_again(end)
        changes, restarts, known = [], self._exact.lines.again, self._caught_up
        while (found := self._exact.read()) is not None:
            changes += found if known and len(changes) <= MOST_CHANGES else []
            if time.monotonic() > end:
                break
        if self._exact.lines.again != restarts:
            return None
        if found is not None:
            return changes if known and len(changes) <= MOST_CHANGES else None if known else []
        self._caught_up, self._sampled = True, None
        if not self._exact.digest.sharp:
            self._second = _Pass(self.log, self._cuts)
        changes += self._new_evaluations()
        return changes if known and len(changes) <= MOST_CHANGES else None

    def _read_again(self, end: float) -> list | None:
        """A resume cut through merged points: reads the log anew, leaving out what is known to be superseded."""
        while self._second.read() is not None:
            if time.monotonic() > end:
                return []
        if self._second.digest.sharp:
            self._exact, self._second = self._second, None
        else:  # one more resume came meanwhile
            self._second = _Pass(self.log, self._cuts)
        return None

    def _new_evaluations(self) -> list:
        """[["evaluations"]] when the folder of evaluations has changed: a file follows its record in the log."""
        try:
            now = (self.path / "evaluation").stat().st_mtime
        except OSError:
            return []
        if now == self._evaluations:
            return []
        self._evaluations = now
        return [["evaluations"]]

    # -- what a page asks for ---------------------------------------------------------------

    @property
    def digest(self) -> Digest:
        return self._sampled or self._exact.digest

    def snapshot(self) -> dict:
        """Curves, events and progress. "exact": all of the log, nothing superseded; else "read" is the share read."""
        return {
            **self.digest.snapshot(),
            "exact": self.complete and self.digest.sharp,
            "read": self.share_read(),
            "malformed": self._exact.malformed + self._exact.lines.dropped,
            "progress": self.progress(),
        }

    def share_read(self) -> float:
        reader = self._second or self._exact
        size = reader.lines.size()
        return 1.0 if self.complete or not size else min(1.0, reader.lines.offset / size)

    def progress(self) -> dict:
        return self.digest.progress(totals(self.config()[1]))

    def config(self) -> tuple[str, dict]:
        """(text, values) of config.yaml; ("", {}) where it is missing or not readable. Read again when it changes."""
        file = self.path / "config.yaml"
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
    """Steps of each stage whose number a config tells."""

    def steps(section: object, key: str = "steps") -> int | None:
        part = config.get(section) if isinstance(section, str) else None
        found = part.get(key) if isinstance(part, dict) else None
        return found if type(found) is int and abs(found) < 2**53 else None

    found = {
        "pretrain": steps("pretrain"),
        "rl": steps("rl"),
        "prepare/text": steps("prepare", "text_steps"),
        "prepare/reward": steps("prepare", "classifier_steps"),
        "prepare/judge": steps("prepare", "classifier_steps"),
    }
    return {stage: count for stage, count in found.items() if count is not None}
