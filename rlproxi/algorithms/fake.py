"""The fake score: a denoiser that follows the generator's own distribution, so that it can be compared with another's.

Diff-Instruct, DMD and DIDR train it beside the generator (arXiv 2305.18455, 2311.18828, 2605.24001), by the loss of
pre-training on the generator's samples, at the noise levels that the reference knows.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config.loading import Config
from ..config.section import Section, StepCount
from ..models.text import TextStates, operator
from ..proximal.clean import Ladder, Level, as_clean
from ..proximal.matching import TimeTable, corrupt, matching_loss, matching_target
from ..proximal.operator import Denoiser
from ..seeds import Purpose, generator, rng
from .base import Algorithm, Batch, Parts, Update, share
from .requests import SampleRequest

#: Micro-batches with their encoded captions.
Captioned = list[tuple[SampleRequest, TextStates]]
Losses = Iterator[tuple[Tensor, dict[str, float]]]


class FakeSettings(Section):
    """The fake score of R0 and DIDR: it follows the generator's distribution, to be compared with the reference's."""

    candidates: list[StepCount] | None = Field(
        None, min_length=1, description="Step counts whose noise levels are used; null: pretrain.candidates."
    )
    levels: tuple[float, float] = Field((0.02, 0.98), description="Quantiles of the noise levels that are drawn.")
    updates: int = Field(2, ge=1, description="Fake-score updates in an iteration, each on samples of its own.")
    lr: float = Field(1e-4, gt=0, description="Learning rate of the fake score.")
    loss: Literal["l1", "l2"] = Field(
        "l2", description="Denoising loss: l2 for a reference that predicts a mean, l1 for one of matching's L1 phase."
    )

    @model_validator(mode="after")
    def _levels(self) -> FakeSettings:
        low, high = self.levels
        if not 0 <= low < high <= 1:
            raise ValueError(f"levels is {list(self.levels)}: two quantiles, 0 <= low < high <= 1")
        return self

    def describe(self) -> str:
        """Its part of a dry run."""
        return f"{self.updates} fake update(s) of rate {self.lr:g}"


class LevelSampler:
    """Draws noise levels for a micro-batch, and the noise there, by name."""

    def __init__(self, config: Config):
        s, self.settings = config.sampler, config.part("fake", FakeSettings)
        self.expected = config.pretrain.target != "noise"
        self.schedule, self.seed = config.schedule.build(), config.run.seed
        self.candidates = self.settings.candidates or config.pretrain.candidates
        times = TimeTable(self.schedule, self.candidates, s.name, s.start_time, s.grid)
        self.ladder = Ladder(times, self.schedule)

    def draw(self, request: SampleRequest, turn: int, like: Tensor) -> tuple[Level, torch.Generator]:
        """A level for each sample [B, ...], and the generator of its noise.

        ``turn`` distinguishes the draws of one iteration.
        """
        name = (self.seed, Purpose.NOISE_LEVEL, request.step, request.indices[0], turn)
        level = self.ladder.draw(rng(*name), len(like), *self.settings.levels)
        return level.to(like.device), generator(*name)


def noise(g: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal, drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=g).to(like.device)


def fake_loss(fake: Denoiser, levels: LevelSampler, request: SampleRequest, turn: int, x0: Tensor, text: Any) -> Tensor:
    """The fake score's denoising loss on the generator's samples x0 [B, ...], a scalar."""
    level, g = levels.draw(request, turn, x0)
    n2 = noise(g, x0)
    y = corrupt(levels.schedule, x0, level.t, level.lam, noise(g, x0), n2)
    zeta = None if levels.settings.loss == "l1" else math.inf
    target = matching_target(levels.expected, zeta, levels.schedule, y, x0, level.t, level.lam, n2)
    return matching_loss(fake(y, level.t, level.lam, text), target, zeta).mean()


class Generator(Algorithm):
    """Base of R0 and DIDR: a generator that samples on the learner, and a fake score that follows it."""

    shared: ClassVar = {"fake": FakeSettings}
    traceable = True
    needs_rollouts = False
    #: Whether a fake score is trained.
    follows = True
    #: The generator's losses for a micro-batch, each with its own backward.
    backwards = 1

    def __init__(self, config: Config):
        super().__init__(config)
        self.levels = LevelSampler(config)

    @classmethod
    def check_config(cls, config: Config) -> None:
        """As ``Algorithm.check_config``, of the fake score's step counts."""
        config.check_counts("fake.candidates", config.part("fake", FakeSettings).candidates)

    def networks(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The generator, and the fake score as a copy of it."""
        return {"policy": denoiser, **({"fake": copy.deepcopy(denoiser)} if self.follows else {})}

    def losses_per_update(self, world: int) -> dict[str, int]:
        """``backwards`` losses of the generator for each micro-batch, and one of the fake score."""
        micro = self.micro_batches(world)
        return {"policy": micro * self.backwards, **({"fake": micro} if self.follows else {})}

    def connect(self, parts: Parts) -> None:
        """See ``Algorithm.connect``."""
        super().connect(parts)
        self.prox = operator(parts.networks["policy"], parts.encoder, self.config.sampler.guidance_scale)
        if self.follows:
            self.fake = as_clean(parts.networks["fake"])

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The fake score's updates and then the generator's, for each share of the prompts."""
        fake = self.levels.settings
        for update in range(self.rl.updates_per_step):
            mine = share(len(batch.requests), self.rl.updates_per_step, batch.world, update, batch.rank)
            requests = [batch.requests[j] for j in mine]
            work = [(request, self.parts.encoder.groups(request.prompts, request.group_size)) for request in requests]
            for turn in range(1, fake.updates + 1) if self.follows else ():
                yield Update("fake", self.lr(batch.iteration, fake.lr), self._fake_losses(work, turn))
            yield Update("policy", self.lr(batch.iteration), self.losses(work))

    @abstractmethod
    def losses(self, work: Captioned) -> Losses:
        """The generator's losses."""

    @abstractmethod
    def followed(self, request: SampleRequest, text: TextStates, turn: int) -> Tensor:
        """What the fake score follows: samples of the generator, x_0 [B, ...]. Called without gradient."""

    def _fake_losses(self, work: Captioned, turn: int) -> Losses:
        for request, text in work:
            with torch.no_grad():
                x0 = self.followed(request, text, turn)
            loss = fake_loss(self.parts.networks["fake"], self.levels, request, turn, x0, text)
            yield loss, {"loss": loss.item()}
