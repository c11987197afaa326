"""Versioned weights, owned by an actor that outlives the learner."""

from __future__ import annotations

import numpy as np
import ray

from .messages import WeightsVersion


@ray.remote(num_cpus=0)
class WeightStore:
    """Holds the last ``keep`` versions in the object store, put there by itself: an object dies with its owner."""

    def __init__(self, keep: int = 2):
        self.keep = keep
        self.held: dict[int, WeightsVersion] = {}
        self.published = 0

    def publish(self, version: int, flat: np.ndarray) -> int:
        """Take the weights of ``version``, flat float32; returns their size in bytes.

        Later versions come from a learner before a restart, and are dropped: they would push out what is needed.
        """
        self.published += 1
        self.held = {old: kept for old, kept in self.held.items() if version - self.keep < old < version}
        self.held[version] = WeightsVersion(version, self.published, ray.put(flat))
        return flat.nbytes

    def alive(self) -> bool:
        """True; an answer shows that the process runs."""
        return True

    def get(self, version: int) -> WeightsVersion:
        """Where a version's weights are. Inside a message Ray hands on the reference, and not the array.

        Raises KeyError where the store does not hold the version any more.
        """
        if version not in self.held:
            raise KeyError(f"weights of version {version} are gone; held: {sorted(self.held)}")
        return self.held[version]
