"""Reward functions of a user's own, good and bad, for tests/system: workers import them by name."""

import os
import signal
import time
from pathlib import Path

import numpy as np


def brightness(images, prompts):
    return images.mean((1, 2, 3)) / 255


def half_broken(images, prompts):
    if "smiling" in prompts[0]:
        raise RuntimeError("no smiling today")
    if "frowning" in prompts[0]:
        return np.full(len(images), np.nan)
    return brightness(images, prompts)


_scored = 0


def breaks_down(images, prompts):
    """Half broken until it has scored eight groups, and then for all."""
    global _scored
    if _scored == 8:
        return brightness(images, prompts)[:-1]
    scores = half_broken(images, prompts)
    _scored += not np.isnan(scores).any()
    return scores


def darkness(images, prompts):
    return 1 - brightness(images, prompts)


def loud_brightness(images, prompts):
    return 100 * brightness(images, prompts)


def one_missing(images, prompts):
    scores = brightness(images, prompts)
    scores[1] = np.nan
    return scores


def _first_time() -> bool:
    """True once for the file that the replica's environment names."""
    marker = Path(os.environ["MARKER"])
    new = not marker.exists()
    marker.touch()
    return new


def dies_once(images, prompts):
    if _first_time():
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(images, prompts)


def hangs_once(images, prompts):
    if _first_time():
        time.sleep(600)
    return brightness(images, prompts)


def loud_smallness(images, prompts):
    """Minus a hundred times the size of the JPEG in kilobytes."""
    from rlproxi.rewards import build

    return 100 * build("jpeg").score(images, prompts)
