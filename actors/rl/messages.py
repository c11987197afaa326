"""What the roles of the stage rl send to each other: one frozen dataclass for each message.

Imports no torch: the weight store needs this module, and its process should stay small.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from ray import ObjectRef

from .staleness import Stamp

if TYPE_CHECKING:
    from rlproxi.algorithms.requests import SampleRequest
    from rlproxi.telemetry.timeline import Span


@dataclass(frozen=True)
class WeightsVersion:
    """Where the weights of one version are: a reference to a flat float32 array.

    ``publication`` counts the store's publications: a restarted learner publishes a version again, with weights that
    need not be the same to the bit.
    """

    version: int
    publication: int
    weights: ObjectRef


@dataclass(frozen=True, eq=False)
class Images:
    """A rollout actor's answer to a request: images uint8 [B, H, W, 3], and which samples are finite, bool [B].

    A sample that was NaN or Inf is not finite: its image is grey, and its score counts as missing.
    """

    images: np.ndarray
    finite: np.ndarray


@dataclass(frozen=True, eq=False)
class Sampled(Images):
    """The pool's answer: also a reference to the chain, which the learner fetches, and an actor's seconds of work."""

    chain: ObjectRef
    seconds: float


@dataclass(frozen=True, eq=False)
class Dispatched:
    """A micro-batch of an iteration. Where the algorithm needs no rollouts, the learner samples it."""

    request: SampleRequest
    stamp: Stamp


@dataclass(frozen=True, eq=False)
class Scored(Dispatched):
    """A sampled and scored micro-batch that waits for the learner.

    rewards: float32 [P, G], NaN where missing. parts: scorer -> [P, G]. broken: how many samples are NaN or Inf.
    images: of the groups that go into a gallery.
    """

    chain: ObjectRef
    rewards: np.ndarray
    parts: Mapping[str, np.ndarray]
    rollout_seconds: float
    reward_seconds: float
    broken: int = 0
    images: np.ndarray | None = None


# -- what a rank is answered when it asks for a batch ------------------------------------------


@dataclass(frozen=True, eq=False)
class Ready:
    """The batch of an iteration, as one rank gets it. Where the learner samples, it holds the requests alone.

    pickled: the requests of all micro-batches, pickled once for all ranks. versions: of the weights that sampled each
    micro-batch. rewards: float32 [P, G] of all micro-batches in order. chains: number of a micro-batch -> reference,
    for those that the rank trains on. refused: why nothing of it can be trained on, None where it can.
    """

    pickled: bytes
    versions: tuple[int, ...] = ()
    rewards: np.ndarray | None = None
    chains: Mapping[int, ObjectRef] = field(default_factory=dict)
    refused: str | None = None

    @staticmethod
    def pickle(requests: Sequence[SampleRequest]) -> bytes:
        """The requests as ``pickled`` holds them."""
        return pickle.dumps(list(requests), protocol=pickle.HIGHEST_PROTOCOL)

    def requests(self) -> list[SampleRequest]:
        """The requests of all micro-batches, in order."""
        return pickle.loads(self.pickled)


@dataclass(frozen=True)
class Ended:
    """RL ends before this iteration; the model so far is the result."""


@dataclass(frozen=True)
class Stopped:
    """The run was stopped; nothing is saved as its result."""


@dataclass(frozen=True)
class Leave:
    """The run is to end, and a checkpoint is to be written first."""


@dataclass(frozen=True)
class Lost:
    """An actor is lost that the driver replaces; the learner is to restart with the new one."""

    reason: str


Answer = Ready | Ended | Stopped | Leave | Lost


@dataclass(frozen=True)
class Trained:
    """The learner has trained on an iteration, and published the weights of version ``iteration + 1``.

    attempt: of ``Loop.begin``. spans: of the first rank. clock: its unix time at sending, as machines' clocks differ.
    """

    attempt: int
    iteration: int
    metrics: Mapping[str, float]
    spans: Sequence[Span] = ()
    clock: float = 0.0
