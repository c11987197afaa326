"""The base class of an algorithm: a loss object that brings all that is its own, and knows nothing of Ray.

The learner takes the iteration's ``requests``. If the algorithm ``needs_rollouts``, actors sample and score them. Then
each of ``updates`` goes to the engine of the network that it names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config.algorithms import ALGORITHMS, AlgorithmClass
from ..config.loading import Config
from ..data.prompts import training_prompts
from ..models.folders import latent_space
from ..models.text import TextConditioning
from ..proximal.operator import Denoiser
from ..rewards.gradients import RewardGradients
from .requests import SampleRequest, split_request


@dataclass
class Batch:
    """An iteration's samples, or just its prompts, as one rank sees them.

    Args:
        requests: the micro-batches of all ranks, in order.
        rewards: of all their samples, float32 [P, G], NaN where missing; None where nothing was sampled.
        chain: j -> the tensors that rollouts kept of micro-batch j, on the rank's device.
        fresh: whether the samples are of the weights that the learner holds now.
        refused: why the batch cannot be trained on; None where it can.
    """

    iteration: int
    requests: list[SampleRequest]
    rank: int
    world: int
    rewards: np.ndarray | None = None
    chain: Callable[[int], dict[str, Tensor]] | None = None
    fresh: bool = True
    refused: str | None = None


@dataclass
class Update:
    """One optimizer step of one network.

    losses: lazily, one (loss, metrics) for each backward; their mean is the objective. The next one is made after the
    backward of the one before, so it may read the gradients of that one. lr: the learning rate.
    """

    network: str
    lr: float
    losses: Iterator[tuple[Tensor, dict[str, float]]]


@dataclass
class Parts:
    """The networks, encoders and rewards that an algorithm computes with, on a rank.

    Args:
        networks: name -> denoiser under its engine, for losses.
        plain: the same networks without their engines, for gradients to their inputs.
        reference: the starting model's denoiser, frozen; None unless ``needs_reference``.
        gradients: of the training rewards; None unless ``needs_gradients``.
        sample_shape: [C, H, W].
        reference_scope: the context of a backward through the reference. With LoRA the reference is the network with
            its adapters off, and gradient checkpointing computes it again in the backward.
    """

    networks: dict[str, Denoiser]
    plain: dict[str, nn.Module]
    reference: Denoiser | None
    encoder: TextConditioning
    gradients: RewardGradients | None
    sample_shape: tuple[int, int, int]
    device: torch.device
    reference_scope: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Work:
    """The calls that a micro-batch cannot do without, for `rlproxi bench`.

    forwards: of a network, without gradient. backwards: each with its forward. input_gradients: forward and backward to
    the input alone. scored: whether each group's images are scored. reward_gradients, rewards: of the training reward.
    """

    forwards: int = 0
    backwards: int = 1
    input_gradients: int = 0
    scored: bool = False
    reward_gradients: int = 0
    rewards: int = 0


class AlgorithmStopped(RuntimeError):
    """Training cannot go on, and a restart would not help. The message is for the user."""


class Algorithm(AlgorithmClass, ABC):
    """Base of GRPO, R0, DIDR and your own. A subclass defines ``updates`` and what differs from here.

    ``rl`` is the section that all algorithms share. ``settings`` is the algorithm's own: the section of its registered
    name, or ``custom`` for a class that ``run.algorithm`` names as package.module:Class.
    """

    #: Whether ``updates`` runs on tensors without data, which a plan of the memory needs. False: the plan counts one
    #: forward and backward of each network.
    traceable: ClassVar[bool] = False

    #: Whether rollout actors sample each iteration and reward actors score it.
    needs_rollouts = True
    #: Whether a frozen copy of the starting model is kept (with LoRA it is the model with its adapters off).
    needs_reference = False
    #: Whether the training rewards live on the learner's ranks as well, and must be differentiable.
    needs_gradients = False
    #: Whether each reward's gradient is divided by its norm.
    normalize_gradients = False
    #: The key of its section that decides ``needs_gradients``; None: it always needs them, or never.
    gradients_key: ClassVar[str | None] = None
    #: Whether rollouts keep the last step's input.
    keep_last = False
    #: Whether the samples of a group share their first noise.
    same_noise = False
    parts: Parts

    def __init__(self, config: Config):
        self.config, self.rl, self.seed = config, config.rl, config.run.seed
        self.settings = config.part(config.section, self.Settings)

    @property
    def gradients(self) -> RewardGradients:
        """The gradients of the training rewards; see ``needs_gradients``."""
        assert self.parts.gradients is not None, "needs_gradients is false"
        return self.parts.gradients

    @property
    def frozen(self) -> Denoiser:
        """The starting model's denoiser; see ``needs_reference``."""
        assert self.parts.reference is not None, "needs_reference is false"
        return self.parts.reference

    # -- what a plan asks -------------------------------------------------------------------

    def describe(self) -> list[str]:
        """What the dry run says about the settings, piece by piece."""
        values = self.settings.model_dump()
        return [f"{key} {value}" for key, value in values.get("params", values).items()] or ["no settings of its own"]

    def why_gradients(self) -> str:
        """The key and value for which ``needs_gradients`` is true."""
        if self.gradients_key is None:
            return f"run.algorithm = {self.config.run.algorithm!r}"
        return f"{self.config.section}.{self.gradients_key} = {getattr(self.settings, self.gradients_key)!r}"

    def shortened(self) -> tuple[Config, int]:
        """A config whose updates peak as this one's and are traced sooner, and the bytes that its peak lacks."""
        return self.config, 0

    def least_work(self) -> Work:
        """See ``Work``."""
        return Work(forwards=self.config.sampler.num_inference_steps, scored=True)

    @property
    def chain_tensors(self) -> int:
        """How many tensors of a sample's shape rollouts keep for each sample."""
        return 3 * len(self.kept_steps(0)) + self.keep_last

    def bytes_per_micro_batch(self) -> int:
        """Bytes of one micro-batch in flight: images and kept tensors; 0 where nothing is sampled ahead.

        Raises FileNotFoundError or ValueError where ``model.init`` or ``model.encoders`` is no usable folder.
        """
        if not self.needs_rollouts:
            return 0
        channels, side = latent_space(self.config)
        return self.rl.rows * (3 * self.config.data.size**2 + 4 * self.chain_tensors * channels * side**2)

    # -- training ---------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Iterations."""
        return self.rl.steps

    def lr(self, iteration: int, peak: float | None = None) -> float:
        """Linear warm-up, constant, then linear decay to 5 %; of rl.lr unless another ``peak`` is given."""
        s = self.rl
        begin = s.decay_from * s.steps
        through = max(0.0, (iteration - begin) / max(1.0, s.steps - begin))
        warm = min(1.0, (iteration + 1) / max(1, s.warmup_steps))
        return (s.lr if peak is None else peak) * warm * (1 - 0.95 * min(1.0, through))

    def kept_steps(self, iteration: int) -> tuple[int, ...]:
        """Positions in the sampler's plan whose chain rollouts keep for the iteration's updates."""
        return ()

    def requests(self, iteration: int) -> list[SampleRequest]:
        """The iteration's micro-batches of whole groups, in order."""
        indices, prompts = training_prompts(self.config, iteration)
        whole = SampleRequest("train", iteration, tuple(prompts), tuple(indices), self.rl.group_size)
        kept = self.kept_steps(iteration)
        whole = replace(whole, window=kept, keep_last=self.keep_last, same_noise=self.same_noise)
        return split_request(whole, self.rl.groups)

    def networks(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The networks to train, each under its own engine. The first is the one that is evaluated and saved."""
        return {"policy": denoiser}

    def losses_per_update(self, world: int) -> dict[str, int]:
        """The number of losses that one update of each network has on a rank, by the network's name."""
        return {"policy": self.micro_batches(world)}

    def micro_batches(self, world: int) -> int:
        """Micro-batches of one rank in one update."""
        return self.rl.micro_batches // self.rl.updates_per_step // world

    def connect(self, parts: Parts) -> None:
        """Take the networks, encoders and rewards to compute with."""
        self.parts = parts

    def check(self, batch: Batch) -> dict[str, float]:
        """Metrics of the first batch before any update of this process. ``accept`` gets the largest of all ranks."""
        return {}

    def accept(self, found: dict[str, float]) -> None:
        """Raise AlgorithmStopped where training must not begin with what ``check`` found."""

    @abstractmethod
    def updates(self, batch: Batch) -> Iterator[Update]:
        """The iteration's updates, in order. Lazy: the next is made after the one before is done."""

    def metrics(self, batch: Batch) -> dict[str, float]:
        """Metrics of the batch itself, the same on every rank."""
        return {}


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of a ``run.algorithm``. Raises ValueError where it is unknown or cannot be imported."""
    return cast("type[Algorithm]", ALGORITHMS.get(name))  # the registry has checked it


def build_algorithm(config: Config) -> Algorithm:
    """The algorithm of a config. Raises ValueError as ``algorithm_class``."""
    return algorithm_class(config.run.algorithm)(config)


def share(count: int, updates: int, world: int, update: int, rank: int) -> range:
    """The micro-batches, of ``count``, that a rank takes in one of the iteration's updates.

    Each update's set of micro-batches is the same at every world size.
    """
    block, mine = count // updates, count // updates // world
    start = update * block + rank * mine
    return range(start, start + mine)
