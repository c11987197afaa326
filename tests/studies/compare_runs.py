"""Compare two run directories to the bit: every metric, evaluation, sample and weight.

    python tests/studies/compare_runs.py RUN_A RUN_B [--renamed KEY=NEW_KEY ...]

Times, throughputs and sizes in bytes of what is on its way are left out: they are measured, not computed. Prints what
differs and exits with 1 where anything does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

#: Parts of the names of metrics that are measured.
MEASURED = ("seconds", "time", "images_per_second", "bytes", "lag", "busy", "idle", "share/", "memory")


def records(folder: Path, renamed: dict[str, str]) -> list[dict[str, Any]]:
    """The run log's metrics, without what is measured, with keys renamed."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "metrics":
            kept = {k: v for k, v in record.items() if not any(word in k for word in MEASURED)}
            found.append({renamed.get(k, k): v for k, v in kept.items()})
    # Roles write side by side: the order within a stage is that of its steps.
    return sorted(found, key=lambda r: (r["stage"], r["step"], sorted(r)))


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf of nested lists and mappings that is not measured."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not any(word in key for word in MEASURED):
                yield from numbers(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{name}/{i}")
    else:
        yield name, value


def differences(one: Path, other: Path, renamed: dict[str, str]) -> Iterator[str]:
    """A sentence for each thing in which the runs differ."""
    a, b = records(one, renamed), records(other, {})
    yield f"{len(a)} and {len(b)} metrics records" if len(a) != len(b) else ""
    for x, y in zip(a, b):
        for key in sorted({*x, *y}):
            if x.get(key) != y.get(key):
                yield f"{x['stage']} step {x['step']}: {key} {x.get(key)} and {y.get(key)}"
    names = {
        str(f.relative_to(folder))
        for folder in (one, other)
        for kind in ("evaluation/*.json", "samples/*.npz", "models/**/*.safetensors")
        for f in folder.glob(kind)
    }
    for name in sorted(names):
        if not ((one / name).is_file() and (other / name).is_file()):
            yield f"{name} is in one of them alone"
        elif name.endswith(".json"):
            x, y = (dict(numbers(json.loads((folder / name).read_text()))) for folder in (one, other))
            yield from (f"{name}: {k} {x.get(k)} and {y.get(k)}" for k in sorted({*x, *y}) if x.get(k) != y.get(k))
        elif name.endswith(".npz"):
            with np.load(one / name) as x, np.load(other / name) as y:
                yield from (
                    f"{name}: {k}"
                    for k in sorted({*x.files, *y.files})
                    if k not in x or k not in y or x[k].tobytes() != y[k].tobytes()
                )
        else:
            x, y = load_file(one / name), load_file(other / name)
            yield from (
                f"{name}: {k}" for k in sorted({*x, *y}) if k not in x or k not in y or not torch.equal(x[k], y[k])
            )


def main() -> int:
    """Returns 1 where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument(
        "--renamed", nargs="*", default=[], metavar="KEY=NEW_KEY", help="metrics of the first run that have new names"
    )
    options = parser.parse_args()
    found = [line for line in differences(*options.runs, dict(pair.split("=") for pair in options.renamed)) if line]
    print(
        "\n".join(found)
        or f"equal to the bit: {len(records(options.runs[0], {}))} metrics records, evaluations, samples and weights"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
