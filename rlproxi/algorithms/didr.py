"""DIDR: a one-step generator towards the reward-tilted target, compared at every noise level (arXiv 2605.24001).

An iteration has two stages: a fake score follows the generator's own marginals by denoising, and the generator moves by

    G = D_fake(y) - D_ref(y) - kappa s_r(y),   L = 1/2 ||x_0 - stop-grad(x_0 - G)||^2

(docs/method.md; ``distillation`` and ``diffused_reward`` have the formulas). Without the reward's term it is
Diff-Instruct (DI), with a terminal reward instead DI++, with a terminal reward and a score divergence DI*.
"""

from __future__ import annotations

import contextlib
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config.algorithms import ALGORITHMS
from ..config.loading import Config
from ..config.section import Section
from ..models.text import TextStates, operator
from ..proximal.clean import Level, as_clean
from ..proximal.operator import expand
from ..rewards.gradients import mean_scores
from ..seeds import NamedNoise
from .base import Parts, Work
from .diffused_reward import damped, denoise_steps, proxy
from .distillation import normalise, score_divergence, surrogate
from .fake import Captioned, Generator, Losses, noise
from .requests import SampleRequest


class DIDRSettings(Section):
    """One-step generators towards the reward-tilted, diffused target (DIDR, arXiv 2605.24001); DI, DI++ and DI* too."""

    reward: Literal["diffused", "terminal", "none"] = Field(
        "diffused", description="diffused: DIDR's score; terminal: the sample's own reward (DI++); none: Diff-Instruct."
    )
    divergence: Literal["kl", "score"] = Field(
        "kl", description="kl: integral KL, as DI, DI++ and DIDR; score: that of DI*, which has no diffused reward."
    )
    beta: float = Field(
        0.05, gt=0, description="Temperature of the tilt exp(r / beta): smaller follows the reward more."
    )
    reward_weight: float = Field(
        100.0, ge=0, description="Weight of a terminal reward beside 1/2 ||x_0 - stop-grad(x_0 - G)||^2."
    )
    reward_steps: int = Field(
        1, ge=1, le=8, description="m, denoising steps of the diffused reward's proxy; 1 is Tweedie."
    )
    particles: int = Field(
        1, ge=1, description="K, particles of the proxy; more than 1 draw noise, so reward_steps must be at least 2."
    )
    damped: bool = Field(
        True, description="Shorten the proxy's pull by the reward's curvature; false: the paper's, with `particles`."
    )
    kappa_max: float = Field(
        5.0, gt=0, description="Clamp of the diffused reward's weight sigma^2/alpha: above it the reward fades out."
    )
    guidance_scale: float = Field(1.0, ge=0, description="Guidance of the reference.")

    @model_validator(mode="after")
    def _combinations(self) -> DIDRSettings:
        if self.divergence == "score" and self.reward == "diffused":
            raise ValueError("divergence 'score' is DI*, which has no diffused reward: set reward=terminal or none")
        if self.particles > 1 and self.reward_steps < 2:
            raise ValueError(
                f"particles is {self.particles}, and one step draws no noise: set reward_steps to 2 or more"
            )
        if self.particles > 1 and self.damped:
            raise ValueError(f"particles is {self.particles}, and damped looks at one: set damped=false")
        return self


@ALGORITHMS.register("didr")
class DIDR(Generator):
    """The loss object of DIDR, DI, DI++ and DI*."""

    Settings = DIDRSettings
    settings: DIDRSettings
    defaults: ClassVar = {"steps": 200, "prompts_per_step": 32, "warmup_steps": 20}
    hold_back = "raise didr.beta or lower didr.reward_weight"
    gradients_key = "reward"
    charts = ("loss", "fake/loss")
    needs_reference = True

    def __init__(self, config: Config):
        super().__init__(config)
        (self.step,) = config.sampler.plan(config.schedule.build(), 1)
        self.needs_gradients = self.settings.reward != "none"

    @classmethod
    def check_config(cls, config: Config) -> None:
        """As ``Algorithm.check_config``: one step, and a score divergence where a backward through a backward works."""
        super().check_config(config)
        steps, key = config.sampler.num_inference_steps, f"{config.section}.divergence 'score'"
        if steps != 1:
            raise ValueError(f"sampler.num_inference_steps is {steps}: set it to 1 for {config.run.algorithm}")
        if config.part(config.section, DIDRSettings).divergence != "score":
            return
        if config.learner.zero_stage == 3:
            raise ValueError(f"{key} needs the fake score's gradient to its input: use learner.zero_stage 2, not 3")
        if config.model.lora and config.model.gradient_checkpointing:
            raise ValueError(
                f"{key} works with model.lora or with model.gradient_checkpointing, not with both: the reference would "
                "be computed again with its adapters on"
            )

    def describe(self) -> list[str]:
        """See ``Algorithm.describe``."""
        s = self.settings
        proxy = "damped" if s.damped else f"{s.particles} particle{'s' * (s.particles != 1)}"
        reward = {
            "diffused": f"diffused reward, beta {s.beta:g}, m={s.reward_steps}, {proxy}",
            "none": "no reward",
            "terminal": f"terminal reward x {s.reward_weight:g}",
        }[s.reward]
        return [
            f"{s.divergence} divergence",
            reward,
            self.levels.settings.describe(),
            f"levels of candidates {self.levels.candidates}",
            *([f"reference's guidance {s.guidance_scale:g}"] if s.guidance_scale != 1 else []),
        ]

    def least_work(self) -> Work:
        """See ``Algorithm.least_work``: the reward is computed at the samples, and where the pull leads."""
        fake = self.levels.settings.updates
        return Work(fake + 2, fake + 1, input_gradients=1, reward_gradients=1, rewards=1 + self.settings.damped)

    def connect(self, parts: Parts) -> None:
        """See ``Algorithm.connect``."""
        super().connect(parts)
        self.reference = as_clean(self.frozen)
        self.target = as_clean(operator(self.frozen, parts.encoder, self.settings.guidance_scale).residual)

    def followed(self, request: SampleRequest, text: TextStates, turn: int) -> Tensor:
        """x_0 of the generator, with its graph where gradients are on."""
        named = NamedNoise(request.names(self.seed, turn))
        x = named.start(self.parts.sample_shape, self.parts.device)
        return self.step.after(self.prox(self.step.before(x, named), self.step.t, self.step.lam, text), x, named)

    def losses(self, work: Captioned) -> Losses:
        """One loss for each micro-batch."""
        score = self.settings.divergence == "score"
        for request, text in work:
            x0 = self.followed(request, text, 0)
            level, g = self.levels.draw(request, 0, x0)
            # Until the backward is done, the fake score's weights must not collect gradients of the generator's loss.
            with _frozen(self.parts.plain["fake"]) if score else contextlib.nullcontext():
                divergence = self._score_divergence if score else self._divergence
                yield self._with_reward(divergence(x0, level, g, request, text), x0, request)

    def _with_reward(self, loss: Tensor, x0: Tensor, request: SampleRequest) -> tuple[Tensor, dict[str, float]]:
        metrics = {"loss": loss.item()}
        if self.settings.reward == "terminal":
            found = self.gradients(x0, request.rows)
            # The mean over dimensions, as the divergence's.
            loss = loss - self.settings.reward_weight * (found.ascent * x0).flatten(1).mean(1).mean()
            metrics |= mean_scores(found.scores, self.gradients.weights)
        elif self.needs_gradients:
            with torch.no_grad():
                metrics |= mean_scores(self.gradients.total(x0, request.rows)[1], self.gradients.weights)
        return loss, metrics

    def _divergence(
        self, x0: Tensor, level: Level, g: torch.Generator, request: SampleRequest, text: TextStates
    ) -> Tensor:
        with torch.no_grad():
            y = level.diffuse(x0.detach(), noise(g, x0))
            fake, target = self.fake(y, level, text), self.target(y, level, text)
        tilted = target + self._pull(y, level, g, request, text) if self.settings.reward == "diffused" else target
        return surrogate(x0, normalise(fake - tilted, x0, target)).mean()

    def _score_divergence(
        self, x0: Tensor, level: Level, g: torch.Generator, request: SampleRequest, text: TextStates
    ) -> Tensor:
        fake = as_clean(self.parts.plain["fake"])
        return score_divergence(x0, noise(g, x0), level, fake, self.target, text).mean()

    def _pull(self, y: Tensor, level: Level, g: torch.Generator, request: SampleRequest, text: TextStates) -> Tensor:
        """kappa s_r: where the diffused reward moves the reference's clean prediction."""
        s, ladder = self.settings, self.levels.ladder
        kappa = level.kappa.clamp(max=s.kappa_max)

        # The posterior's own noise between steps, which alone approaches the truth (see diffused_reward).
        def denoise(y: Tensor, k: int) -> Tensor:
            fresh = lambda k, like: noise(g, like)  # noqa: E731
            return denoise_steps(self.reference, y, level, ladder, s.reward_steps, text, fresh)

        reward = lambda x: self.gradients.total(x, request.rows)[0]  # noqa: E731
        with self.parts.reference_scope():
            if s.damped:
                return damped(y, denoise, reward, s.beta, kappa)
            return expand(kappa, y) * proxy(y, denoise, reward, s.beta, s.particles)


@contextlib.contextmanager
def _frozen(module: nn.Module):
    """Inside, what is trained of the module counts as constant."""
    trained = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
    trained.requires_grad_(False)
    try:
        yield
    finally:
        trained.requires_grad_(True)
