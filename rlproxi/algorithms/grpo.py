"""GRPO on the z-chain: a loss from tensors, nothing about where tensors come from.

L = -mean over samples and trained steps of min(rho A, clip(rho, 1 - eps_lo, 1 + eps_hi) A) + beta KL,
with rho and KL from ``proximal.policy`` (ProxT2I, arXiv 2511.18742; the form of DeepSeekMath's GRPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..schema import GRPO as Settings
from ..data.prompts import training_prompts
from ..models.loading import latent_space
from ..models.text import TextStates
from ..proximal import policy
from ..proximal.operator import Prox
from ..proximal.samplers import Step, plan
from .requests import SampleRequest, split_request


@dataclass(frozen=True)
class Advantages:
    """values [P, G] float32, 0 where masked; weight [P, G] whose mean over samples is 1 (0 where masked)."""

    values: np.ndarray
    weight: np.ndarray
    stats: dict[str, float]


def advantages(rewards: np.ndarray, std: str = "group", eps: float = 1e-6) -> Advantages:
    """(r - group mean)/(std + eps) for rewards [P, G]; NaN is a missing score, never a 0.

    A missing sample, a group with fewer than two scores and a group without variance teach
    nothing: they get weight 0 and are counted. ``std`` is each group's own, or the ``global`` one of
    the deviations from the group means.
    """
    r = np.asarray(rewards, np.float64)
    present = np.isfinite(r)
    count = present.sum(1, keepdims=True)
    mean = np.where(present, r, 0).sum(1, keepdims=True) / np.maximum(count, 1)
    deviation = np.where(present, r - mean, 0)
    group_std = np.sqrt((deviation**2).sum(1, keepdims=True) / np.maximum(count, 1))
    flat = (count >= 2) & (group_std <= 1e-8)
    usable = present & (count >= 2) & (group_std > 1e-8)
    if std == "global":
        scale = np.sqrt((deviation[usable] ** 2).mean()) if usable.any() else 1.0
    elif std == "group":
        scale = group_std
    else:
        raise ValueError(f"advantage_std {std!r} is unknown; choose group or global")
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

    z, z_next, prox [K, B, ...] float32: the prox's input, the next input (the action) and the
    rollout's prox output; advantages, weight [B]; text has B rows.
    """

    z: Tensor
    z_next: Tensor
    prox: Tensor
    advantages: Tensor
    weight: Tensor
    text: TextStates


class FirstRatioError(RuntimeError):
    """Rollout and learner disagree before the first update."""


class GRPO:
    """The loss object of the learner.

    Args:
        settings: the ``grpo`` section.
        steps: the sampler's plan (k = N..1).
        seed: names the windows of trained steps.
    """

    def __init__(self, settings: Settings, steps: list[Step], seed: int = 0):
        self.settings = settings
        self.actions = policy.actions(steps)
        self.seed = seed

    def window(self, iteration: int) -> list[policy.Action]:
        """The actions trained in this iteration, drawn per batch (per sample would inflate the spread)."""
        count = self.settings.trained_steps or len(self.actions)
        rng = np.random.default_rng((self.seed, 0x57EB, iteration))
        return [self.actions[i] for i in sorted(rng.choice(len(self.actions), count, replace=False))]

    def lr(self, iteration: int) -> float:
        """Linear warm-up, constant, then linear decay to 5 %."""
        s = self.settings
        begin = s.decay_from * s.steps
        through = max(0.0, (iteration - begin) / max(1.0, s.steps - begin))
        return s.lr * min(1.0, (iteration + 1) / max(1, s.warmup_steps)) * (1 - 0.95 * min(1.0, through))

    def losses(self, prox: Prox, reference: Prox | None, batches: list[MicroBatch],
               window: list[policy.Action]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """One loss for each (micro-batch, trained step), each for a backward of its own.

        Their mean is the objective. ``prox`` carries gradients; ``reference`` is called without.
        Lazy: the next forward runs only when the next loss is asked for.
        """
        for batch in batches:
            for position, action in enumerate(window):
                yield self._loss(prox, reference, batch, position, action)

    def _loss(self, prox, reference, batch: MicroBatch, position: int, action: policy.Action):
        s = self.settings
        z, old, z_next = batch.z[position], batch.prox[position], batch.z_next[position]
        new = prox(z, action.step.t, action.step.lam, batch.text)
        log_ratio = policy.log_ratio(action, new, old, z_next, s.reduction, regulated=s.normalize_ratio)
        ratio = log_ratio.exp()
        low, high = 1 - s.clip_range, 1 + (s.clip_range_high or s.clip_range)
        objective = torch.minimum(ratio * batch.advantages, ratio.clamp(low, high) * batch.advantages)
        loss = -(objective * batch.weight).mean()
        with torch.no_grad():
            metrics = {
                "ratio/mean": ratio.mean().item(),
                "ratio/max_deviation": (ratio - 1).abs().max().item(),
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

    def check_first_ratio(self, deviation: float) -> None:
        """Raises FirstRatioError where max |rho - 1| before any update exceeds the tolerance."""
        if not deviation <= self.settings.first_ratio_tolerance:
            raise FirstRatioError(
                f"before the first update the learner's ratio is off 1 by {deviation:.2e} "
                f"(grpo.first_ratio_tolerance = {self.settings.first_ratio_tolerance:.0e}): the learner does not "
                "compute what the rollout actors did, so every advantage would push in a wrong direction. Use the "
                "same model.precision, resources.threads and kind of chip for both roles (set model.precision=float32 "
                "to rule out rounding), and check that both loaded the same weights.")


def build(config: Config) -> GRPO:
    """The algorithm of a config, with its plan."""
    s = config.sampler
    steps = plan(config.schedule.build(), s.name, s.num_inference_steps, s.start_time, s.grid)
    return GRPO(config.grpo, steps, config.run.seed)


def requests(config: Config, algorithm: GRPO, iteration: int) -> list[SampleRequest]:
    """What the rollout actors are asked for in one iteration: micro-batches of whole groups, in order."""
    indices, prompts = training_prompts(config, iteration)
    whole = SampleRequest("train", iteration, tuple(prompts), tuple(indices), config.grpo.group_size,
                          tuple(action.index for action in algorithm.window(iteration)))
    return split_request(whole, config.grpo.groups_per_micro_batch)


def share(count: int, updates: int, world: int, update: int, rank: int) -> range:
    """Which of ``count`` micro-batches a rank takes in one of the iteration's updates.

    Each update's set of micro-batches is the same at every world size.
    """
    block, mine = count // updates, count // updates // world
    start = update * block + rank * mine
    return range(start, start + mine)


def bytes_per_micro_batch(config: Config) -> int:
    """Bytes of one micro-batch in flight: images and the chain of the trained steps.

    Raises FileNotFoundError or ValueError where ``model.init`` or ``model.encoders`` is no usable folder.
    """
    g = config.grpo
    channels, side = latent_space(config)
    window = g.trained_steps or config.sampler.num_inference_steps - 1
    return g.groups_per_micro_batch * g.group_size * (3 * config.data.size**2 + 4 * 3 * window * channels * side**2)
