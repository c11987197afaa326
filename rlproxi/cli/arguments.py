"""Types and arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ..errors import ConfigError


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer >= minimum."""

    def convert(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    convert.__name__ = "integer"  # argparse names it in its messages
    return convert


def counts(text: str) -> list[int]:
    """An argparse type: step counts separated by commas, returned in ascending order."""
    return sorted({at_least(1)(part) for part in text.split(",")})


def share(text: str) -> float:
    """An argparse type: a finite number >= 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add --precision: the networks' arithmetic."""
    choices, text = ("auto", "float32", "bfloat16"), "the networks' arithmetic (default float32)"
    parser.add_argument("--precision", choices=choices, default="float32", help=text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``arguments``: a config file and overrides, in any order. ``split_config`` reads them."""
    text = "a YAML file (default: configs/quickstart.yaml) and overrides such as rl.lr=1e-5"
    parser.add_argument("arguments", nargs="*", metavar="CONFIG | key=value", help=text)


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the config file or None, the overrides). Raises ConfigError for more than one file."""
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"one config at a time, got {', '.join(files)}")
    return (files[0] if files else None), [a for a in arguments if "=" in a]
