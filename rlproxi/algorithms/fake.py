"""The fake score: a denoiser that follows the generator's own distribution, so that it can be compared with another's.

Diff-Instruct, DMD and DIDR train it beside the generator (arXiv 2305.18455, 2311.18828, 2605.24001), by the loss of
pre-training on the generator's samples, at the noise levels that the reference knows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config.algorithms import Fake as Settings
from ..config.loading import Config
from ..proximal.clean import Ladder, Level
from ..proximal.matching import TimeTable, corrupt, matching_loss, matching_target
from ..proximal.operator import Denoiser
from ..seeds import Purpose, generator, rng
from .requests import SampleRequest


class NoiseLevels:
    """Draws noise levels for a micro-batch, and the noise there, by name."""

    def __init__(self, config: Config, settings: Settings):
        s = config.sampler
        self.expected = config.pretrain.target == "expected"
        self.schedule, self.settings, self.seed = config.schedule.build(), settings, config.run.seed
        self.ladder = Ladder(
            TimeTable(self.schedule, settings.candidates or config.pretrain.candidates, s.name, s.start_time, s.grid),
            self.schedule,
        )

    def draw(self, request: SampleRequest, turn: int, like: Tensor) -> tuple[Level, torch.Generator]:
        """A level for each sample [B, ...], and the generator of its noise. ``turn`` tells draws of one iteration apart."""
        name = (self.seed, Purpose.NOISE_LEVEL, request.step, request.indices[0], turn)
        level = self.ladder.draw(rng(*name), len(like), *self.settings.levels)
        return level.to(like.device), generator(*name)


def noise(g: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal, drawn on the CPU: the same on every device."""
    return torch.randn(like.shape, generator=g).to(like.device)


def fake_loss(fake: Denoiser, levels: NoiseLevels, request: SampleRequest, turn: int, x0: Tensor, text: Any) -> Tensor:
    """The fake score's denoising loss on the generator's samples x0 [B, ...], a scalar."""
    level, g = levels.draw(request, turn, x0)
    n2 = noise(g, x0)
    y = corrupt(levels.schedule, x0, level.t, level.lam, noise(g, x0), n2)
    zeta = None if levels.settings.fake_loss == "l1" else math.inf
    target = matching_target(levels.expected, zeta, levels.schedule, y, x0, level.t, level.lam, n2)
    return matching_loss(fake(y, level.t, level.lam, text), target, zeta).mean()
