"""Randomness by name: every number follows from a tuple of integers such as (run seed, purpose, step, prompt, sample).

A name gives the same numbers in every process and at every time. So generators live on the CPU, and what they draw is
moved to the device. ``Purpose`` lists what numbers are drawn for.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor


@unique
class Purpose(IntEnum):
    """What a run draws numbers for: the second integer of a name, after the run's seed.

    Never change a value: every image and every weight of a run follows from them.
    """

    TRAIN = 0  #: noise of a training sample: (seed, TRAIN, iteration, prompt, sample[, turn])
    HELDOUT = 1  #: noise of a held-out sample: (seed, HELDOUT, repeat, prompt, sample)
    LORA = 0x10A  #: initial weights of adapters
    NETWORK = 0x0DE7  #: initial weights of a new network
    SHARDS = 0x0D01  #: order of the shards in an epoch: (seed, SHARDS, epoch)
    ROWS = 0x0D02  #: order of rows in a window of shards: (seed, ROWS, epoch, window, bucket)
    BATCHES = 0x0D03  #: order of batches in a window of shards: (seed, BATCHES, epoch, window)
    REFERENCE = 0x4EF5  #: portraits that evaluations measure distances to
    WINDOW = 0x57EB  #: GRPO's trained sampling steps: (seed, WINDOW, iteration), without the length that ``rng`` adds
    R0_STEP = 0x60B1  #: the sampling step whose clean prediction R0+ rewards: (seed, R0_STEP, iteration)
    R0_GUIDANCE = 0x6D1A  #: turn of (seed, NOISE_LEVEL, iteration, prompt, turn) for guidance as an implicit reward
    PROMPTS = 0x9407  #: order of the prompts of a file: (seed, PROMPTS, epoch)
    PRETRAIN = 0x9A7C  #: times and noise of a micro-batch of pre-training: (seed, PRETRAIN, step, place)
    CROP = 0xC409  #: offset of a random crop: (seed, CROP, checksum of the sample's key)
    NOISE_LEVEL = (
        0xD1D2  #: noise level of a micro-batch of the fake score: (seed, NOISE_LEVEL, iteration, prompt, turn)
    )
    CAPTION_DROPOUT = 0xD809  #: captions that pre-training drops: (seed, CAPTION_DROPOUT, step)
    R0_ETA = 0xE7A0  #: R0's random eta of each sampling step: (seed, R0_ETA, iteration)
    SAMPLER_CHECK = 0x11A17  #: samples on which a network is checked against the sampler's limit


@unique
class Collection(IntEnum):
    """The endless collections of portraits of a run, which never overlap: (run seed, member) names one.

    A collection's name has two integers and a sample's has five or more, so that equal values do not meet.
    """

    TEXT = 1  #: captions that the built-in text encoder is trained on
    REWARD = 2  #: images that the reward classifier is trained on
    JUDGE = 3  #: images that the held-out judge is trained on
    PRETRAIN = 4  #: images and captions of pre-training
    TRAIN_PROMPTS = 5  #: captions that are prompts of RL
    HELDOUT_PROMPTS = 6  #: captions that are held-out prompts
    PREFERENCE = 7  #: images of mixed quality that the preference model compares
    QUALITY = 8  #: images of mixed quality that the held-out judge of quality is trained on


#: Names the initial weights of a published network's new lam branch: alike in every run, so without a run's seed.
LAM_BRANCH = 0x1A3


def rng(*name: int) -> np.random.Generator:
    """A numpy generator named by non-negative integers."""
    return np.random.default_rng(_entropy(name))


def _entropy(name: tuple[int, ...]) -> tuple[int, ...]:
    """numpy pads short entropy with zeros, so that (1,) and (1, 0) would be one name; the length keeps them apart."""
    return (len(name), *name)


def seed_of(*name: int) -> int:
    """A 63-bit seed from a name, through numpy's SeedSequence hash."""
    return int(np.random.SeedSequence(_entropy(name)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*name: int) -> torch.Generator:
    """A torch CPU generator named by non-negative integers."""
    return torch.Generator().manual_seed(seed_of(*name))


class NamedNoise:
    """Noise for a batch whose rows have names of their own: row i depends on ``names[i]`` alone.

    ``start`` is x_N; an instance is the sampler's ``noise(k, like)``. With ``start_names``, x_N and, where ``first``
    says so, the first step's noise come from those names: rows that share one share z_N, all that the policy does not
    choose.
    """

    def __init__(
        self, names: list[tuple[int, ...]], start_names: list[tuple[int, ...]] | None = None, first: bool = True
    ):
        self.steps = [generator(*name, 1) for name in names]
        self.starts = [generator(*name, 0) for name in (start_names or names)]
        self.shared_first = first and start_names is not None

    def start(self, shape: tuple[int, ...], device="cpu") -> Tensor:
        """x_N [B, *shape] float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.starts]).to(device)

    def __call__(self, k: int, like: Tensor) -> Tensor:
        generators, self.shared_first = (self.starts if self.shared_first else self.steps), False
        rows = [torch.randn(like.shape[1:], generator=g) for g in generators]
        return torch.stack(rows).to(like)
