"""Valid input, spoilt: bytes changed with or without a sense for where numbers lie, and values of JSON or YAML."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

#: Bytes that parsers trip over.
TOKENS = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r\n",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-1",
    b"9" * 400,
    b'"\\ud800"',
    b"{",
    b"[" * 60,
    b"../",
    b"\\u0000",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!python/object/apply:os.system ",
    b"<<: ",
    b"%00",
    b"\xe2\x80\xa8",
    b"null",
    b"\x80\x04}q\0.",
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
#: In their place ``dump_json`` writes what json.dumps cannot.
DEEP, HUGE, OBJECTS = "@deep@", "@huge@", "@objects@"
WEIRD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "x",
    "\0",
    "a\0b",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "e\u0301\u202e\u2028",
    "y" * 5000,
    "1e999",
    "NaN",
    "0x10",
    [],
    {},
    [None],
    [[[]]],
    {"": None},
    {"\ud800": 1},
    {"x": {}},
    [1, "x", None, {}],
    [0] * 300,
    DEEP,
    HUGE,
    OBJECTS,
)


def spoil(draw: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """``data`` with one to four changes: bits, bytes, numbers, cuts, copies, tokens, parts of ``others``."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        size = draw.choice((1, 2, 4, 16, 200, 3000))
        kind = draw.randrange(9)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at : at + size] = draw.randbytes(len(changed[at : at + size]))
        elif kind == 2:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice(NUMBERS) % 2 ** (8 * width)
            changed[at : at + width] = number.to_bytes(width, draw.choice(("big", "little")))
        elif kind == 3:
            del changed[at : len(changed) if draw.random() < 0.5 else at + size]
        elif kind == 4:
            changed[at:at] = changed[at : at + size] * draw.choice((1, 3))
        elif kind == 5:
            changed[at:at] = draw.choice(TOKENS)
        elif kind == 6:
            changed[at:at] = draw.randbytes(size)
        elif kind == 7 and others:
            other = draw.choice(others)
            cut = draw.randrange(len(other) + 1)
            changed[at : at + size] = other[cut : cut + size]
        else:
            changed[at : at + size] = bytes(len(changed[at : at + size]))
    return bytes(changed)


def spoil_value(draw: random.Random, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, left out or doubled; the original stays as it is."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _weird(draw)
        inside, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[draw.choice(("", "x", "\0", "step", "name", "__class__", "9" * 30))] = inside[key]
        elif kind == 1:
            inside.insert(key, _weird(draw))
        elif kind == 2:
            other, place = draw.choice(places)
            if _has(other, place) and not isinstance(other[place], (dict, list)):
                inside[key] = other[place]
        else:
            inside[key] = _weird(draw)
    return value


def _weird(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(WEIRD))  # it may be changed next


def _has(inside: Any, key: Any) -> bool:
    return key in inside if isinstance(inside, dict) else key < len(inside)


def _places(value: Any):
    """(container, key) of everything inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def dump_json(value: Any) -> bytes:
    """JSON as Python writes it (NaN and all); 100,000 brackets, 5,000 digits, 20,000 keys for DEEP, HUGE, OBJECTS."""
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{HUGE}"', "9" * 5_000)
    return text.replace(f'"{OBJECTS}"', '{"a":' * 20_000 + "1" + "}" * 20_000).encode()


def spoilt_json(draw: random.Random, seeds: Sequence[Any]) -> bytes:
    """A spoilt value, or a value's spoilt text."""
    seed = draw.choice(seeds)
    if draw.random() < 0.6:
        return dump_json(spoil_value(draw, seed))
    return spoil(draw, dump_json(seed), [dump_json(other) for other in seeds])
