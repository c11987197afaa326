"""``rlproxi dashboard``: show runs on a live page."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directories, or a folder of them")
    add("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    add("--port", type=at_least(0), metavar="N", help="0: any (default 8270, or the next free one)")


def command(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Returns 0."""
    from ..dashboard import server

    return server.command(options.run_dirs, options.host, options.port)
