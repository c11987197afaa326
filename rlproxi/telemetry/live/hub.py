"""Several run directories, read in one background thread; news have numbers, so that a reader can go on after one."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from ...run_directory import INSIDE, PARTS
from .files import Timeline
from .run import LiveRun

#: Runs that are read on at a time, and news that a reconnecting page can still have.
OPEN_RUNS, KEPT_NEWS, KEPT_BYTES = 12, 4000, 8 << 20
MAX_RUNS = 500
_LOOK_EVERY, _FORGET_AFTER = 0.4, 600.0


def is_run(path: Path) -> bool:
    """Whether a folder holds a part of a run."""
    return any((path / part).is_file() for part in PARTS)


@dataclass
class Opened:
    """A run that is being read, with the lock that guards it."""

    live: LiveRun
    timeline: Timeline
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = 0.0
    told: float = 0.0


class Hub:
    """The runs of ``paths``: run directories, or folders of them (looked at again when asked for the list).

    Nothing is read before a run is asked for, and no longer than ten minutes after it was last asked for. Raises
    FileNotFoundError for a path that is neither a run directory nor a folder.
    """

    def __init__(self, paths: list[Path]):
        for path in paths:
            if not path.is_dir():
                raise FileNotFoundError(f"{path} is not a folder: expected a run directory, or a folder of them")
            if not is_run(path) and len(paths) == 1 and not any(is_run(p) for p in path.iterdir() if p.is_dir()):
                raise FileNotFoundError(
                    f"{path} is not a run directory and holds none: no {', no '.join(map(str, PARTS))}"
                )
        self.paths = [path.resolve() for path in paths]
        self.boot = secrets.token_hex(4)
        self._folders: dict[str, Path] = {}
        self._opened: dict[str, Opened] = {}
        self._lock = threading.Lock()
        self._news: deque[tuple[int, str, str]] = deque()
        self._bytes = self._number = 0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._looked = 0.0

    # -- which runs there are ---------------------------------------------------------------

    def folders(self) -> dict[str, Path]:
        """id -> run directory, newest first within a folder. An id is the folder's name, told apart by a number."""
        with self._lock:
            if time.monotonic() - self._looked > 2.0 or not self._folders:
                found = []
                for path in self.paths:
                    inside = [] if is_run(path) else [p for p in path.iterdir() if p.is_dir() and is_run(p)]
                    found += [path] if is_run(path) else sorted(inside, key=_changed, reverse=True)
                known = {path: name for name, path in self._folders.items()}
                for path in found[:MAX_RUNS]:
                    name, n = path.name or "run", 2
                    while path not in known and name in self._folders:
                        name, n = f"{path.name}-{n}", n + 1
                    self._folders.setdefault(known.get(path, name), path)
                self._looked = time.monotonic()
            return dict(self._folders)

    def listing(self) -> list[dict]:
        """[{"id", "changed" (unix seconds), "bytes", "finished"}]; nothing of the log is read."""
        return [
            {
                "id": name,
                "changed": _changed(path),
                "bytes": _size(path / INSIDE.log),
                "finished": (path / INSIDE.summary).is_file(),
            }
            for name, path in self.folders().items()
        ]

    def opened(self, name: str) -> Opened:
        """A run, being read from now on. Raises KeyError for an unknown id."""
        path = self.folders()[name]
        with self._lock:
            run = self._opened.get(name)
            if run is None:
                run = self._opened[name] = Opened(LiveRun(path), Timeline(path))
                run.lock.acquire()
                for oldest in sorted(self._opened, key=lambda n: self._opened[n].used or float("inf"))[:-OPEN_RUNS]:
                    del self._opened[oldest]
                new = True
            else:
                new = False
            run.used = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="dashboard-reader", daemon=True)
                self._thread.start()
        if new:
            try:
                run.live.open()
            finally:
                run.lock.release()
        return run

    def snapshot(self, name: str) -> dict:
        """``LiveRun.snapshot`` with the "cursor" to go on from. Raises KeyError."""
        run = self.opened(name)
        with run.lock:
            return {**run.live.snapshot(), "id": name, "cursor": self.cursor()}

    # -- what is new ------------------------------------------------------------------------

    def cursor(self) -> str:
        return f"{self.boot}-{self._number}"

    def after(self, cursor: str, names: set[str]) -> tuple[str, list[tuple[str, str]] | None]:
        """(new cursor, [(cursor, JSON)]) of what came for ``names`` since ``cursor``; None in the place of the list
        where it is too long ago, or was another server's."""
        boot, _, number = cursor.partition("-")
        with self._lock:
            for name in names & set(self._opened):
                self._opened[name].used = time.monotonic()
            now, oldest = self._number, self._news[0][0] if self._news else self._number + 1
            if boot != self.boot or not number.isdecimal() or len(number) > 18 or not oldest - 1 <= int(number) <= now:
                return f"{self.boot}-{now}", None
            fresh = []
            for entry in reversed(self._news):  # the newest stand at the end, and most readers lack few
                if entry[0] <= int(number):
                    break
                if entry[1] in names:
                    fresh.append((f"{self.boot}-{entry[0]}", entry[2]))
        return f"{self.boot}-{now}", fresh[::-1]

    def _tell(self, name: str, message: dict) -> None:
        text = json.dumps({"run": name, **message}, separators=(",", ":"))
        with self._lock:
            self._number += 1
            self._news.append((self._number, name, text))
            self._bytes += len(text)
            while len(self._news) > KEPT_NEWS or (self._bytes > KEPT_BYTES and len(self._news) > 1):
                self._bytes -= len(self._news.popleft()[2])

    def _follow(self) -> None:
        while not self._stopping.wait(0.002 if self.step() else _LOOK_EVERY):
            pass

    def step(self) -> bool:
        """Reads each open run a little further; whether one has more to read at once."""
        busy = False
        with self._lock:
            runs = list(self._opened.items())
        for name, run in runs:
            if time.monotonic() - run.used > _FORGET_AFTER and run.used:
                with self._lock:
                    self._opened.pop(name, None)
                continue
            with run.lock:
                changes = run.live.advance()
                more = not run.live.complete
                if changes is None:
                    self._tell(name, {"reset": True})
                elif changes:
                    self._tell(name, {"changes": changes, "progress": run.live.progress()})
                elif more and time.monotonic() - run.told > 1.0:
                    run.told = time.monotonic()
                    self._tell(name, {"changes": [], "read": run.live.share_read()})
            busy |= more
        return busy

    def close(self) -> None:
        self._stopping.set()


def _changed(path: Path) -> float:
    for part in (INSIDE.log, INSIDE.config):
        try:
            return os.stat(path / part).st_mtime
        except OSError:
            continue
    return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
