"""``python -m rlproxi.run``: the same as ``rlproxi run``."""

import sys

from .cli.run import main

if __name__ == "__main__":
    sys.exit(main())
