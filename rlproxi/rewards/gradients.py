"""Gradients of differentiable rewards with respect to samples: R0, DIDR and GRPO's last step climb them.

The rewards' networks are in the learner's process, on its device. A gradient is as large as the image, so a service
would move float32 images both ways for every sample (docs/algorithms.md has the measurement).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..config.sections import Reward
from ..models.autoencoder import Autoencoder
from .base import TorchScorer
from .registry import checked_params, get


@dataclass
class Gradients:
    """What ``RewardGradients`` returns, detached.

    scores: name -> [B]. ascent: the direction in which the weighted rewards rise, shaped like the samples.
    """

    scores: dict[str, Tensor]
    ascent: Tensor


class RewardGradients:
    """The training rewards as functions of samples (pixels in [-1, 1], or latents).

    Args:
        scorers: name -> (scorer, weight).
        vae: decodes samples into pixels; None: they are pixels.
        normalize: divide each reward's gradient by its own norm, for each sample, before weighting, so that no reward
            drowns the others (R0, arXiv 2503.13070). False: the plain gradient of the weighted sum.
    """

    def __init__(
        self, scorers: dict[str, tuple[TorchScorer, float]], vae: Autoencoder | None = None, normalize: bool = True
    ):
        self.scorers, self.vae, self.normalize = scorers, vae, normalize
        if vae is not None:
            vae.vae.requires_grad_(False)

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight."""
        return {name: weight for name, (_, weight) in self.scorers.items()}

    @classmethod
    def build(
        cls, rewards: Sequence[Reward], vae: Autoencoder | None, normalize: bool, device: str | torch.device
    ) -> RewardGradients:
        """Builds the scorers on ``device``. Raises ValueError as ``rewards.build``, and for one without gradients."""
        scorers = {}
        for reward in rewards:
            kind = get(reward.kind)
            if not issubclass(kind, TorchScorer):
                raise ValueError(f"reward {reward.name!r} has no gradient: {reward.kind} is not a network of pixels")
            params = checked_params(reward.kind, {**reward.params, "device": str(device)})
            scorers[reward.name] = (kind(**params), reward.weight)
        return cls(scorers, vae, normalize)

    def pixels(self, x: Tensor) -> Tensor:
        """Samples -> [B, 3, H, W] in [0, 1]. Clipped, so that nothing is gained beyond black and white."""
        images = x if self.vae is None else self.vae.decode(x)
        return ((images + 1) / 2).clamp(0, 1)

    def total(self, x: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the weighted sum [B], differentiable in x; name -> [B] detached)."""
        pixels = self.pixels(x)
        scores = {name: scorer.rewards(pixels, prompts).float() for name, (scorer, _) in self.scorers.items()}
        total = reduce(operator.add, (self.scorers[name][1] * value for name, value in scores.items()))
        return total, {name: value.detach() for name, value in scores.items()}

    def __call__(self, x: Tensor, prompts: Sequence[str]) -> Gradients:
        """Scores and ascent direction at samples x [B, ...]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            pixels = self.pixels(x)
            scores, ascent = {}, torch.zeros_like(x)
            for i, (name, (scorer, weight)) in enumerate(self.scorers.items()):
                value = scorer.rewards(pixels, prompts).float()
                (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=i + 1 < len(self.scorers))
                scores[name] = value.detach()
                ascent += weight * self.scaled(gradient)
        return Gradients(scores, ascent)

    def scaled(self, gradient: Tensor) -> Tensor:
        """A direction [B, ...] as it enters the sum: with ``normalize``, each sample's divided by its norm."""
        # A sample whose score is missing has no direction; one NaN must not reach the weights.
        one_each = (-1, *[1] * (gradient.dim() - 1))
        finite = torch.isfinite(gradient).flatten(1).all(1).reshape(one_each)
        gradient = torch.where(finite, gradient, torch.zeros_like(gradient))
        if not self.normalize:
            return gradient
        return gradient / (gradient.flatten(1).norm(dim=1).reshape(one_each) + 1e-12)


def mean_scores(scores: dict[str, Tensor], weights: dict[str, float]) -> dict[str, float]:
    """reward/<name> and reward/mean of a micro-batch, over the samples that have a score; NaN where none has one.

    The same names whatever is missing: ranks compare what they log.
    """
    found = {f"reward/{name}": value[torch.isfinite(value)].mean().item() for name, value in scores.items()}
    return {**found, "reward/mean": sum(weights[name] * found[f"reward/{name}"] for name in scores)}
