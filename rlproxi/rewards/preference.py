"""Preference and quality of the embedded portraits: the miniature of a reward such as HPSv2, and of its check.

``preference`` is a Bradley-Terry model of pairwise comparisons of portraits of mixed quality: a training reward.
``quality`` is a network of another architecture, trained apart on other portraits, on the known quality itself: the
held-out judge, which nothing optimises. Neither reads the caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.precision import autocast
from .attributes import resized
from .base import TorchScorer
from .prepared import PreparedNetwork
from .registry import register


class PreferenceModel(PreparedNetwork):
    """[B, 3, H, W] float in [0, 1] -> score [B]; differences of scores are log-odds of being preferred."""

    title = "preference model"

    def __init__(self, sample_size: int = 32, width: int = 32):
        super().__init__(sample_size=sample_size, width=width)
        w = width

        def stage(before: int, after: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]

        stages = [stage(3, w, 2), stage(w, w, 1), stage(w, 2 * w, 2), stage(2 * w, 2 * w, 1), stage(2 * w, 2 * w, 2)]
        self.features = nn.Sequential(*(layer for layers in stages for layer in layers), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(2 * w * (sample_size // 8) ** 2, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1] -> score [B]."""
        return self.head(self.features((2 * pixels - 1).contiguous(memory_format=torch.channels_last)))[:, 0]


class QualityModel(PreparedNetwork):
    """[B, 3, H, W] float in [0, 1] -> logit of the quality [B]. Wider kernels, and means of the early features."""

    title = "quality judge"

    def __init__(self, sample_size: int = 32, width: int = 32):
        super().__init__(sample_size=sample_size, width=width)
        w = width

        def stage(before: int, after: int, kernel: int, stride: int) -> nn.Module:
            conv = nn.Conv2d(before, after, kernel, stride, kernel // 2)
            return nn.Sequential(conv, nn.GroupNorm(4, after), nn.GELU())

        self.stem, self.second = stage(3, w, 5, 2), stage(w, 2 * w, 5, 2)
        self.third, self.fourth = stage(2 * w, 2 * w, 3, 1), stage(2 * w, 4 * w, 3, 2)
        self.head = nn.Sequential(nn.Linear(4 * w * (sample_size // 8) ** 2 + 3 * w, 128), nn.GELU(), nn.Linear(128, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1] -> logit [B]."""
        first = self.stem((2 * pixels - 1).contiguous(memory_format=torch.channels_last))
        second = self.second(first)
        last = self.fourth(second + self.third(second))
        return self.head(torch.cat([last.flatten(1), first.mean((2, 3)), second.mean((2, 3))], 1))[:, 0]


def quality_loss(logits: Tensor, strengths: Tensor) -> Tensor:
    """The mean smooth L1 distance of the strengths that the logits [B] stand for, -log sigmoid, to ``strengths``."""
    return F.smooth_l1_loss(F.softplus(-logits), strengths, beta=0.2)


def bradley_terry_loss(scores: Tensor, strengths: Tensor, draw: Tensor, temperature: float = 0.25) -> Tensor:
    """The mean negative log-likelihood of one comparison of each pair of the batch.

    The simulated person prefers a to b with probability sigmoid((strength_b - strength_a) / temperature).

    Args:
        scores, strengths: [B]; a strength is how much a portrait is degraded, in all.
        draw: uniform numbers [B, B]; those of pairs (i, j) with i < j decide the comparisons.
    """
    i, j = torch.triu_indices(len(scores), len(scores), 1)
    prefers = torch.sigmoid((strengths[j] - strengths[i]) / temperature)
    won = (draw[i, j] < prefers).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores[i] - scores[j], won)


class _Prepared(TorchScorer):
    """A scorer around one of the networks above.

    Args:
        path: its safetensors file.
        options: ``device``, ``precision`` (float32 here: the network is small) and ``micro_batch`` of TorchScorer.
    """

    file_parameters = ("path",)
    kind: type[PreparedNetwork]

    def __init__(self, path: str, precision: str = "float32", **options: Any):
        model = self.kind.load(path)
        super().__init__(model, files=[path], precision=precision, **options)
        self.size = model.sizes["sample_size"]

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels."""
        pixels = resized(pixels, self.size)
        with autocast(self.dtype, pixels.device):
            return self.model(pixels).to(pixels.dtype)

    @classmethod
    def without_weights(cls, params: Mapping[str, Any], image_size: int, device: str) -> TorchScorer:
        """The network of the sizes that its file has, or that the stage ``prepare`` will give it."""
        sizes = cls.kind.sizes_in(params.get("path") or "") or {"sample_size": image_size}
        with torch.device("meta"):
            model = cls.kind(**sizes)
        scorer = cls.on_meta(model, params, device)
        scorer.size = model.sizes["sample_size"]
        return scorer


@register("preference")
class Preference(_Prepared):
    """Which of two portraits a simulated person prefers, whatever their captions: log-odds, without a zero of its own.

    Bright, centred, upright, sharp and clean portraits are preferred.
    """

    prepared_as = "preference"
    kind = PreferenceModel


@register("quality")
class Quality(_Prepared):
    """How little a portrait is degraded, whatever its caption: 1 for a clean one, in (0, 1)."""

    prepared_as = "quality"
    kind = QualityModel

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B] in (0, 1), differentiable in pixels."""
        return super().rewards(pixels, prompts).sigmoid()
