"""R0 and R0+: a few-step generator trained by the gradients of rewards alone, held near its start.

L = -<stop-grad G, x_theta> + anchor ||theta - theta_0||^2, where G is the weighted sum of the rewards' gradients at the
sample, each divided by its own norm (R0, arXiv 2503.13070). R0 backpropagates through all K proximal steps; R0+ looks at
the clean prediction of one random step, which was reached without gradient.
"""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from ..config import Config
from ..models.pipeline import operator
from ..models.text import TextStates
from ..proximal.clean import Ladder, Level, clean_prediction
from ..proximal.matching import TimeTable
from ..proximal.operator import expand
from ..proximal.samplers import plan
from ..rewards.gradients import Gradients, mean_scores
from ..schema import R0 as Settings
from ..seeds import NamedNoise, generator, rng
from .base import Algorithm, Batch, Parts, Update, share
from .requests import SampleRequest


class R0(Algorithm):
    """The loss object of R0 and R0+."""

    settings: Settings
    needs_rollouts = False
    needs_gradients = True

    def __init__(self, config: Config):
        super().__init__(config)
        s = config.sampler
        self.schedule = config.schedule.build()
        self.plan = plan(self.schedule, s.name, s.num_inference_steps, s.start_time, s.grid)
        self.normalize_gradients = self.settings.normalize_gradients
        self.needs_reference = self.settings.guidance_weight > 0
        self.ladder = Ladder(TimeTable(self.schedule, self.settings.guidance_candidates or config.pretrain.candidates,
                                       s.name, s.start_time, s.grid), self.schedule)

    @property
    def backwards(self) -> int:
        """Losses, each with a backward of its own, that a micro-batch is made of."""
        return len(self.plan) if self.settings.checkpoint_steps and not self.settings.plus else 1

    def losses_per_update(self, world: int) -> dict[str, int]:
        return {"policy": self.micro_batches(world) * self.backwards}

    def connect(self, parts: Parts) -> None:
        super().connect(parts)
        self.prox = operator(parts.networks["policy"], parts.encoder, self.config.sampler.guidance_scale)

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in range(self.settings.updates_per_step):
            mine = share(len(batch.requests), self.settings.updates_per_step, batch.world, update, batch.rank)
            requests = [batch.requests[j] for j in mine]
            texts = [self.parts.encoder.groups(request.prompts, request.group_size) for request in requests]
            yield Update("policy", self.lr(batch.iteration), self._losses(requests, texts))

    def _losses(self, requests: list[SampleRequest], texts: list[TextStates]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for request, text in zip(requests, texts):
            noise = NamedNoise(request.names(self.seed))
            x = noise.start(self.parts.sample_shape, self.parts.device)
            if self.settings.plus:
                yield self._intermediate(request, text, noise, x)
            elif self.settings.checkpoint_steps:
                yield from self._step_by_step(request, text, noise, x, len(requests))
            else:
                for step in self.plan:
                    x = self.prox(self._input(step, x, noise), step.t, step.lam, text)
                yield self._surrogate(x, request, text)

    @staticmethod
    def _input(step, x: Tensor, noise: NamedNoise) -> Tensor:
        """z of a step, as ``samplers.sample`` forms it."""
        return step.a * x + step.s * noise(step.k, x) if step.s else step.a * x

    def _step_by_step(self, request: SampleRequest, text: TextStates, noise: NamedNoise, x: Tensor, micro: int):
        """Backward through all steps, one at a time: of each only the input is kept, and its forward is made again.

        One forward to one backward is also what ZeRO 3 can do. The update's objective is the mean over all of its losses,
        of which each micro-batch has K: so each is multiplied by K, and what arrives at a step's input is 1/micro of the
        derivative that the step before needs.
        """
        inputs = []
        with torch.no_grad():
            for step in self.plan[:-1]:
                inputs.append(self._input(step, x, noise))
                x = self.prox(inputs[-1], step.t, step.lam, text)
            inputs.append(self._input(self.plan[-1], x, noise))
        derivative = None
        for step, z in reversed(list(zip(self.plan, inputs))):
            z.requires_grad_(step is not self.plan[0])
            x = self.prox(z, step.t, step.lam, text)
            metrics = {}
            if derivative is None:
                found, metrics = self._ascend(x, request, text)
                derivative = -found / len(x)
            yield self.backwards * (derivative * x).sum(), metrics
            if z.requires_grad:
                derivative = step.a * micro * z.grad

    def _intermediate(self, request: SampleRequest, text: TextStates, noise: NamedNoise, x: Tensor):
        """R0+: the clean prediction that a random step's own output contains, E[x_0 | z], for the reward.

        One step for the whole iteration, so that ranks and micro-batches are alike.
        """
        chosen = int(rng(self.seed, 0x60B1, request.step).integers(len(self.plan)))
        with torch.no_grad():
            for step in self.plan[:chosen]:
                x = self.prox(self._input(step, x, noise), step.t, step.lam, text)
            z = self._input(self.plan[chosen], x, noise)
        step = self.plan[chosen]
        level = self._level(step.t, step.lam, len(z))
        eps = (z - self.prox(z, step.t, step.lam, text)) / step.lam**0.5
        return self._surrogate(clean_prediction(z, eps, level), request, text)

    def _level(self, t: float, lam: float, count: int) -> Level:
        every = lambda value: torch.full((count,), value, device=self.parts.device)  # noqa: E731
        return Level.of(self.schedule, every(t), every(lam))

    def _surrogate(self, x: Tensor, request: SampleRequest, text: TextStates) -> tuple[Tensor, dict[str, float]]:
        ascent, metrics = self._ascend(x, request, text)
        return -(ascent * x).flatten(1).sum(1).mean(), metrics

    def _ascend(self, x: Tensor, request: SampleRequest, text: TextStates) -> tuple[Tensor, dict[str, float]]:
        """G at the samples, and what is logged of them."""
        weight = self.settings.guidance_weight
        also = (lambda x: {"guidance": (self._guidance(x, request, text), weight)}) if weight else None
        found: Gradients = self.parts.gradients(x, request.rows, also)
        return found.ascent, mean_scores(found.scores, self.parts.gradients.weights)

    @torch.no_grad()
    def _guidance(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """Guidance as an implicit reward: D_ref(y, c) - D_ref(y, null) at a random noise level y of x; no gradient goes
        through the reference."""
        name = (self.seed, 0x6D1A, request.step, request.indices[0])
        level = self.ladder.draw(rng(*name), len(x)).to(x.device)
        y = level.diffuse(x, torch.randn(x.shape, generator=generator(*name)).to(x.device))
        encoder = self.parts.encoder
        both = TextStates.join(text, encoder.null_like(text))
        eps = self.parts.reference(torch.cat([y, y]), torch.cat([level.t] * 2), torch.cat([level.lam] * 2), both).float()
        conditional, unconditional = eps.chunk(2)
        # D is y minus a multiple of eps, so the difference of two D is that multiple of the difference of eps.
        return expand(level.sigma**2 / (level.lam.sqrt() * level.alpha), x) * (unconditional - conditional)
