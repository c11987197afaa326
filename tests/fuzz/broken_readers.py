"""Readers that break every promise: what the hunt must see."""

import contextlib
import os

from fuzz import hunt
from fuzz.hunt import Given, Reader

INPUTS = {"sound": 3, "another class": 1, "a subclass": 1, "without the name": 1, "slow": 1, "large": 1, "given": 50}
hunt.CPU_SECONDS = 2.0  # more than the large one takes on a busy machine


def readers(folder):
    from hypothesis import strategies as st

    def fail(error):
        raise error

    def loop():
        while True:
            with contextlib.suppress(Exception):
                os.getpid()

    def numbers(made):
        if made > 1000:
            raise KeyError(made)

    allowed = (ValueError,)
    return {
        "sound": Reader(lambda draw, i: i, lambda i: fail(ValueError(f"the.file, {i}")), allowed, "the.file"),
        "another class": Reader(lambda draw, i: i, lambda i: {}[i], allowed),
        "a subclass": Reader(lambda draw, i: i, lambda i: b"\xff".decode(), allowed),
        "without the name": Reader(lambda draw, i: i, lambda i: fail(ValueError("no")), allowed, "the.file"),
        "slow": Reader(lambda draw, i: i, lambda i: loop(), allowed),
        "large": Reader(lambda draw, i: i, lambda i: len(bytearray(b"x") * (hunt.RESIDENT + (64 << 20))), allowed),
        "given": Given(st.integers(0, 10**6), numbers, allowed, examples=(5,)),
    }
