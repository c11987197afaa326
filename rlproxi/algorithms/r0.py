"""R0 and R0+: a few-step generator trained by the gradients of rewards alone, held near its start.

L = -<stop-grad G, x_theta> + anchor ||theta - theta_0||^2, where G is the weighted sum of the rewards' gradients at the
sample, each divided by its own norm (R0, arXiv 2503.13070). R0 backpropagates through all K proximal steps; R0+ looks at
the clean prediction of one random step, which was reached without gradient. With the ddim sampler it is the score and flow
models' form, eta drawn anew for every step. Beside the rewards' directions there may be guidance as an implicit reward, and a
step towards the reference's distribution (Diff-Instruct's, arXiv 2305.18455).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config.algorithms import R0 as Settings
from ..config.loading import Config
from ..models.text import TextStates, operator
from ..proximal.clean import Level, as_clean, clean_prediction
from ..proximal.operator import expand
from ..proximal.samplers import AFTER, Step
from ..rewards.gradients import Gradients, mean_scores
from ..seeds import NamedNoise, Purpose, rng
from .base import Algorithm, Batch, Parts, Update, share
from .fake import NoiseLevels, fake_loss, noise
from .requests import SampleRequest

Losses = Iterator[tuple[Tensor, dict[str, float]]]


class R0(Algorithm):
    """The loss object of R0 and R0+."""

    settings: Settings
    needs_rollouts = False
    needs_gradients = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.schedule = config.schedule.build()
        self.plan = config.sampler.plan(self.schedule)
        self.normalize_gradients = self.settings.normalize_gradients
        self.follows = self.settings.distribution_weight > 0
        self.needs_reference = self.follows or self.settings.guidance_weight > 0
        self.levels = NoiseLevels(config, self.settings)

    @property
    def backwards(self) -> int:
        """Losses, each with a backward of its own, that a micro-batch is made of."""
        return len(self.plan) if self.settings.checkpoint_steps and not self.settings.plus else 1

    def networks(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        return {"policy": denoiser, **({"fake": copy.deepcopy(denoiser)} if self.follows else {})}

    def losses_per_update(self, world: int) -> dict[str, int]:
        micro = self.micro_batches(world)
        return {"policy": micro * self.backwards, **({"fake": micro} if self.follows else {})}

    def connect(self, parts: Parts) -> None:
        super().connect(parts)
        self.prox = operator(parts.networks["policy"], parts.encoder, self.config.sampler.guidance_scale)
        if self.follows:
            self.fake, self.target = as_clean(parts.networks["fake"]), as_clean(parts.reference)

    def updates(self, batch: Batch) -> Iterator[Update]:
        s = self.settings
        if s.random_eta and self.config.sampler.name in AFTER:
            self.plan = self.config.sampler.plan(
                self.schedule, eta=rng(self.seed, Purpose.R0_ETA, batch.iteration).random(len(self.plan))
            )
        for update in range(s.updates_per_step):
            mine = share(len(batch.requests), s.updates_per_step, batch.world, update, batch.rank)
            requests = [batch.requests[j] for j in mine]
            work = [(request, self.parts.encoder.groups(request.prompts, request.group_size)) for request in requests]
            for turn in range(1, s.fake_updates + 1) if self.follows else ():
                yield Update("fake", self.lr(batch.iteration, s.fake_lr), self._fake_losses(work, turn))
            yield Update("policy", self.lr(batch.iteration), self._losses(work))

    def _losses(self, work: list[tuple[SampleRequest, TextStates]]) -> Losses:
        for request, text in work:
            named, x = self._start(request)
            if self.settings.plus:
                yield self._surrogate(self._intermediate(request, text, named, x), request, text)
            elif self.settings.checkpoint_steps:
                yield from self._step_by_step(request, text, named, x, len(work))
            else:
                yield self._surrogate(self._generate(text, named, x), request, text)

    def _fake_losses(self, work: list[tuple[SampleRequest, TextStates]], turn: int) -> Losses:
        """The fake score follows what the reward looks at: the last samples, or R0+'s clean predictions."""
        for request, text in work:
            named, x = self._start(request, turn)
            with torch.no_grad():
                x = (
                    self._intermediate(request, text, named, x)
                    if self.settings.plus
                    else self._generate(text, named, x)
                )
            loss = fake_loss(self.parts.networks["fake"], self.levels, request, turn, x, text)
            yield loss, {"loss": loss.item()}

    def _start(self, request: SampleRequest, turn: int = 0) -> tuple[NamedNoise, Tensor]:
        """Named noise and x_N."""
        named = NamedNoise(request.names(self.seed, turn))
        return named, named.start(self.parts.sample_shape, self.parts.device)

    def _take(self, step: Step, z: Tensor, x: Tensor, named: NamedNoise, text: TextStates) -> Tensor:
        return step.after(self.prox(z, step.t, step.lam, text), x, named)

    def _generate(self, text: TextStates, named: NamedNoise, x: Tensor) -> Tensor:
        for step in self.plan:
            x = self._take(step, step.before(x, named), x, named, text)
        return x

    def _step_by_step(self, request: SampleRequest, text: TextStates, named: NamedNoise, x: Tensor, micro: int):
        """Backward through all steps, one at a time: of each only the input is kept, and its forward is made again.

        One forward to one backward is also what ZeRO 3 can do. The update's objective is the mean over all of its losses,
        of which each micro-batch has K: so each is multiplied by K, and what arrives at a step's input is 1/micro of the
        derivative that the step before needs.
        """
        inputs = []
        with torch.no_grad():
            for step in self.plan:
                inputs.append(step.before(x, named))
                if step is not self.plan[-1]:
                    x = self._take(step, inputs[-1], x, named, text)
        derivative = None  # of the objective, at the step's output; the last step's output is the prox's
        for step, z in reversed(list(zip(self.plan, inputs))):
            z.requires_grad_(step is not self.plan[0])
            prox = self.prox(z, step.t, step.lam, text)
            metrics = {}
            if derivative is None:
                found, metrics = self._ascend(prox, request, text)
                derivative = -found / len(z)
            yield self.backwards * (step.b * derivative * prox).sum(), metrics
            if z.requires_grad:
                derivative = step.a * micro * z.grad + step.d * derivative

    def _intermediate(self, request: SampleRequest, text: TextStates, named: NamedNoise, x: Tensor) -> Tensor:
        """R0+: the clean prediction that a random step's own output contains, E[x_0 | z], for the reward.

        One step for the whole iteration, so that ranks and micro-batches are alike.
        """
        chosen = int(rng(self.seed, Purpose.R0_STEP, request.step).integers(len(self.plan)))
        with torch.no_grad():
            for step in self.plan[:chosen]:
                x = self._take(step, step.before(x, named), x, named, text)
            z = self.plan[chosen].before(x, named)
        step = self.plan[chosen]
        level = self._level(step.t, step.lam, len(z))
        eps = (z - self.prox(z, step.t, step.lam, text)) / step.lam**0.5
        return clean_prediction(z, eps, level)

    def _level(self, t: float, lam: float, count: int) -> Level:
        every = lambda value: torch.full((count,), value, device=self.parts.device)  # noqa: E731
        return Level.of(self.schedule, every(t), every(lam))

    def _surrogate(self, x: Tensor, request: SampleRequest, text: TextStates) -> tuple[Tensor, dict[str, float]]:
        ascent, metrics = self._ascend(x, request, text)
        return -(ascent * x).flatten(1).sum(1).mean(), metrics

    def _ascend(self, x: Tensor, request: SampleRequest, text: TextStates) -> tuple[Tensor, dict[str, float]]:
        """G at the samples, and what is logged of them."""
        s, extra = self.settings, {}

        @torch.no_grad()
        def also(x: Tensor) -> Tensor:
            ascent = torch.zeros_like(x)
            if s.guidance_weight:
                ascent += s.guidance_weight * self.parts.gradients.scaled(self._guidance(x, request, text))
            if self.follows:
                towards = self._towards_reference(x, request, text)
                ascent += s.distribution_weight * towards
                extra["distribution_gap"] = towards.flatten(1).norm(dim=1).mean().item()
            return ascent

        found: Gradients = self.parts.gradients(x, request.rows, also if s.guidance_weight or self.follows else None)
        return found.ascent, {**mean_scores(found.scores, self.parts.gradients.weights), **extra}

    def _guidance(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """Guidance as an implicit reward: D_ref(y, c) - D_ref(y, null) at a random noise level y of x; no gradient goes
        through the reference."""
        level, g = self.levels.draw(request, Purpose.R0_GUIDANCE, x)
        y = level.diffuse(x, noise(g, x))
        encoder = self.parts.encoder
        both = TextStates.join(text, encoder.null_like(text))
        eps = self.parts.reference(
            torch.cat([y, y]), torch.cat([level.t] * 2), torch.cat([level.lam] * 2), both
        ).float()
        conditional, unconditional = eps.chunk(2)
        # D is y minus a multiple of eps, so the difference of two D is that multiple of the difference of eps.
        return expand(level.sigma**2 / (level.lam.sqrt() * level.alpha), x) * (unconditional - conditional)

    def _towards_reference(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """(D_ref(y) - D_fake(y)) / |x - D_ref(y)| at a random noise level y of x, per sample.

        DMD's weight in norms (arXiv 2311.18828): as long as a reward's unit step where the two do not agree at all, and 0 where
        the distributions are one, which a unit vector would never be.
        """
        level, g = self.levels.draw(request, 0, x)
        y = level.diffuse(x, noise(g, x))
        target = self.target(y, level, text)
        return (target - self.fake(y, level, text)) / expand((x - target).flatten(1).norm(dim=1).clamp_min(1e-6), x)
