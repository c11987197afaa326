"""Bad input by the thousand: a room's readers, fed in a process of their own whose memory and time are bounded.

A room is a file of this folder. Its ``INPUTS`` tells reader -> number of inputs, its ``readers(folder)`` makes them.
Input ``i`` of a ``Reader`` depends on its name and ``i`` alone, so any of them can be had again:

    python tests/fuzz/hunt.py test_shard_files --reader tar --input 17

An input is survived where the reader returns, or raises exactly one of the classes that it documents (a subclass such
as UnicodeDecodeError is none), with its words in the message. Any other exception, more CPU time or more memory is a
find.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: CPU seconds of one input; wall seconds until one that blocks is given up; bytes that the process may have mapped
#: beyond what it began with, and by which one input may raise its greatest resident size.
CPU_SECONDS, WALL_SECONDS, MAPPED, RESIDENT = 5.0, 400.0, 3 << 29, 192 << 20
MOST_FINDS = 8
#: Characters of an error that is still for reading.
LONGEST_WORDS = 200_000


@dataclass(frozen=True)
class Reader:
    """``make(random, i)`` gives input ``i``, ``read(input)`` reads it; ``words`` are in every error's message."""

    make: Callable[[random.Random, int], Any]
    read: Callable[[Any], object]
    allowed: tuple[type[BaseException], ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Given:
    """As ``Reader``, with inputs that Hypothesis draws from ``strategy`` and makes small where one is a find."""

    strategy: Any
    read: Callable[[Any], object]
    allowed: tuple[type[BaseException], ...] = ()
    words: str = ""
    examples: tuple = ()


class TooSlow(BaseException):
    """An input has used its CPU time."""


def examples(first: list, then: Callable[[random.Random], Any]) -> Callable[[random.Random, int], Any]:
    """Inputs known to have been trouble, then others."""
    return lambda draw, i: first[i] if i < len(first) else then(draw)


def hunted(room: str, inputs: dict[str, int]) -> None:
    """Hunts in a child process. Raises AssertionError with the finds, or where not all inputs were fed."""
    command = [sys.executable, str(Path(__file__)), room, "--inputs", json.dumps(inputs)]
    child = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=900 + 0.2 * sum(inputs.values()),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, f"{room} did not end its hunt ({child.returncode}):\n{child.stderr[-4000:]}"
    told = json.loads(child.stdout.splitlines()[-1])
    assert not told["finds"], "\n\n".join(told["finds"])
    assert told["fed"] == inputs


# -- the child --------------------------------------------------------------------------------


def feed(reader: Reader | Given, made: Any) -> str | None:
    """Feeds one input; what is wrong with how it was taken, None where nothing is."""
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the greatest resident size begins again; getrusage's is the parent's
    before = _greatest()
    faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)  # for what never comes back to Python
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        wrong = _wrong(reader, made)
    except TooSlow:  # also in writing down what an error says
        wrong = traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
    grown = _greatest() - before
    if wrong is None and grown > RESIDENT:
        wrong = f"it took {grown >> 20} MiB"
    return wrong and f"{str(made)[:300]!r}\n{wrong[-3000:]}"


def _greatest() -> int:
    """Bytes that were resident at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _wrong(reader: Reader | Given, made: Any) -> str | None:
    try:
        reader.read(made)
    except TooSlow:
        raise
    except BaseException as error:  # SystemExit and RecursionError too are finds
        if type(error) not in reader.allowed:
            return traceback.format_exc(limit=-6)
        told = str(error)
        if reader.words not in told or len(told) > LONGEST_WORDS:
            return f"{reader.words!r} is not in its words, or they are {len(told)} characters: {told}"[:600]
    return None


def feed_all(name: str, reader: Reader, numbers: Iterable[int]) -> tuple[int, list[str]]:
    """(inputs fed, finds); few finds are enough."""
    finds: list[str] = []
    fed = 0
    for i in numbers:
        if len(finds) < MOST_FINDS:
            wrong = feed(reader, reader.make(random.Random(f"{name} {i}"), i))
            finds += [f"{name}, input {i}: {wrong}"] if wrong else []
            fed += 1
    return fed, finds


def feed_given(name: str, given: Given, count: int) -> tuple[int, list[str]]:
    """As ``feed_all``; the first find only, made small."""
    import hypothesis

    fed, found = 0, ""

    def one(made: Any) -> None:
        nonlocal fed, found
        fed += 1
        wrong = feed(given, made)
        found = wrong or found
        assert not wrong

    one.__name__ = one.__qualname__ = "".join(c if c.isalnum() else "_" for c in name)
    test = hypothesis.given(given.strategy)(one)
    for made in given.examples:
        test = hypothesis.example(made)(test)
    test = hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(test)
    try:
        test()
    except BaseException as error:
        found = found or repr(error)
        return fed, [f"{name}: {found}"]
    return min(fed, count), []


def hunt(room: str, inputs: dict[str, int], folder: Path, only: int | None = None) -> dict:
    """{"fed": reader -> number of inputs, "finds": [text]}."""
    module = importlib.import_module(f"fuzz.{room}")
    readers: dict[str, Reader | Given] = module.readers(folder)
    assert set(readers) == set(module.INPUTS), "INPUTS names other readers"

    def too_slow(*_) -> None:
        raise TooSlow(f"more than {CPU_SECONDS:g} s of CPU time")

    signal.signal(signal.SIGPROF, too_slow)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MAPPED, resource.RLIM_INFINITY))
    told: dict = {"fed": {}, "finds": [], "seconds": {}}
    for name, count in inputs.items():
        begun, reader = resource.getrusage(resource.RUSAGE_SELF).ru_utime, readers[name]
        if isinstance(reader, Given):
            fed, finds = feed_given(name, reader, count)
        else:
            fed, finds = feed_all(name, reader, range(count) if only is None else [only])
        told["fed"][name] = fed
        told["finds"] += finds
        print(name, *finds, sep="\n\n", file=sys.stderr, flush=True)  # so that what ends too soon has told
        told["seconds"][name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_utime - begun, 2)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("room", help="a file of this folder, without .py")
    parser.add_argument("--inputs", type=json.loads, help="reader -> number of inputs, as JSON")
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--input", type=int, help="only this one")
    options = parser.parse_args()
    inputs = options.inputs or importlib.import_module(f"fuzz.{options.room}").INPUTS
    inputs = {name: count for name, count in inputs.items() if options.reader in (None, name)}
    with tempfile.TemporaryDirectory() as folder:
        told = hunt(options.room, inputs, Path(folder), options.input)
    print(told["seconds"], json.dumps(told), sep="\n", flush=True)
    os._exit(0)  # threads that a reader left behind are not waited for


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fuzz import hunt as this  # the module that the rooms import

    this.main()
