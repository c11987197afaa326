"""``python -m rlproxi.run [CONFIG] [key=value ...] [--dry-run] [--resume RUN_DIR]``: stages in order.

The run directory is the truth. A stage that is done is not done again; one that was cut short goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from ..config.loading import Config, config_folder, load_config
from ..errors import ConfigError, RunStopped


def main(argv: list[str] | None = None) -> int:
    """Returns the process's exit code: 0 done, 1 stopped with a reason, 2 bad input."""
    parser = argparse.ArgumentParser("python -m rlproxi.run", description="Pre-train, fine-tune by reward, report.")
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG | key=value",
        help="a YAML file (default: configs/quickstart.yaml) and overrides such as rl.lr=1e-5",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run directory")
    options = parser.parse_intermixed_args(argv)
    try:
        config, run_dir = _open(options)
        if _plan(config, options.dry_run):
            from actors.run.driver import Driver

            Driver(config, run_dir or _new_run_dir(config)).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(config: Config, dry_run: bool) -> bool:
    """Prints the plan; True when the run can start. Raises ConfigError for what would stop it: a dry run only tells of
    files that are not there."""
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
    return not dry_run


def _with_shapes(config: Config) -> Config:
    """The config with the shapes of the published checkpoint in the place of one that is not there yet."""
    from ..models.folders import published_shapes

    model = config.model
    for key in ("init", "encoders"):
        named = getattr(model, key)
        shapes = published_shapes(named) if named and not Path(named).is_dir() else None
        if shapes:
            model = model.model_copy(update={key: str(shapes)})
    return config.model_copy(update={"model": model})


def _open(options) -> tuple[Config, Path | None]:
    overrides = [a for a in options.arguments if "=" in a]
    files = [a for a in options.arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"one config at a time, got {', '.join(files)}")
    if not options.resume:
        return load_config(files[0] if files else config_folder() / "quickstart.yaml", overrides), None
    run_dir = Path(options.resume)
    if files:
        raise ConfigError(f"--resume takes the run's own config.yaml; leave out {files[0]} (key=value still works)")
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--resume {run_dir}: no config.yaml there, so it is not a run directory")
    return load_config(run_dir / "config.yaml", overrides), run_dir


def _new_run_dir(config: Config) -> Path:
    base = Path(config.run.dir) / f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, n = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder, n = base.with_name(f"{base.name}-{n}"), n + 1


if __name__ == "__main__":
    sys.exit(main())
