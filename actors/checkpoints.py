"""Checkpoints in the run directory: written whole or not at all, newest usable one first."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from rlproxi.schema import ConfigError

MARK = "complete.json"


def root(run_dir: str | Path, stage: str) -> Path:
    """Where a stage's checkpoints lie."""
    return Path(run_dir) / "checkpoints" / stage


def scratch(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it has its name."""
    return root / f".writing-{step:06d}"


def begin(root: Path, step: int) -> Path:
    """A fresh scratch folder for the checkpoint of ``step``; ``finish`` gives it its name."""
    folder = scratch(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(root: Path, step: int, facts: dict, keep: int = 2) -> Path:
    """Marks the scratch folder complete, renames it to step-<n> and drops all but the newest ``keep``."""
    written, final = scratch(root, step), root / f"step-{step:06d}"
    (written / MARK).write_text(json.dumps({"step": step, "files": _files(written), **facts}))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(written, final)
    # Newer steps than this one are damaged or superseded, or the run would not have come from before them.
    kept = [folder for folder in _all(root) if int(folder.name[5:]) <= step][:keep]
    for old in set(_all(root)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _all(root: Path) -> list[Path]:
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d+", p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def latest(root: Path, warn=print) -> tuple[Path, dict] | None:
    """The newest complete checkpoint and its facts; damaged ones are named by ``warn`` and passed over."""
    for folder in _all(root):
        try:
            facts = json.loads((folder / MARK).read_text())
            files = _files(folder)
            wrong = [name for name, size in facts["files"].items() if files.get(name) != size]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"checkpoint {folder} is unusable ({error}); trying the one before")
            continue
        if wrong:
            warn(f"checkpoint {folder} is damaged (missing or cut short: {', '.join(wrong[:3])}); "
                 "trying the one before")
            continue
        return folder, facts
    return None


def require_world(root: Path, world: int) -> None:
    """Raises ConfigError where the newest checkpoint was written by another number of ranks: ZeRO shards do not fit."""
    found = latest(root, warn=lambda message: None)
    if found and found[1].get("world") != world:
        written = found[1].get("world")
        raise ConfigError(f"checkpoint {found[0]} was written by {written} learner ranks and cannot be resumed by {world}: "
                          f"set resources.learner_workers={written}")
