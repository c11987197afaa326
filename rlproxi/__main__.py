"""``python -m rlproxi``: the same as the ``rlproxi`` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
