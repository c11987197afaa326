"""``python -m rlproxi``: the same as the ``rlproxi`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
