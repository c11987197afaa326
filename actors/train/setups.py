"""What the driver hands to the ranks of a Ray Train job. Light to import: Train's controller unpickles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlproxi.config.loading import Config


@dataclass(frozen=True)
class PretrainSetup:
    """What a rank of pre-training needs.

    model_folder: what training starts from. log: the run-log actor. cache: the folder of the encoded shards, None
    where the data are the embedded portraits. data_start: the optimizer step at which the datasets begin.
    """

    config: Config
    run_dir: str
    model_folder: str
    log: Any
    cache: str | None = None
    data_start: int = 0


@dataclass(frozen=True)
class LearnerSetup:
    """What a rank of the learner needs.

    roles: the names of conductor and weight store; the actors behind them may be replaced while the job runs.
    """

    config: Config
    run_dir: str
    model_folder: str
    roles: tuple[str, str]
    log: Any
