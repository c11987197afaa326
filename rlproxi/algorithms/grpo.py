"""GRPO on the z-chain.

L = -mean over samples and trained steps of min(rho A, clip(rho, 1 - eps_lo, 1 + eps_hi) A) + beta KL,
with rho and KL from ``proximal.policy`` (ProxT2I, arXiv 2511.18742; the form of DeepSeekMath's GRPO). The last step is
deterministic and has no ratio. If the rewards are differentiable, ``last_step_weight`` sends their gradient through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..config.algorithms import ALGORITHMS
from ..config.loading import Config
from ..config.section import Section
from ..models.text import TextStates, operator
from ..proximal import policy
from ..proximal.operator import Prox
from ..proximal.samplers import Step
from ..rewards.gradients import mean_scores
from ..seeds import Purpose
from .base import Algorithm, AlgorithmStopped, Batch, Parts, Update, Work, share


class GRPOSettings(Section):
    """GRPO on the actions of a sampler that draws noise (arXiv 2402.03300; ProxT2I, arXiv 2511.18742)."""

    trained_steps: int | None = Field(3, ge=1, description="Window of actions trained, drawn per iteration; null: all.")
    clip_range: float = Field(1e-3, gt=0, description="eps_lo of the ratio's clip.")
    clip_range_high: float | None = Field(None, gt=0, description="eps_hi; null: the same as clip_range.")
    kl_coef: float = Field(0.03, ge=0, description="beta, weight of KL(pi || pi_ref). 0 keeps no reference copy.")
    reduction: Literal["mean", "sum"] = Field("mean", description="Over dimensions, for log-ratio and KL.")
    normalize_ratio: bool = Field(
        False, description="Log-ratio without its quadratic bias, in units equal for all steps (GRPO-Guard's idea)."
    )
    advantage_std: Literal["group", "global"] = Field("group", description="Which std divides the advantages.")
    same_noise: bool = Field(False, description="One z_N (x_N and the first noise) for all samples of a group.")
    last_step_weight: float = Field(
        0.0, ge=0, description="Weight of the differentiable rewards' gradient through the last step; 0: none."
    )
    first_ratio_tolerance: float = Field(1e-6, gt=0, description="How far the first ratio may be from 1.")


@dataclass(frozen=True)
class Advantages:
    """values [P, G] float32, 0 where masked; weight [P, G] whose mean over samples is 1 (0 where masked)."""

    values: np.ndarray
    weight: np.ndarray
    stats: dict[str, float]


def advantages(rewards: np.ndarray, std: Literal["group", "global"] = "group", eps: float = 1e-6) -> Advantages:
    """(r - group mean)/(std + eps) for rewards [P, G]; NaN is a missing score, never a 0.

    A missing sample, and the samples of a group with fewer than two scores or without variance, get weight 0 and are
    counted. ``std``: 'group' divides by each group's own, 'global' by that of the deviations from all group means.
    """
    r = np.asarray(rewards, np.float64)
    present = np.isfinite(r)
    count = present.sum(1, keepdims=True)
    mean = np.where(present, r, 0).sum(1, keepdims=True) / np.maximum(count, 1)
    deviation = np.where(present, r - mean, 0)
    group_std = np.sqrt((deviation**2).sum(1, keepdims=True) / np.maximum(count, 1))
    flat = (count >= 2) & (group_std <= 1e-8)
    usable = present & (count >= 2) & (group_std > 1e-8)
    scale = group_std
    if std == "global" and usable.any():
        scale = np.sqrt((deviation[usable] ** 2).mean())
    values = np.where(usable, deviation / (scale + eps), 0)
    share = usable.mean()
    weight = usable / share if share > 0 else np.zeros_like(r)
    stats = {
        "advantages/zero_variance_groups": float(flat.sum()),
        "groups/masked": float((count < 2).sum()),
        "samples/masked": float((~present).sum()),
        "reward/mean": float(r[present].mean()) if present.any() else float("nan"),
        "reward/std": float(group_std[count >= 2].mean()) if (count >= 2).any() else float("nan"),
    }
    return Advantages(values.astype(np.float32), weight.astype(np.float32), stats)


@dataclass
class MicroBatch:
    """Whole groups, in the shape they were sampled in, at the K trained steps of this batch.

    Args:
        z, z_next, prox: the prox's input, the next input (the action) and the rollout's prox output, float32
            [K, B, ...].
        advantages, weight: [B].
        text, prompts: of B rows.
        z_last: the input of the last step [B, ...], where its gradient is wanted.
        finite: which samples are numbers, bool [B]; None: all of them.
    """

    z: Tensor
    z_next: Tensor
    prox: Tensor
    advantages: Tensor
    weight: Tensor
    text: TextStates
    prompts: tuple[str, ...] = ()
    z_last: Tensor | None = None
    finite: Tensor | None = None


@ALGORITHMS.register("grpo", default=True)
class GRPO(Algorithm):
    """The loss object of the learner. ``plan``: the sampler's steps, k = N..1."""

    Settings = GRPOSettings
    settings: GRPOSettings
    defaults: ClassVar = {"group_size": 8}
    hold_back = "raise grpo.kl_coef"
    spread = "a larger rl.group_size; with grpo.same_noise=true set it to false"
    gradients_key = "last_step_weight"
    ratio_tolerance = "first_ratio_tolerance"
    charts = ("kl", "clip_fraction", "ratio/mean")
    traceable = True

    @classmethod
    def check_config(cls, config: Config) -> None:
        """As ``Algorithm.check_config``: a sampler that draws noise, and groups whose samples can be compared."""
        trained = config.part(config.section, GRPOSettings).trained_steps
        if config.rl.group_size < 2:
            raise ValueError(
                f"rl.group_size is {config.rl.group_size}: advantages compare samples of one group, "
                "so it must be at least 2 (8 to 24 is usual)"
            )
        actions = policy.actions(config.sampler.plan(config.schedule.build()))
        if trained and trained > len(actions):
            raise ValueError(
                f"{config.section}.trained_steps is {trained}, but sampler.num_inference_steps "
                f"{len(actions) + 1} gives only {len(actions)} actions; lower it or use null"
            )

    def __init__(self, config: Config):
        super().__init__(config)
        self.plan: list[Step] = config.sampler.plan(config.schedule.build())
        self.actions = policy.actions(self.plan)
        self.needs_reference = self.settings.kl_coef > 0
        self.needs_gradients = self.settings.last_step_weight > 0
        self.keep_last, self.same_noise = self.needs_gradients, self.settings.same_noise

    def describe(self) -> list[str]:
        """See ``Algorithm.describe``."""
        s = self.settings
        return [
            f"{self.trained_steps} of {len(self.actions)} actions trained",
            f"clip {s.clip_range:g}",
            f"KL {s.kl_coef:g}",
            *([f"the reward's gradient through the last step x {s.last_step_weight:g}"] if s.last_step_weight else []),
        ]

    def shortened(self) -> tuple[Config, int]:
        """One loss of the window is as large as another."""
        return self.config.with_section(self.config.section, trained_steps=1), 0

    def least_work(self) -> Work:
        """See ``Algorithm.least_work``; with a KL term each trained step has a forward of the reference."""
        policy_forwards = self.trained_steps if self.settings.kl_coef else 0
        return Work(len(self.plan) + policy_forwards, self.trained_steps, scored=True)

    def window(self, iteration: int) -> list[policy.Action]:
        """The actions trained in this iteration, drawn per batch (per sample would inflate the spread)."""
        rng = np.random.default_rng((self.seed, Purpose.WINDOW, iteration))
        return [self.actions[i] for i in sorted(rng.choice(len(self.actions), self.trained_steps, replace=False))]

    @property
    def trained_steps(self) -> int:
        """Actions in a window."""
        return self.settings.trained_steps or len(self.actions)

    def kept_steps(self, iteration: int) -> tuple[int, ...]:
        """The positions of the actions in the iteration's ``window``."""
        return tuple(action.index for action in self.window(iteration))

    def losses_per_update(self, world: int) -> dict[str, int]:
        """One loss for each micro-batch and trained step, and one for the last step's gradient."""
        return {"policy": self.micro_batches(world) * (self.trained_steps + self.needs_gradients)}

    def connect(self, parts: Parts) -> None:
        """See ``Algorithm.connect``."""
        super().connect(parts)
        guidance = self.config.sampler.guidance_scale
        self.prox = operator(parts.networks["policy"], parts.encoder, guidance)
        self.reference = parts.reference and operator(parts.reference, parts.encoder, guidance)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """One update for each share of the prompts."""
        window = self.window(batch.iteration)
        for update in range(self.rl.updates_per_step):
            losses = self.losses(self.prox, self.reference, self._micro_batches(batch, update), window, update == 0)
            yield Update("policy", self.lr(batch.iteration), losses)

    def metrics(self, batch: Batch) -> dict[str, float]:
        """The rewards' statistics; see ``advantages``."""
        return self._advantages(batch).stats

    def _advantages(self, batch: Batch) -> Advantages:
        assert batch.rewards is not None, "rollouts are scored"
        return advantages(batch.rewards, self.settings.advantage_std)

    def _micro_batches(self, batch: Batch, update: int) -> list[MicroBatch]:
        found = self._advantages(batch)
        mine = share(len(batch.requests), self.rl.updates_per_step, batch.world, update, batch.rank)
        return [self._micro_batch(batch, j, found) for j in mine]

    def _micro_batch(self, batch: Batch, j: int, found: Advantages) -> MicroBatch:
        assert batch.chain is not None, "rollouts keep the chain"
        request = batch.requests[j]
        groups = len(request.prompts)
        rows = slice(j * groups, (j + 1) * groups)
        flat = lambda x: torch.from_numpy(x[rows].reshape(-1)).to(self.parts.device)  # noqa: E731
        text = self.parts.encoder.groups(request.prompts, request.group_size)
        chain = batch.chain(j)  # z, z_next, prox, and perhaps z_last and finite
        return MicroBatch(
            **chain, advantages=flat(found.values), weight=flat(found.weight), text=text, prompts=request.rows
        )

    def losses(
        self,
        prox: Prox,
        reference: Prox | None,
        batches: list[MicroBatch],
        window: list[policy.Action],
        first: bool = False,
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """One loss for each (micro-batch, trained step), and one for the last step where its gradient is wanted.

        Their mean is the objective up to a constant. Lazy: the next forward runs when the next loss is asked for.
        ``first``: no update was made on these samples yet, so each step's largest |log-ratio| shows whether learner and
        rollout compute the same thing.
        """
        # The policy's losses count as their own mean, with the last step's beside it or without.
        scale = (len(window) + 1) / len(window) if self.needs_gradients else 1.0
        for batch in batches:
            for position, action in enumerate(window):
                loss, metrics = self._loss(prox, reference, batch, position, action)
                if first:
                    metrics[f"ratio/first_max/{action.index}"] = metrics["ratio/max_log"]
                yield scale * loss, metrics
            if self.needs_gradients:
                yield self._last_loss(prox, batch, len(window) + 1)

    def _last_loss(self, prox: Prox, batch: MicroBatch, scale: float):
        """-eta r(prox(stop-grad z_1)) by its gradient, which is all that differs from the reward itself."""
        step = self.plan[-1]
        assert batch.z_last is not None, "rollouts keep the last step's input"
        x = prox(batch.z_last, step.t, step.lam, batch.text)
        found = self.gradients(x, batch.prompts)
        loss = -self.settings.last_step_weight * scale * (found.ascent * x).flatten(1).sum(1).mean()
        return loss, {"last_step/reward": mean_scores(found.scores, self.gradients.weights)["reward/mean"]}

    def _loss(self, prox, reference, batch: MicroBatch, position: int, action: policy.Action):
        s = self.settings
        z, old, z_next = batch.z[position], batch.prox[position], batch.z_next[position]
        new = prox(z, action.step.t, action.step.lam, batch.text)
        log_ratio = policy.log_ratio(action, new, old, action.free(z, z_next), s.reduction, regulated=s.normalize_ratio)
        if batch.finite is not None:
            log_ratio = torch.where(batch.finite, log_ratio, 0.0)
        ratio = log_ratio.exp()
        low, high = 1 - s.clip_range, 1 + (s.clip_range_high or s.clip_range)
        objective = torch.minimum(ratio * batch.advantages, ratio.clamp(low, high) * batch.advantages)
        loss = -(objective * batch.weight).mean()
        with torch.no_grad():
            metrics = {
                "ratio/mean": ratio.mean().item(),
                "ratio/max_deviation": (ratio - 1).abs().max().item(),
                "ratio/max_log": log_ratio.abs().max().item(),
                "clip_fraction": ((ratio < low) | (ratio > high)).float().mean().item(),
            }
        if s.kl_coef and reference is not None:
            with torch.no_grad():
                ref = reference(z, action.step.t, action.step.lam, batch.text)
            divergence = policy.kl(action, new, ref, s.reduction).mean()
            loss = loss + s.kl_coef * divergence
            metrics["kl"] = divergence.item()
        metrics["loss"] = loss.item()
        return loss, metrics

    def check(self, batch: Batch) -> dict[str, float]:
        """The largest |rho - 1| before any update, over the first update's micro-batches and trained steps."""
        deviations = [
            self._loss(self.prox, None, micro, position, action)[1]["ratio/max_deviation"]
            for micro in self._micro_batches(batch, 0)
            for position, action in enumerate(self.window(batch.iteration))
        ]
        return {"ratio/first_max_deviation": max(deviations)}

    def accept(self, found: dict[str, float]) -> None:
        """See ``Algorithm.accept``: max |rho - 1| must be within the tolerance."""
        deviation, tolerance = found["ratio/first_max_deviation"], self.settings.first_ratio_tolerance
        if not deviation <= tolerance:
            raise AlgorithmStopped(
                f"before the first update the learner's ratio is off 1 by {deviation:.2e} "
                f"({self.config.section}.first_ratio_tolerance = {tolerance:.0e}): it does not compute what rollouts "
                "did. Use the same weights, resources.threads and kind of chip for both roles, and set "
                "model.precision=float32 to rule out rounding"
            )
