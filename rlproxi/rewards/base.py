"""One protocol and one registry for rewards.

A scorer takes uint8 images with their prompts and returns float32 scores, one for each image. A score that
cannot be had is an error, never a 0: ``checked_scores`` turns wrong answers into ``RewardError``.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any, Callable, Protocol

import numpy as np


class RewardError(RuntimeError):
    """A scorer failed or returned something that is no score."""


class Scorer(Protocol):
    """What a reward is."""

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3], prompts B strings -> float32 [B], higher is better."""
        ...


_REGISTRY: dict[str, Callable[..., Scorer]] = {}


def register(name: str):
    """Class decorator: makes a scorer known by ``name`` in the config."""
    def add(cls):
        _REGISTRY[name] = cls
        return cls
    return add


def names() -> list[str]:
    """The registered scorers."""
    return sorted(_REGISTRY)


def build(name: str, params: dict[str, Any] | None = None) -> Scorer:
    """Makes a scorer. Raises ValueError for an unknown name, or parameters that it does not take."""
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"reward {name!r} is unknown; {hint}Known: {', '.join(names())}")
    try:
        return _REGISTRY[name](**(params or {}))
    except TypeError as error:
        raise ValueError(f"reward {name!r} cannot be built from params {params}: {error}") from None


def checked_scores(scorer: Scorer, name: str, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The scorer's float32 scores [B]; RewardError if it raises, or returns NaN, Inf or the wrong shape."""
    try:
        scores = np.asarray(scorer.score(images, prompts), np.float32)
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(images),):
        raise RewardError(f"reward {name!r} returned shape {scores.shape} for {len(images)} images")
    if not np.isfinite(scores).all():
        raise RewardError(f"reward {name!r} returned {int((~np.isfinite(scores)).sum())} scores that are NaN or "
                          f"infinite for {prompts[0]!r}")
    return scores


@register("python")
class FunctionReward:
    """One's own function ``package.module:function``, called with (images uint8 [B, H, W, 3], prompts).

    Replicas import it: the module must be installed, on PYTHONPATH, or in the folder the run is started from.
    """

    def __init__(self, function: str):
        module, colon, attribute = function.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"reward function {function!r} is not of the form package.module:function")
        try:
            self.function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise ValueError(f"reward function {function!r} cannot be imported: {type(error).__name__}: {error}") from None
        if not callable(self.function):
            raise ValueError(f"reward function {function!r} is a {type(self.function).__name__}, not a function")

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return np.asarray(self.function(images, prompts), np.float32)
