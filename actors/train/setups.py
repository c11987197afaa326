"""What the driver hands to the ranks of a Ray Train job. Light to import: Train's controller unpickles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlproxi.config.loading import Config


@dataclass(frozen=True)
class PretrainSetup:
    """What a rank of pre-training needs; ``model_folder`` is what training starts from.

    cache: the folder of the encoded shards, None for the embedded portraits. data_start: the optimizer step at which
    the datasets begin.
    """

    config: Config
    run_dir: str
    model_folder: str
    log: Any
    cache: str | None = None
    data_start: int = 0


@dataclass(frozen=True)
class LearnerSetup:
    """What a rank of the learner needs; ``roles`` names conductor and weight store, which may be replaced meanwhile."""

    config: Config
    run_dir: str
    model_folder: str
    roles: tuple[str, str]
    log: Any
