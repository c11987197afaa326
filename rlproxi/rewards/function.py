"""A function of your own as a reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..registry import imported
from .base import ScorerFacts
from .registry import register


@register("python")
class FunctionReward(ScorerFacts):
    """The function ``package.module:function``, called with (images uint8 [B, H, W, 3], prompts).

    Replicas import it: the module must be installed, on PYTHONPATH, or in the folder the run is started from.
    """

    def __init__(self, function: str):
        self.function = imported("reward function", function)
        if not callable(self.function):
            raise ValueError(f"reward function {function!r} is a {type(self.function).__name__}, not a function")

    @classmethod
    def check(cls, params: Mapping[str, Any]) -> None:
        """Imports the function."""
        cls(**params)

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3] -> what the function returns, as float32."""
        return np.asarray(self.function(images, prompts), np.float32)
