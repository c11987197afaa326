"""One result of a check, as ``rlproxi doctor`` prints it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """level: ok, warn or fail. what: the thing that was checked. remedy: what to do about it."""

    level: str
    what: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.level:<5} {self.what:<11} {self.text}"]
        return "\n".join([*lines, *([f"      {'':<11} -> {self.remedy}"] if self.remedy else [])])


def ok(what: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", what, text)


def warn(what: str, text: str, remedy: str = "") -> Finding:
    """Return a finding that does not stop a run."""
    return Finding("warn", what, text, remedy)


def fail(what: str, text: str, remedy: str = "") -> Finding:
    """Return a finding that would stop a run."""
    return Finding("fail", what, text, remedy)
