"""The ``rlproxi`` command. A user's mistake is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

#: Command -> its line in ``rlproxi --help``. Each is a module of this package with ``add_arguments(parser)`` and
#: ``command(options)``, which returns the exit status. Only the chosen command's module is imported.
COMMANDS = {
    "run": "pre-train, fine-tune by reward, evaluate and report; also python -m rlproxi.run",
    "sample": "draw images from a trained model",
    "score": "score images that already exist with a reward",
    "eval": "draw from models by samplers at each number of steps, score, and plot",
    "export": "write a model as a diffusers folder that needs no other file",
    "serve": "serve a model over HTTP with Ray Serve",
    "dashboard": "show runs on a live page: curves, samples, what each actor does",
    "report": "write report.html from a run directory",
    "doctor": "check what is installed, what a config lacks, and whether a run fits a cluster",
    "bench": "measure this machine's speed as ratios, each against a bar",
}
#: Commands that take ``key=value`` between their options. (Elsewhere ``--`` may have to protect a prompt.)
INTERMIXED = ("run", "doctor")
#: Commands that take long. An error of theirs that is not known to be the user's is a bug: its traceback is needed.
LONG = ("run", "bench")
#: What a user can get wrong: a value, or a file that is missing, in the way or unreadable. ConfigError is a ValueError.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def parser() -> argparse.ArgumentParser:
    """The parser of the first word, the command."""
    top = argparse.ArgumentParser(
        prog="rlproxi", description="Reward fine-tuning of text-to-image models around proximal diffusion."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=text)
    return top


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command and return its exit status: 2 for a user's mistake."""
    from ..errors import ConfigError

    module = import_module(f"{__package__}.{name}")
    own = argparse.ArgumentParser(f"rlproxi {name}", description=COMMANDS[name])
    module.add_arguments(own)
    options = own.parse_intermixed_args(argv) if name in INTERMIXED else own.parse_args(argv)
    mistakes = (ConfigError, FileNotFoundError) if name in LONG else USER_ERRORS
    try:
        return int(module.command(options))
    except mistakes as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"error: {'; '.join(lines) or type(error).__name__}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``argv``, by default the process's own, and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(parser().parse_args(argv[:1]).command, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
