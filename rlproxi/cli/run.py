"""``rlproxi run``, also ``python -m rlproxi.run``: run the config's stages in order.

The run directory is the truth. A stage that is done is not repeated; an interrupted one continues from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config.loading import Config, config_folder, load_config
from ..errors import ConfigError, RunStopped
from ..run_directory import RunDirectory
from .arguments import add_config, split_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue the run of this run directory")


def command(options: argparse.Namespace) -> int:
    """Check the config, print the plan and run. Returns 0 done, 1 stopped with a reason, 2 bad input."""
    try:
        config, run_dir = _config(options)
        _plan(config, options.dry_run)
        if not options.dry_run:
            from ..api import run_stages

            run_stages(config, run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # each problem on a line of its own
        return 2
    except RunStopped as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


def _config(options: argparse.Namespace) -> tuple[Config, Path | None]:
    """(the config, the run directory to continue or None)."""
    file, overrides = split_config(options.arguments)
    if not options.resume:
        return load_config(file or config_folder() / "quickstart.yaml", overrides), None
    run_dir = Path(options.resume)
    if file:
        raise ConfigError(f"--resume takes the run's own config.yaml; leave out {file} (key=value still works)")
    given = RunDirectory(run_dir).config
    if not given.is_file():
        raise ConfigError(f"--resume {run_dir}: no config.yaml there, so it is not a run directory")
    return load_config(given, overrides), run_dir


def _plan(config: Config, dry_run: bool) -> None:
    """Print the plan. Raises ConfigError for what would stop the run; a dry run only lists files that are missing."""
    from ..planning.dry_run import describe
    from ..planning.preflight import problems

    found = problems(config)
    stopping = [problem.text for problem in found if not (dry_run and problem.missing)]
    if stopping:
        raise ConfigError("\n       ".join(stopping))
    for line in describe(config if not found else _with_shapes(config)):
        print(line, flush=True)
    for problem in found:
        print(f"missing    {problem.text}")


def _with_shapes(config: Config) -> Config:
    """The config, with the shapes of a published checkpoint in place of one that is missing here."""
    from ..models.folders import published_shapes

    model = config.model
    for key in ("init", "encoders"):
        named = getattr(model, key)
        shapes = published_shapes(named) if named and not Path(named).is_dir() else None
        if shapes:
            model = model.model_copy(update={key: str(shapes)})
    return config.model_copy(update={"model": model})
