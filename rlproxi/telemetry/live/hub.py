"""Several run directories, read by one background thread. Updates are numbered, so that a page can resume after one."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections import deque
from pathlib import Path

from ...run_directory import INSIDE, PARTS
from .run import LiveRun

#: How many runs are read at a time, and how many updates, in all and in bytes, are kept for a page that reconnects.
OPEN_RUNS, KEPT_UPDATES, KEPT_BYTES = 12, 4000, 8 << 20
MAX_RUNS = 500
#: Seconds between two looks at the files, and after which a run that nobody asks for is closed.
_LOOK_EVERY, _FORGET_AFTER = 0.4, 600.0


def runs_in(path: Path) -> list[Path]:
    """``path``, if it is a run directory; else the run directories in it, the newest first."""
    if _is_run(path):
        return [path]
    return sorted((p for p in path.iterdir() if p.is_dir() and _is_run(p)), key=_changed, reverse=True)


def _is_run(path: Path) -> bool:
    return any((path / part).is_file() for part in PARTS)


class Hub:
    """The runs of ``paths``, run directories or folders of them; one is read until ten minutes after the last request.

    Raises FileNotFoundError for a path that is no folder, or if the only path is a folder without runs.
    """

    def __init__(self, paths: list[Path]):
        for path in paths:
            if not path.is_dir():
                raise FileNotFoundError(f"{path} is not a folder: expected a run directory, or a folder of them")
            if len(paths) == 1 and not runs_in(path):
                absent = ", no ".join(map(str, PARTS))
                raise FileNotFoundError(f"{path} is not a run directory and holds none: no {absent}")
        self.paths = [path.resolve() for path in paths]
        self.boot = secrets.token_hex(4)
        self._folders: dict[str, Path] = {}
        self._opened: dict[str, LiveRun] = {}
        #: When a page last asked for a run, and when its reading progress was last published.
        self._used: dict[str, float] = {}
        self._reported: dict[str, float] = {}
        self._lock = threading.Lock()
        self._updates: deque[tuple[int, str, str]] = deque()
        self._bytes = self._number = 0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._looked = 0.0

    def folders(self) -> dict[str, Path]:
        """id -> run directory, the newest first within a folder. An id is a folder's name, made unique by a number."""
        with self._lock:
            if time.monotonic() - self._looked > 2.0 or not self._folders:
                found = [run for path in self.paths for run in runs_in(path)]
                for path in [run for run in found[:MAX_RUNS] if run not in self._folders.values()]:
                    name, n = path.name or "run", 2
                    while name in self._folders:
                        name, n = f"{path.name}-{n}", n + 1
                    self._folders[name] = path
                self._looked = time.monotonic()
            return dict(self._folders)

    def listing(self) -> list[dict]:
        """[{"id", "finished"}]; nothing of the log is read."""
        return [{"id": name, "finished": (path / INSIDE.summary).is_file()} for name, path in self.folders().items()]

    def opened(self, name: str) -> LiveRun:
        """A run, which is read from now on. Raises KeyError for an unknown id."""
        path = self.folders()[name]
        with self._lock:
            new = name not in self._opened
            run = self._opened.setdefault(name, LiveRun(path))
            if new:
                run.lock.acquire()
            self._used[name] = time.monotonic()
            for oldest in sorted(self._opened, key=self._used.__getitem__)[:-OPEN_RUNS]:
                del self._opened[oldest]
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="dashboard-reader", daemon=True)
                self._thread.start()
        if new:
            try:
                run.open()
            finally:
                run.lock.release()
        return run

    def snapshot(self, name: str) -> dict:
        """``LiveRun.snapshot`` with "id" and the "cursor" to resume from. Raises KeyError for an unknown id."""
        run = self.opened(name)
        with run.lock:
            return {**run.snapshot(), "id": name, "cursor": self.cursor()}

    def cursor(self) -> str:
        """The name of the newest update: this server's name and a number."""
        return f"{self.boot}-{self._number}"

    def after(self, cursor: str, names: set[str]) -> tuple[str, list[tuple[str, str]] | None]:
        """(new cursor, [(cursor, JSON)] of updates of ``names`` since ``cursor``, None if that is unknown)."""
        boot, _, number = cursor.partition("-")
        with self._lock:
            for name in names & set(self._opened):
                self._used[name] = time.monotonic()
            now, oldest = self._number, self._updates[0][0] if self._updates else self._number + 1
            if boot != self.boot or not number.isdecimal() or len(number) > 18 or not oldest - 1 <= int(number) <= now:
                return f"{self.boot}-{now}", None
            fresh = []
            for entry in reversed(self._updates):  # the newest come last, and most pages miss only a few
                if entry[0] <= int(number):
                    break
                if entry[1] in names:
                    fresh.append((f"{self.boot}-{entry[0]}", entry[2]))
        return f"{self.boot}-{now}", fresh[::-1]

    def _publish(self, name: str, message: dict) -> None:
        text = json.dumps({"run": name, **message}, separators=(",", ":"))
        with self._lock:
            self._number += 1
            self._updates.append((self._number, name, text))
            self._bytes += len(text)
            while len(self._updates) > KEPT_UPDATES or (self._bytes > KEPT_BYTES and len(self._updates) > 1):
                self._bytes -= len(self._updates.popleft()[2])

    def _follow(self) -> None:
        while not self._stopping.wait(0.002 if self.step() else _LOOK_EVERY):
            pass

    def step(self) -> bool:
        """Read each open run a little further; return whether one of them has more to read at once."""
        busy = False
        with self._lock:
            for name in [n for n in self._opened if time.monotonic() - self._used[n] > _FORGET_AFTER]:
                del self._opened[name]
            runs = list(self._opened.items())
        for name, run in runs:
            with run.lock:
                changes = run.advance()
                more = not run.complete
                if changes is None:
                    self._publish(name, {"reset": True})
                elif changes:
                    self._publish(name, {"changes": changes, "progress": run.progress()})
                elif more and time.monotonic() - self._reported.get(name, 0.0) > 1.0:
                    self._reported[name] = time.monotonic()
                    self._publish(name, {"changes": [], "read": run.share_read()})
            busy |= more
        return busy

    def close(self) -> None:
        """Stop the reading thread and wait until it has ended."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()


def _changed(path: Path) -> float:
    for part in (INSIDE.log, INSIDE.config):
        try:
            return os.stat(path / part).st_mtime
        except OSError:
            continue
    return 0.0
