"""Prompts by name: which caption is prompt ``index`` of the training or of the held-out list.

Captions are few enough to repeat, so the two lists are kept apart by the caption itself: one in sixteen, chosen
by a hash, is reserved for evaluation and never trained on by RL.
"""

from __future__ import annotations

import zlib

from ..algorithms.prepare import collection
from ..config import Config
from . import faces


def reserved(caption: str) -> bool:
    """Whether a caption belongs to the held-out sixteenth."""
    return zlib.crc32(caption.encode()) % 16 == 0


def training_prompts(config: Config, step: int) -> tuple[list[int], list[str]]:
    """The prompts of one iteration, (indices, captions): fresh ones each time, none of them reserved."""
    count = config.grpo.prompts_per_step
    source = collection(config.run.seed, "train_prompts")
    indices = list(range(step * count, (step + 1) * count))
    return indices, [_unreserved(config, source, i) for i in indices]


def _unreserved(config: Config, source: int, index: int) -> str:
    """Portrait ``index``'s caption; where it is reserved, that of the next portrait of its own line."""
    attempt = 0
    while True:
        # A line of portraits for each index, far from the other lines, so that no index depends on another.
        caption = faces.portrait(source, index + attempt * 2**32, config.data.hand_fraction).caption
        if not reserved(caption):
            return caption
        attempt += 1


def heldout_prompts(config: Config) -> tuple[list[int], list[str]]:
    """The fixed prompts of every evaluation, (indices, captions): reserved ones, all different."""
    source = collection(config.run.seed, "heldout_prompts")
    captions: list[str] = []
    index = 0
    while len(captions) < config.evaluate.prompts:
        caption = faces.portrait(source, index, config.data.hand_fraction).caption
        if reserved(caption) and caption not in captions:
            captions.append(caption)
        index += 1
    return list(range(len(captions))), captions
