"""From ``run.algorithm`` to the object that the learner trains with."""

from __future__ import annotations

import importlib

from ..config.loading import Config
from ..config.sections import ALGORITHMS
from .base import Algorithm


def algorithm_class(name: str) -> type[Algorithm]:
    """grpo, r0, didr, or one's own class as ``package.module:Class``.

    Raises ValueError for a class that cannot be imported, or that is no Algorithm.
    """
    if name in ALGORITHMS:
        own = {"grpo": "GRPO", "r0": "R0", "didr": "DIDR"}[name]
        return getattr(importlib.import_module(f"{__package__}.{name}"), own)
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        told = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"run.algorithm {name!r} cannot be imported: {told}; it must be installed or on PYTHONPATH"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise ValueError(f"run.algorithm {name!r} is not a subclass of rlproxi.algorithms.base.Algorithm")
    return kind


def build(config: Config) -> Algorithm:
    """The algorithm of a config. Raises ValueError as ``algorithm_class``."""
    return algorithm_class(config.run.algorithm)(config)
