"""``rlproxi report``: write report.html from a run directory."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def command(options: argparse.Namespace) -> int:
    """Write the page and print its path. Returns 0."""
    from ..pages.report import write_report

    print(write_report(options.run_dir))
    return 0
