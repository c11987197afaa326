"""The sections of the stage rl's algorithms; see ``schema``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .sections import Section, StepCount


class Training(Section):
    """What every algorithm of the stage rl has. An iteration is a set of prompts, their samples, and the updates on them."""

    steps: int = Field(100, ge=1, description="Iterations.")
    prompts_per_step: int = Field(16, ge=1, description="Prompts in one iteration, over all ranks.")
    group_size: int = Field(1, ge=1, description="Samples of one prompt.")
    groups_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="Prompts whose samples share one forward; null: as many as the ranks can share evenly "
        "with at most 32 images in each (at least one prompt's).",
    )
    updates_per_step: int = Field(1, ge=1, description="Updates in an iteration, each on its share of the prompts.")
    lr: float = Field(2e-5, gt=0, description="Learning rate after warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Linear warm-up, in iterations.")
    decay_from: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the iterations after which the rate falls to 5 %, "
        "linearly: the noise of the last updates is averaged away.",
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="AdamW's betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, towards 0.")
    anchor: float = Field(
        0.0, ge=0, description="Weight of ||theta - theta_0||^2 in the loss: decay towards the start."
    )
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of averaged weights, which are then what is evaluated and saved; 0: none."
    )
    max_staleness: int = Field(0, ge=0, description="Weight versions a group may be behind; 0 is synchronous.")
    max_bytes_in_flight: int = Field(2 * 1024**3, ge=1, description="Bound on sampled but untrained data, in bytes.")
    checkpoint_every: int = Field(20, ge=1, description="Iterations between checkpoints.")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of whole groups in one iteration, over all ranks."""
        return self.prompts_per_step // self.groups_per_micro_batch


class GRPO(Training):
    group_size: int = Field(8, description="G, samples of one prompt.")
    trained_steps: int | None = Field(3, ge=1, description="Window of actions trained, drawn per iteration; None: all.")
    clip_range: float = Field(1e-3, gt=0, description="eps_lo of the ratio's clip.")
    clip_range_high: float | None = Field(None, gt=0, description="eps_hi; None: the same as clip_range.")
    kl_coef: float = Field(0.03, ge=0, description="beta, weight of KL(pi || pi_ref). 0 keeps no reference copy.")
    reduction: Literal["mean", "sum"] = Field("mean", description="Over dimensions, for log-ratio and KL.")
    normalize_ratio: bool = Field(
        False, description="Log-ratio without its quadratic bias, in units equal for all steps (GRPO-Guard's idea)."
    )
    advantage_std: Literal["group", "global"] = Field("group", description="Which std divides the advantages.")
    same_noise: bool = Field(False, description="One z_N (x_N and the first noise) for all samples of a group.")
    last_step_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the reward's own gradient through the last, deterministic step (differentiable "
        "rewards only), beside the policy gradient of the others; 0: none.",
    )
    first_ratio_tolerance: float = Field(1e-6, gt=0, description="How far the first ratio may be from 1.")

    @model_validator(mode="after")
    def _groups(self) -> GRPO:
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}: advantages compare samples of one group, "
                "so it must be at least 2 (8 to 24 is usual)"
            )
        return self


class Fake(Training):
    """What follows the generator's own distribution, for algorithms that compare it with the reference's."""

    candidates: list[StepCount] | None = Field(
        None, min_length=1, description="Step counts whose noise levels are used; null: pretrain.candidates."
    )
    levels: tuple[float, float] = Field((0.02, 0.98), description="Quantiles of the noise levels that are drawn.")
    fake_updates: int = Field(2, ge=1, description="Fake-score updates in an iteration, each on samples of its own.")
    fake_lr: float = Field(1e-4, gt=0, description="Learning rate of the fake score.")
    fake_loss: Literal["l1", "l2"] = Field(
        "l2",
        description="Denoising loss of the fake score: l2 for a reference that is a mean (a published score model), l1 for one "
        "of proximal matching's L1 phase; the two must err alike.",
    )

    @model_validator(mode="after")
    def _levels(self) -> Fake:
        low, high = self.levels
        if not 0 <= low < high <= 1:
            raise ValueError(f"levels is {list(self.levels)}: two quantiles, 0 <= low < high <= 1")
        return self


class R0(Fake):
    """Few-step generators by the gradients of differentiable rewards (R0, arXiv 2503.13070)."""

    steps: int = Field(200, ge=1, description="Iterations.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts in one iteration, over all ranks.")
    warmup_steps: int = Field(20, ge=0, description="Linear warm-up, in iterations.")
    anchor: float = Field(
        1e-3, ge=0, description="Weight of ||theta - theta_0||^2 in the loss, the regulariser towards the start."
    )
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
        description="Weight of a step towards the reference's distribution, D_ref(y) - D_fake(y) over |x_0 - D_ref(y)|, "
        "beside the rewards' unit steps: it mends what few steps and the rewards spoil. 0: none, and no fake score.",
    )
    checkpoint_steps: bool = Field(
        True,
        description="Keep only each step's input and compute the step again in the backward pass: the memory of one step "
        "instead of all, for one more forward of each.",
    )


class DIDR(Fake):
    """One-step generators towards the reward-tilted, diffused target (DIDR, arXiv 2605.24001); DI, DI++ and DI* beside it."""

    steps: int = Field(200, ge=1, description="Iterations: fake-score updates and one generator update.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts in one iteration, over all ranks.")
    warmup_steps: int = Field(20, ge=0, description="Linear warm-up, in iterations.")
    reward: Literal["diffused", "terminal", "none"] = Field(
        "diffused",
        description="diffused: DIDR's diffused reward score; terminal: the reward of the sample itself (DI++); none: "
        "Diff-Instruct, which only follows the reference.",
    )
    divergence: Literal["kl", "score"] = Field(
        "kl",
        description="kl: integral KL, as DI, DI++ and DIDR; score: the score-based divergence of DI*, with a terminal reward.",
    )
    beta: float = Field(
        0.05, gt=0, description="Temperature of the tilt exp(r / beta): smaller follows the reward more."
    )
    reward_weight: float = Field(
        100.0,
        ge=0,
        description="Weight of a terminal reward beside 1/2 ||x_0 - stop-grad(x_0 - G)||^2, a sum over dimensions.",
    )
    reward_steps: int = Field(
        1,
        ge=1,
        le=8,
        description="m, denoising steps of the diffused reward's proxy; 1 is Tweedie, and "
        "best where the reference has several modes (docs/algorithms.md).",
    )
    particles: int = Field(
        1, ge=1, description="K, particles of the proxy; more than 1 draw noise, so reward_steps must be at least 2."
    )
    damped: bool = Field(
        True,
        description="Shorten the proxy's pull by the reward's curvature, from one more look at the reward: the plug-in "
        "overshoots wherever the reward is curved (docs/algorithms.md). false: the paper's, with `particles`.",
    )
    kappa_max: float = Field(
        5.0,
        gt=0,
        description="Clamp of the diffused reward's weight sigma^2/alpha: above it the reward fades out. "
        "It says at which noise the reward may speak; what bounds it is `damped`.",
    )
    guidance_scale: float = Field(1.0, ge=0, description="Guidance of the reference.")

    @model_validator(mode="after")
    def _combinations(self) -> DIDR:
        if self.divergence == "score" and self.reward == "diffused":
            raise ValueError("divergence 'score' is DI*, which has no diffused reward: set reward=terminal or none")
        if self.particles > 1 and self.reward_steps < 2:
            raise ValueError(
                f"particles is {self.particles}, but one denoising step draws no noise that could tell them "
                "apart: set reward_steps to 2 or more, or particles=1"
            )
        if self.particles > 1 and self.damped:
            raise ValueError(f"particles is {self.particles}, and damped looks at one: set damped=false")
        return self


class Custom(Training):
    """Settings of an algorithm of one's own (run.algorithm = package.module:Class)."""

    params: dict[str, Any] = Field({}, description="Whatever that class reads.")
