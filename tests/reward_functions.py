"""Reward functions of a user's own, good and bad, for tests/system: workers import them by name."""

import numpy as np


def brightness(images, prompts):
    return images.mean((1, 2, 3)) / 255


def half_broken(images, prompts):
    if "smiling" in prompts[0]:
        raise RuntimeError("no smiling today")
    if "frowning" in prompts[0]:
        return np.full(len(images), np.nan)
    return brightness(images, prompts)


def all_broken(images, prompts):
    return brightness(images, prompts)[:-1]
