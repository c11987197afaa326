"""``rlproxi export``: write a model as a diffusers folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory or a model folder")
    add("out", type=Path, metavar="OUT", help="the folder to write; it must not exist yet")
    merge = "add adapters to the base's weights (default: where the base is a published network)"
    add("--merge", action=argparse.BooleanOptionalAction, help=merge)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights as stored (default: as they are)")
    add("--adapter-only", action="store_true", help="the adapters alone, in diffusers' LoRA format")


def command(options: argparse.Namespace) -> int:
    """Write the folder and print its path. Returns 0."""
    from ..models.export import export

    print(export(options.model, options.out, options.merge, options.dtype, options.adapter_only))
    return 0
