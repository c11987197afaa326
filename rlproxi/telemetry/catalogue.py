"""The catalogue of metrics in catalogue.yaml: what each is, its unit and how to read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

#: The rows of the generated dashboards, in their order.
SECTIONS = ("Rewards", "Policy", "Optimisation", "Variety and distance to data", "Speed", "Faults", "Data")
_PART = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue.

    Attributes:
        name: may hold one <part> that stands for any word, as in reward/<name>. unit: '1' is a plain number.
        kind: gauge, the newest value; counter, a sum over the run; histogram, the distribution of values.
        total: each record of a counter holds the sum so far, not the increase. section: its row in a dashboard.
    """

    name: str
    unit: str
    help: str
    reading: str
    section: str
    kind: str = "gauge"
    total: bool = False

    @property
    def part(self) -> str | None:
        """The name of its <part>, which is a label of its series; None without one."""
        found = _PART.search(self.name)
        return found[1] if found else None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its series in Prometheus."""
        return ("run", "stage", *([self.part] if self.part else []))

    def part_of(self, name: str) -> str | None:
        """Return the word in place of <part> in a logged name; "" for a metric without one; None for another's name."""
        found = re.fullmatch(_PART.sub("([^/]+)", self.name), name)
        return None if found is None else "".join(found.groups())


def prometheus_name(metric: Metric) -> str:
    """Return the metric's name for Ray, which adds ``ray_`` in front.

    A <part> at the end becomes a label only. Elsewhere its word stays in the name too, because "<network>/loss" is not
    "loss". A counter ends in _total, by Prometheus's convention.
    """
    words = _PART.sub(lambda found: "" if found.end() == len(metric.name) else found[1], metric.name)
    name = "rlproxi_" + re.sub(r"\W+", "_", words.rstrip("/"))
    return f"{name}_total" if metric.kind == "counter" else name


def series(name: str) -> str:
    """Return a catalogue entry's name in PromQL, without labels. Raises KeyError for a name that is no entry."""
    return f"ray_{prometheus_name(entry(name))}"


_TEXT = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
#: Each process that exports reads it, so it is read by C where PyYAML has that.
_VALUES = yaml.load(_TEXT, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
CATALOGUE = tuple(Metric(name, **fields) for name, fields in _VALUES.items())
_ENTRIES = {metric.name: metric for metric in CATALOGUE}


def entry(name: str) -> Metric:
    """Return the entry of exactly this name, with its <part>. Raises KeyError."""
    return _ENTRIES[name]


def lookup(name: str) -> Metric | None:
    """Return the entry for a logged name, an exact one before a pattern; None for an unknown name."""
    if name in _ENTRIES:
        return _ENTRIES[name]
    return next((metric for metric in CATALOGUE if metric.part_of(name) is not None), None)
