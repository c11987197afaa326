"""Prompts by name: which caption is prompt ``index`` of the training or of the held-out list."""

from __future__ import annotations

from ..algorithms.prepare import collection
from ..config import Config
from . import faces


def training_prompts(config: Config, step: int) -> tuple[list[int], list[str]]:
    """The prompts of one iteration: fresh ones each time, (indices, captions)."""
    count = config.grpo.prompts_per_step
    source = collection(config.run.seed, "train_prompts")
    indices = list(range(step * count, (step + 1) * count))
    return indices, [faces.portrait(source, i, config.data.hand_fraction).caption for i in indices]


def heldout_prompts(config: Config) -> tuple[list[int], list[str]]:
    """The fixed prompts of every evaluation, (indices, captions). Never trained on."""
    source = collection(config.run.seed, "heldout_prompts")
    indices = list(range(config.evaluate.prompts))
    return indices, [faces.portrait(source, i, config.data.hand_fraction).caption for i in indices]
