"""That the hunt sees what breaks a promise, and how many inputs it has.

Each room's own test holds that exactly as many as it names were fed.
"""

import importlib
from pathlib import Path

import pytest

from fuzz.hunt import hunted

ROOMS = sorted(file.stem for file in Path(__file__).parent.glob("test_*.py") if file.stem != "test_count")


def test_ten_thousand_inputs_are_fed():
    counts = {room: sum(importlib.import_module(f"fuzz.{room}").INPUTS.values()) for room in ROOMS}
    assert len(ROOMS) == 5 and sum(counts.values()) >= 10_000, counts


def test_every_kind_of_find_is_seen():
    broken = importlib.import_module("fuzz.broken_readers")
    with pytest.raises(AssertionError) as told:
        hunted("broken_readers", broken.INPUTS)
    finds = str(told.value)
    for words in (
        "another class, input 0: '0'",
        "KeyError: 0",
        "a subclass, input 0",
        "UnicodeDecodeError",
        "without the name, input 0",
        "'the.file' is not in its words",
        "slow, input 0",
        "TooSlow",
        "large, input 0",
        "it took",
        "given: '1001'",
    ):
        assert words in finds, f"{words} is not in\n{finds}"
    assert "sound" not in finds
