"""Versioned weights, owned by an actor that outlives the learner."""

from __future__ import annotations

import numpy as np
import ray


@ray.remote(num_cpus=0)
class WeightStore:
    """Holds the last ``keep`` published versions as flat float32 arrays in the object store.

    The store itself puts them there: an object dies with its owner, and the learner may die.
    """

    def __init__(self, keep: int = 2):
        self.keep = keep
        self.refs: dict[int, ray.ObjectRef] = {}

    def publish(self, version: int, flat: np.ndarray) -> int:
        """Takes the weights of ``version``; returns their size in bytes.

        The newest are those that came last: a learner that went back publishes versions again.
        """
        self.refs.pop(version, None)
        self.refs[version] = ray.put(flat)
        for old in list(self.refs)[: -self.keep]:
            del self.refs[old]
        return flat.nbytes

    def alive(self) -> bool:
        return True

    def get(self, version: int) -> list[ray.ObjectRef]:
        """[reference] of a version (in a list, so that Ray hands on the reference, not the array)."""
        if version not in self.refs:
            raise KeyError(f"weights of version {version} are gone; held: {sorted(self.refs)}")
        return [self.refs[version]]
