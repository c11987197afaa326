"""R0 and R0+: a few-step generator trained by the gradients of rewards alone, held near its start.

L = -<stop-grad G, x_theta> + anchor ||theta - theta_0||^2, where G is the weighted sum of the rewards' gradients at the
sample, each divided by its own norm (R0, arXiv 2503.13070). R0 backpropagates through all K proximal steps. R0+ scores
the clean prediction of one random step, which was reached without gradient. With the ddim sampler it is the form for
score and flow models, with eta drawn anew for every step. G may also hold guidance as an implicit reward, and a step
towards the reference's distribution (Diff-Instruct's, arXiv 2305.18455).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from ..config.algorithms import ALGORITHMS
from ..config.loading import Config
from ..config.section import Section
from ..models.folders import latent_space
from ..models.text import TextStates
from ..proximal.clean import Level, as_clean, clean_prediction
from ..proximal.operator import expand
from ..proximal.samplers import AFTER, sample
from ..rewards.gradients import mean_scores
from ..seeds import NamedNoise, Purpose, rng
from .base import Batch, Parts, Update, Work
from .fake import Captioned, Generator, Losses, noise
from .requests import SampleRequest


class R0Settings(Section):
    """Few-step generators by the gradients of differentiable rewards (R0, arXiv 2503.13070)."""

    plus: bool = Field(
        False, description="R0+: the reward looks at the clean prediction of one random step, reached without gradient."
    )
    random_eta: bool = Field(
        True, description="With ddim, euler and matched: eta ~ U[0, 1] for every step, drawn anew; false: sampler.eta."
    )
    normalize_gradients: bool = Field(
        True, description="Each reward's gradient divided by its norm, for each sample, before weighting."
    )
    guidance_weight: float = Field(
        0.0, ge=0, description="Weight of the reference's guidance of the noised sample as an implicit reward; 0: none."
    )
    distribution_weight: float = Field(
        0.0, ge=0, description="Weight of a step towards the reference's distribution; 0: none, and no fake score."
    )
    checkpoint_steps: bool = Field(
        True, description="Compute each step again in the backward pass: the memory of one step instead of all."
    )


@ALGORITHMS.register("r0")
class R0(Generator):
    """The loss object of R0 and R0+."""

    Settings = R0Settings
    settings: R0Settings
    defaults: ClassVar = {"steps": 200, "prompts_per_step": 32, "warmup_steps": 20, "anchor": 1e-3}
    hold_back = "raise rl.anchor or r0.distribution_weight"
    charts = ("loss", "distribution_gap")
    needs_gradients = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.schedule = config.schedule.build()
        self.plan = config.sampler.plan(self.schedule)
        self.normalize_gradients = self.settings.normalize_gradients
        self.follows = self.settings.distribution_weight > 0
        self.needs_reference = self.follows or self.settings.guidance_weight > 0
        self.by_step = self.settings.checkpoint_steps and not self.settings.plus
        self.backwards = len(self.plan) if self.by_step else 1
        self.random_eta = self.settings.random_eta and config.sampler.name in AFTER

    @classmethod
    def check_config(cls, config: Config) -> None:
        """As ``Algorithm.check_config``: under ZeRO 3 each backward follows its own forward."""
        super().check_config(config)
        s = config.part(config.section, R0Settings)
        if config.learner.zero_stage == 3 and not s.checkpoint_steps and not s.plus:
            raise ValueError(
                f"{config.section}.checkpoint_steps=false has several forwards in one graph, and learner.zero_stage 3 "
                "takes one: set it to true, or use stage 2"
            )

    def describe(self) -> list[str]:
        """See ``Algorithm.describe``."""
        s, n = self.settings, len(self.plan)
        how = "gradient step by step" if s.checkpoint_steps else "gradient through all of them at once"
        towards = f"a step towards the reference's distribution x {s.distribution_weight:g}"
        pieces = [
            (True, f"one random step of {n} (R0+)" if s.plus else f"{n} step{'s' * (n != 1)}, {how}"),
            (self.random_eta, "eta drawn anew for each step"),
            (not s.normalize_gradients, "gradients as large as they are"),
            (s.guidance_weight, f"guidance as a reward x {s.guidance_weight:g}"),
            (s.distribution_weight, f"{towards}, {self.levels.settings.describe()}"),
        ]
        return [piece for holds, piece in pieces if holds]

    def shortened(self) -> tuple[Config, int]:
        """Two steps, where each has its own backward: a further one adds its input and the gradient of that."""
        n, s = len(self.plan), self.settings
        if n <= 2 or not (s.plus or s.checkpoint_steps):
            return self.config, 0
        channels, side = latent_space(self.config)
        kept = 0 if s.plus else (n - 2) * 2 * 4 * self.rl.rows * channels * side**2
        return self.config.with_section("sampler", num_inference_steps=2), kept

    def least_work(self) -> Work:
        """Step by step, all steps but the last are computed twice; the fake score draws samples of its own."""
        n = len(self.plan)
        fake = self.levels.settings.updates if self.follows else 0
        return Work(n - 1 + fake * n + 2 * self.follows, n + fake, reward_gradients=1)

    def connect(self, parts: Parts) -> None:
        """See ``Algorithm.connect``."""
        super().connect(parts)
        if self.follows:
            self.target = as_clean(self.frozen)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """As ``Generator.updates``, with an eta of the iteration."""
        if self.random_eta:
            eta = rng(self.seed, Purpose.R0_ETA, batch.iteration).random(len(self.plan))
            self.plan = self.config.sampler.plan(self.schedule, eta=cast("Sequence[float]", eta))
        yield from super().updates(batch)

    def losses(self, work: Captioned) -> Losses:
        """One loss for each micro-batch, or, step by step, one for each of its steps."""
        for request, text in work:
            if self.by_step:
                yield from self._step_by_step(request, text, len(work))
            else:
                x = self.followed(request, text, 0)
                ascent, metrics = self._ascend(x, request, text)
                yield -(ascent * x).flatten(1).sum(1).mean(), metrics

    def followed(self, request: SampleRequest, text: TextStates, turn: int) -> Tensor:
        """What the reward looks at: the last samples, or R0+'s clean predictions."""
        named, x = self._start(request, turn)
        if self.settings.plus:
            return self._intermediate(request, text, named, x)
        return sample(self.prox, self.plan, x, text, named).x

    def _start(self, request: SampleRequest, turn: int = 0) -> tuple[NamedNoise, Tensor]:
        """Named noise and x_N."""
        named = NamedNoise(request.names(self.seed, turn))
        return named, named.start(self.parts.sample_shape, self.parts.device)

    def _step_by_step(self, request: SampleRequest, text: TextStates, micro: int) -> Losses:
        """Backward through all steps, one at a time: of each only the input is kept, and its forward is made again.

        ZeRO 3 needs one forward to one backward as well. The update's objective is the mean over all of its losses, of
        which each micro-batch has K. So each is multiplied by K, and the gradient at a step's input is 1/micro of the
        derivative that the step before needs.
        """
        named, x = self._start(request)
        with torch.no_grad():
            inputs = [self.plan[0].before(x, named)]
            for step, following in pairwise(self.plan):
                x = step.after(self.prox(inputs[-1], step.t, step.lam, text), x, named)
                inputs.append(following.before(x, named))
        # Of the objective, at the step's output. The last step's output is the prox's.
        derivative: Tensor | None = None
        for step, z in reversed(list(zip(self.plan, inputs, strict=True))):
            z.requires_grad_(step is not self.plan[0])
            prox = self.prox(z, step.t, step.lam, text)
            metrics: dict[str, float] = {}
            if derivative is None:
                found, metrics = self._ascend(prox, request, text)
                derivative = -found / len(z)
            yield self.backwards * (step.b * derivative * prox).sum(), metrics
            if z.requires_grad:
                assert z.grad is not None
                derivative = step.a * micro * z.grad + step.d * derivative

    def _intermediate(self, request: SampleRequest, text: TextStates, named: NamedNoise, x: Tensor) -> Tensor:
        """R0+: the clean prediction that a random step's own output contains, E[x_0 | z], for the reward.

        One step for the whole iteration, so that ranks and micro-batches are alike.
        """
        chosen = int(rng(self.seed, Purpose.R0_STEP, request.step).integers(len(self.plan)))
        step = self.plan[chosen]
        with torch.no_grad():
            z = step.before(sample(self.prox, self.plan[:chosen], x, text, named).x, named)
        t, lam = (torch.full((len(z),), value, device=self.parts.device) for value in (step.t, step.lam))
        eps = (z - self.prox(z, step.t, step.lam, text)) / step.lam**0.5
        return clean_prediction(z, eps, Level.of(self.schedule, t, lam))

    def _ascend(self, x: Tensor, request: SampleRequest, text: TextStates) -> tuple[Tensor, dict[str, float]]:
        """G at the samples, and what is logged of them."""
        s, found = self.settings, self.gradients(x, request.rows)
        metrics = mean_scores(found.scores, self.gradients.weights)
        if not self.needs_reference:
            return found.ascent, metrics
        with torch.no_grad():
            extra = torch.zeros_like(x)
            if s.guidance_weight:
                extra += s.guidance_weight * self.gradients.scaled(self.guidance(x, request, text))
            if self.follows:
                towards = self.towards_reference(x, request, text)
                extra += s.distribution_weight * towards
                metrics["distribution_gap"] = towards.flatten(1).norm(dim=1).mean().item()
            return found.ascent + extra, metrics

    def guidance(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """Guidance as an implicit reward: D_ref(y, c) - D_ref(y, null) at a random noise level y of x."""
        level, g = self.levels.draw(request, Purpose.R0_GUIDANCE, x)
        y = level.diffuse(x, noise(g, x))
        encoder = self.parts.encoder
        both = TextStates.join(text, encoder.null_like(text))
        eps = self.frozen(torch.cat([y, y]), torch.cat([level.t] * 2), torch.cat([level.lam] * 2), both).float()
        conditional, unconditional = eps.chunk(2)
        # D is y minus a multiple of eps, so the difference of two D is that multiple of the difference of eps.
        return expand(level.sigma**2 / (level.lam.sqrt() * level.alpha), x) * (unconditional - conditional)

    def towards_reference(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """(D_ref(y) - D_fake(y)) / |x - D_ref(y)| at a random noise level y of x, per sample.

        DMD's weight in norms (arXiv 2311.18828). Its length is that of a reward's unit step where the two disagree
        fully, and 0 where the distributions are equal; a unit vector would never shrink.
        """
        level, g = self.levels.draw(request, 0, x)
        y = level.diffuse(x, noise(g, x))
        target = self.target(y, level, text)
        return (target - self.fake(y, level, text)) / expand((x - target).flatten(1).norm(dim=1).clamp_min(1e-6), x)
