"""``python -m rlproxi.run``: the same as ``rlproxi run``."""

import sys

from .cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("run", sys.argv[1:]))
