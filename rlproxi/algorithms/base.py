"""What the one learner trains: an algorithm is a loss object with a few verbs, nothing about where tensors come from.

The learner asks for ``requests``, has them sampled and scored where ``needs_rollouts`` says so, and gives each update of
``updates`` to the engine of the network it names. Everything random is named by (run seed, iteration, prompt, sample), so
an iteration that is repeated after a fault is the same iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ContextManager

import numpy as np
import torch
from torch import Tensor, nn

from ..config.loading import Config
from ..data.prompts import training_prompts
from ..models.text import TextConditioning
from ..proximal.operator import Denoiser
from ..rewards.gradients import RewardGradients
from .requests import SampleRequest, split_request


@dataclass
class Batch:
    """An iteration's samples, or just its prompts, as one rank sees them.

    requests: the micro-batches of all ranks, in order. rewards: of all their samples, float32 [P, G], NaN where missing;
    None where nothing was sampled. chain(j): what sampling kept of micro-batch j, tensors on the rank's device. fresh: the
    samples are of the very weights that the learner holds. refused: why nothing of it can be trained on, None where it can.
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
    backward of the one before, so it may look at that one's gradients. lr: the learning rate.
    """

    network: str
    lr: float
    losses: Iterator[tuple[Tensor, dict[str, float]]]


@dataclass
class Parts:
    """What an algorithm computes with, on a rank.

    networks: name -> denoiser under its engine, for losses. plain: the same networks without their engines, for gradients
    to their inputs. reference: the starting model's denoiser, frozen, where ``needs_reference``. gradients: of the training
    rewards, where ``needs_gradients``. sample_shape: [C, H, W]. reference_scope: a backward through the reference happens inside
    of one, for with LoRA the reference is a network whose adapters are off, and checkpointing computes it again.
    """

    networks: dict[str, Denoiser]
    plain: dict[str, nn.Module]
    reference: Denoiser | None
    encoder: TextConditioning
    gradients: RewardGradients | None
    sample_shape: tuple[int, int, int]
    device: torch.device
    reference_scope: Callable[[], ContextManager] = nullcontext


class AlgorithmStopped(RuntimeError):
    """Training cannot go on, in words for the user; it would happen again after a restart."""


class Algorithm(ABC):
    """Base of GRPO, R0, DIDR and one's own. A subclass defines ``updates`` and what differs from here.

    Args:
        config: the run's. ``settings`` is the section that belongs to the algorithm.
    """

    #: Whether rollout actors sample each iteration and reward actors score it.
    needs_rollouts = True
    #: Whether a frozen copy of the starting model is kept (with LoRA it is the model with its adapters off).
    needs_reference = False
    #: Whether the training rewards live on the learner's ranks as well, and must be differentiable.
    needs_gradients = False
    parts: Parts

    def __init__(self, config: Config):
        self.config, self.settings, self.seed = config, config.rl, config.run.seed

    @property
    def steps(self) -> int:
        """Iterations."""
        return self.settings.steps

    def lr(self, iteration: int, peak: float | None = None) -> float:
        """Linear warm-up, constant, then linear decay to 5 %; of settings.lr unless another ``peak`` is given."""
        s = self.settings
        begin = s.decay_from * s.steps
        through = max(0.0, (iteration - begin) / max(1.0, s.steps - begin))
        warm = min(1.0, (iteration + 1) / max(1, s.warmup_steps))
        return (s.lr if peak is None else peak) * warm * (1 - 0.95 * min(1.0, through))

    def requests(self, iteration: int) -> list[SampleRequest]:
        """The iteration's micro-batches of whole groups, in order."""
        indices, prompts = training_prompts(self.config, iteration)
        whole = SampleRequest("train", iteration, tuple(prompts), tuple(indices), self.settings.group_size)
        return split_request(whole, self.settings.groups_per_micro_batch)

    def networks(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """What is trained, each under an engine of its own. The first is the one that is evaluated and saved."""
        return {"policy": denoiser}

    def losses_per_update(self, world: int) -> dict[str, int]:
        """network -> how many losses one of its updates has on each rank."""
        return {"policy": self.micro_batches(world)}

    def micro_batches(self, world: int) -> int:
        """Micro-batches of one rank in one update."""
        return self.settings.micro_batches // self.settings.updates_per_step // world

    def connect(self, parts: Parts) -> None:
        """Takes what it computes with."""
        self.parts = parts

    def check(self, batch: Batch) -> dict[str, float]:
        """Looks at the first batch before any update of this process; returns metrics (the largest of all ranks counts).

        ``accept`` then says whether training may begin.
        """
        return {}

    def accept(self, found: dict[str, float]) -> None:
        """Raises AlgorithmStopped where what ``check`` found forbids to train."""

    @abstractmethod
    def updates(self, batch: Batch) -> Iterator[Update]:
        """The iteration's updates, in order. Lazy: one is asked for after the one before is done."""

    def metrics(self, batch: Batch) -> dict[str, float]:
        """What is logged of the batch itself, the same on every rank."""
        return {}


def share(count: int, updates: int, world: int, update: int, rank: int) -> range:
    """Which of ``count`` micro-batches a rank takes in one of the iteration's updates.

    Each update's set of micro-batches is the same at every world size.
    """
    block, mine = count // updates, count // updates // world
    start = update * block + rank * mine
    return range(start, start + mine)
