"""``python -m rlproxi.run``: the same as ``rlproxi run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli.main import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlproxi run`` with ``argv``, by default the process's own, and return the exit status."""
    return run_command("run", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
