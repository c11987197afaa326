"""The names that ``import rlproxi`` gives. Only this module and ``rlproxi.cli`` import ``actors``."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from .config.loading import Config, config_folder, load_config
from .errors import ConfigError
from .models.export import export
from .models.pipeline import TextToImage
from .rewards.api import score_images
from .run_directory import RunDirectory

__all__ = ["TextToImage", "export", "fine_tune", "load_config", "score_images"]


def fine_tune(
    config: str | os.PathLike | Config | None = None, *overrides: str, resume: str | os.PathLike | None = None
) -> Path:
    """Run a config's stages, as ``rlproxi run`` does, and return the run directory.

    Args:
        config: a YAML file or a Config; None is configs/quickstart.yaml, or the run's own with ``resume``.
        overrides: ``key=value`` pairs, for example ``"rl.steps=200"``. A Config takes none.
        resume: a run directory to continue from its last checkpoint.

    Raises:
        ConfigError: bad keys or values, missing files, roles that do not fit the cluster.
        RunStopped: the run ended early, with the reason.
    """
    from .planning.preflight import problems

    if resume is not None:
        if config is not None:
            raise ConfigError("resume takes the run's own config.yaml: leave config out, overrides still work")
        config = RunDirectory(resume).config
    if isinstance(config, Config):
        if overrides:
            raise ConfigError(f"a Config takes no overrides, got {', '.join(overrides)}: give them to load_config")
    else:
        config = load_config(config or config_folder() / "quickstart.yaml", list(overrides))
    found = problems(config)
    if found:
        raise ConfigError("\n".join(problem.text for problem in found))
    return run_stages(config, None if resume is None else Path(resume))


def run_stages(config: Config, run_dir: Path | None = None) -> Path:
    """Run a checked config on Ray and return the run directory. ``run_dir`` None: a new one below ``run.dir``."""
    from actors.run.driver import Driver

    folder = run_dir or new_run_dir(config)
    Driver(config, folder).run()
    return folder


def new_run_dir(config: Config) -> Path:
    """Make ``run.dir/NAME-DATE-TIME``, with a number behind it where that exists already."""
    base = Path(config.run.dir) / f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, n = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder, n = base.with_name(f"{base.name}-{n}"), n + 1
