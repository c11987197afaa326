"""Versioned weights, owned by an actor that outlives the learner."""

from __future__ import annotations

import numpy as np
import ray


@ray.remote(num_cpus=0)
class WeightStore:
    """Holds the last ``keep`` versions as flat float32 arrays in the object store.

    The store itself puts them there: an object dies with its owner, and the learner may die.
    """

    def __init__(self, keep: int = 2):
        self.keep = keep
        self.held: dict[int, tuple[ray.ObjectRef, int]] = {}  # version -> (reference, number of its publication)
        self.published = 0

    def publish(self, version: int, flat: np.ndarray) -> int:
        """Takes the weights of ``version``; returns their size in bytes.

        A learner that was restarted publishes an earlier version than the newest: those after it are another learner's
        past, and are forgotten. They would be kept as the newest, and the one that is needed dropped.
        """
        self.published += 1
        self.held = {old: kept for old, kept in self.held.items() if version - self.keep < old < version}
        self.held[version] = ray.put(flat), self.published
        return flat.nbytes

    def alive(self) -> bool:
        return True

    def get(self, version: int) -> tuple[ray.ObjectRef, int]:
        """(reference, number of the publication) of a version. In a tuple, so that Ray hands on the reference, not the
        array; the number tells weights of one version apart that were published before a restart and after it."""
        if version not in self.held:
            raise KeyError(f"weights of version {version} are gone; held: {sorted(self.held)}")
        return self.held[version]
