"""Scorers of the kind ``python`` for the curation's tests."""

import os
import signal
import time
from pathlib import Path

import numpy as np


def slow(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The mean of each image, slowly enough that a job can be killed in the middle."""
    time.sleep(0.3)
    return images.mean((1, 2, 3))


def die_once(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The mean of each image; kills its process at the first caption 'die FILE', and leaves FILE behind."""
    for prompt in prompts:
        command, _, marker = prompt.partition(" ")
        if command == "die" and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))
