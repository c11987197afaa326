"""R0 and R0+: a few-step generator trained by the gradients of rewards alone, held near its start.

L = -<stop-grad G, x_theta> + anchor ||theta - theta_0||^2, where G is the weighted sum of the rewards' gradients at the
sample, each divided by its own norm (R0, arXiv 2503.13070). R0 backpropagates through all K proximal steps. R0+ scores
the clean prediction of one random step, which was reached without gradient. With the ddim sampler it is the form for
score and flow models, with eta drawn anew for every step. G may also hold guidance as an implicit reward, and a step
towards the reference's distribution (Diff-Instruct's, arXiv 2305.18455).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ..proximal.samplers import AFTER, Step
from ..rewards.gradients import Gradients, mean_scores
from ..seeds import NamedNoise, Purpose, rng
from .base import Batch, Parts, Update, Work
from .fake import Captioned, Generator, Losses, noise
from .requests import SampleRequest


class R0Settings(Section):
    """Few-step generators by the gradients of differentiable rewards (R0, arXiv 2503.13070)."""

    plus: bool = Field(
        False,
        description="R0+: the reward looks at the clean prediction of a random step, reached without gradient: "
        "one forward and backward instead of as many as steps.",
    )
    random_eta: bool = Field(
        True,
        description="With the samplers ddim, euler and matched: eta ~ U[0, 1] for every step, "
        "drawn anew in each iteration, so that "
        "the generator is good with any; false: sampler.eta.",
    )
    normalize_gradients: bool = Field(
        True, description="Each reward's gradient divided by its norm, for each sample, before weighting."
    )
    guidance_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of guidance as an implicit reward: the reference's conditional minus its unconditional "
        "clean prediction of the noised sample. 0: none.",
    )
    distribution_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of a step towards the reference's distribution, D_ref(y) - D_fake(y) over "
        "|x_0 - D_ref(y)|, beside the rewards' unit steps: it repairs what few steps and the rewards spoil. 0: none, "
        "and no fake score.",
    )
    checkpoint_steps: bool = Field(
        True,
        description="Keep only each step's input and compute the step again in the backward pass: the memory of one "
        "step instead of all, for one more forward of each.",
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

    @classmethod
    def check_config(cls, config: Config) -> None:
        """As ``Algorithm.check_config``: under ZeRO 3 each backward follows its own forward."""
        super().check_config(config)
        s = config.part(config.section, R0Settings)
        if config.learner.zero_stage == 3 and not s.checkpoint_steps and not s.plus:
            raise ValueError(
                "learner.zero_stage 3 gathers weights for one forward and backward at a time, and "
                f"{config.section}.checkpoint_steps=false has several forwards in one graph: set it to true, or use "
                "stage 2"
            )

    def describe(self) -> list[str]:
        """See ``Algorithm.describe``."""
        s, n = self.settings, len(self.plan)
        how = "gradient step by step" if s.checkpoint_steps else "gradient through all of them at once"
        return [
            f"one random step of {n} (R0+)" if s.plus else f"{n} step{'s' * (n != 1)}, {how}",
            *(["eta drawn anew for each step"] if s.random_eta and self.config.sampler.name in AFTER else []),
            *([] if s.normalize_gradients else ["gradients as large as they are"]),
            *([f"guidance as a reward x {s.guidance_weight:g}"] if s.guidance_weight else []),
            *(
                [
                    f"a step towards the reference's distribution x {s.distribution_weight:g}, "
                    f"{self.levels.settings.describe()}"
                ]
                if s.distribution_weight
                else []
            ),
        ]

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

    @property
    def backwards(self) -> int:
        """Losses, each with a backward of its own, that a micro-batch is made of."""
        return len(self.plan) if self.settings.checkpoint_steps and not self.settings.plus else 1

    def connect(self, parts: Parts) -> None:
        """See ``Algorithm.connect``."""
        super().connect(parts)
        if self.follows:
            self.target = as_clean(self.frozen)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """As ``Generator.updates``, with an eta of the iteration."""
        if self.settings.random_eta and self.config.sampler.name in AFTER:
            eta = rng(self.seed, Purpose.R0_ETA, batch.iteration).random(len(self.plan))
            self.plan = self.config.sampler.plan(self.schedule, eta=cast("Sequence[float]", eta))
        yield from super().updates(batch)

    def losses(self, work: Captioned) -> Losses:
        """One loss for each micro-batch, or, step by step, one for each of its steps."""
        for request, text in work:
            named, x = self._start(request)
            if self.settings.plus:
                yield self._surrogate(self._intermediate(request, text, named, x), request, text)
            elif self.settings.checkpoint_steps:
                yield from self._step_by_step(request, text, named, x, len(work))
            else:
                yield self._surrogate(self._generate(text, named, x), request, text)

    def followed(self, request: SampleRequest, text: TextStates, turn: int) -> Tensor:
        """What the reward looks at: the last samples, or R0+'s clean predictions."""
        named, x = self._start(request, turn)
        return self._intermediate(request, text, named, x) if self.settings.plus else self._generate(text, named, x)

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

        ZeRO 3 needs one forward to one backward as well. The update's objective is the mean over all of its losses, of
        which each micro-batch has K. So each is multiplied by K, and the gradient at a step's input is 1/micro of the
        derivative that the step before needs.
        """
        inputs = []
        with torch.no_grad():
            for step in self.plan:
                inputs.append(step.before(x, named))
                if step is not self.plan[-1]:
                    x = self._take(step, inputs[-1], x, named, text)
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
                ascent += s.guidance_weight * self.gradients.scaled(self._guidance(x, request, text))
            if self.follows:
                towards = self._towards_reference(x, request, text)
                ascent += s.distribution_weight * towards
                extra["distribution_gap"] = towards.flatten(1).norm(dim=1).mean().item()
            return ascent

        found: Gradients = self.gradients(x, request.rows, also if s.guidance_weight or self.follows else None)
        return found.ascent, {**mean_scores(found.scores, self.gradients.weights), **extra}

    def _guidance(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """Guidance as an implicit reward: D_ref(y, c) - D_ref(y, null) at a random noise level y of x; no gradient goes
        through the reference."""
        level, g = self.levels.draw(request, Purpose.R0_GUIDANCE, x)
        y = level.diffuse(x, noise(g, x))
        encoder = self.parts.encoder
        both = TextStates.join(text, encoder.null_like(text))
        eps = self.frozen(torch.cat([y, y]), torch.cat([level.t] * 2), torch.cat([level.lam] * 2), both).float()
        conditional, unconditional = eps.chunk(2)
        # D is y minus a multiple of eps, so the difference of two D is that multiple of the difference of eps.
        return expand(level.sigma**2 / (level.lam.sqrt() * level.alpha), x) * (unconditional - conditional)

    def _towards_reference(self, x: Tensor, request: SampleRequest, text: TextStates) -> Tensor:
        """(D_ref(y) - D_fake(y)) / |x - D_ref(y)| at a random noise level y of x, per sample.

        DMD's weight in norms (arXiv 2311.18828). Its length is that of a reward's unit step where the two disagree
        fully, and 0 where the distributions are equal; a unit vector would never shrink.
        """
        level, g = self.levels.draw(request, 0, x)
        y = level.diffuse(x, noise(g, x))
        target = self.target(y, level, text)
        return (target - self.fake(y, level, text)) / expand((x - target).flatten(1).norm(dim=1).clamp_min(1e-6), x)
