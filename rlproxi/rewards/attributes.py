"""The attribute classifier of the embedded portraits: a reward that can be checked word by word.

Two of these are trained apart, on other seeds: one is the training reward, one the held-out
judge, which nothing ever optimises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.faces import ATTRIBUTES, labels, parse_caption
from ..models.precision import autocast
from .base import ScorerFacts, TorchScorer, to_pixels
from .prepared import PreparedNetwork
from .registry import register

HEADS = [len(values) for values in ATTRIBUTES.values()]


class AttributeClassifier(PreparedNetwork):
    """[B, 3, H, W] float in [0, 1] -> logits [B, sum of all attributes' value counts]."""

    title = "attribute classifier"

    def __init__(self, sample_size: int = 32, width: int = 32):
        super().__init__(sample_size=sample_size, width=width)
        w = width

        def halved(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]

        def mixed(channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.SiLU()]

        stages = [halved(3, w), mixed(w), halved(w, 2 * w), mixed(2 * w), halved(2 * w, 2 * w)]
        self.features = nn.Sequential(*(layer for stage in stages for layer in stage))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * w * (sample_size // 8) ** 2, 128), nn.SiLU(), nn.Linear(128, sum(HEADS))
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1] -> logits [B, sum of all attributes' value counts]."""
        return self.head(self.features((2 * pixels - 1).contiguous(memory_format=torch.channels_last)))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over attributes; labels [B, 8] int64, -1 is ignored."""
    parts = logits.split(HEADS, 1)
    return torch.stack([F.cross_entropy(p, labels[:, i], ignore_index=-1) for i, p in enumerate(parts)]).mean()


def attribute_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """P(claimed value) of each attribute, [B, 8]; NaN where the caption claims nothing (label -1)."""
    columns = [p.softmax(1).gather(1, labels[:, i : i + 1].clamp(min=0)) for i, p in enumerate(logits.split(HEADS, 1))]
    return torch.cat(columns, 1).masked_fill(labels < 0, float("nan"))


def attribute_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the most likely value is the claimed one, [B, 8]; NaN where nothing is claimed."""
    columns = [(p.argmax(1) == labels[:, i]).float() for i, p in enumerate(logits.split(HEADS, 1))]
    return torch.stack(columns, 1).masked_fill(labels < 0, float("nan"))


def blur(pixels: Tensor) -> Tensor:
    """A 3x3 binomial blur with reflected borders, [B, C, H, W]."""
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=pixels.dtype, device=pixels.device)
    kernel = (kernel[:, None] * kernel[None]).expand(pixels.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), kernel, groups=pixels.shape[1])


def claims_of(prompts: Sequence[str]) -> Tensor:
    """What prompts claim: [B, 8] int64 class indices, -1 where nothing is said; ValueError for one that is silent."""
    claims = np.stack([labels(parse_caption(prompt)) for prompt in prompts])
    silent = [prompt for prompt, claim in zip(prompts, claims, strict=True) if (claim < 0).all()]
    if silent:
        raise ValueError(f"prompt {silent[0]!r} names none of the attributes {', '.join(ATTRIBUTES)}")
    return torch.from_numpy(claims)


def resized(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size], which is all that a classifier knows; untouched where it fits already."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


@register("attributes")
class AttributeReward(TorchScorer):
    """Mean over the claimed attributes of the probability of the claimed value, in [0, 1].

    Averaged over ``copies`` noised and blurred copies of each image, which takes away the
    fine textures that would otherwise be the cheapest way to please a small classifier. The noise is
    the same for every image, so a score depends on nothing but the image.

    Args:
        path: the classifier's safetensors file.
        copies: views of each image; every second one is blurred. 0 is the image as it is.
        noise: standard deviation of the noise, in pixels of [0, 1].
        options: ``device``, ``precision`` (float32 here: the classifier is small) and ``micro_batch`` of TorchScorer.
    """

    file_parameters = ("path",)
    prepared_as = "reward"
    model: AttributeClassifier

    def __init__(self, path: str, copies: int = 4, noise: float = 0.1, precision: str = "float32", **options: Any):
        model = AttributeClassifier.load(path)
        super().__init__(model, files=[path], precision=precision, **options)
        self.size = model.sizes["sample_size"]
        self.copies = copies
        self.noise = noise
        self._drawn: dict[tuple[int, ...], Tensor] = {}

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] -> float32 [B], differentiable in pixels.

        Raises ValueError for a prompt that names no attribute.
        """
        pixels, claims = resized(pixels, self.size), claims_of(prompts).to(pixels.device)
        views = [pixels, blur(pixels)] if self.copies > 1 else [pixels]
        noise = self._noise(pixels.shape[1:])
        total = pixels.new_zeros(())
        for i, n in enumerate(noise):
            with autocast(self.dtype, pixels.device):
                logits = self.model(views[i % 2] + n)
            total = total + attribute_probabilities(logits.to(pixels.dtype), claims).nanmean(1)
        return total / len(noise)

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        """[max(1, copies), *shape]: drawn on the CPU, so that every device gets the same, and kept."""
        if shape not in self._drawn:
            size, scale = (max(1, self.copies), *shape), self.noise if self.copies else 0
            drawn = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale
            self._drawn[shape] = drawn.to(self.device)
        return self._drawn[shape]

    @classmethod
    def check_prompt(cls, prompt: str) -> None:
        """Raises ValueError for a prompt that names no attribute."""
        claims_of([prompt])

    @classmethod
    def without_weights(cls, params: Mapping[str, Any], image_size: int, device: str) -> AttributeReward:
        """The classifier of the sizes that its file has, or that the stage ``prepare`` will give it."""
        sizes = AttributeClassifier.sizes_in(params.get("path") or "") or {"sample_size": image_size}
        with torch.device("meta"):
            model = AttributeClassifier(**sizes)
        scorer = cls.on_meta(model, params, device)
        scorer.size, scorer._drawn = model.sizes["sample_size"], {}
        return scorer


@register("judge")
class AttributeJudge(ScorerFacts):
    """Held-out accuracy: the share of the claimed attributes that the classifier finds as claimed.

    No TorchScorer: which value is the most likely one has no gradient. Takes ``path``, and ``device``, ``precision``
    and ``micro_batch`` with the meaning that they have there.
    """

    file_parameters = ("path",)
    prepared_as = "judge"

    def __init__(self, path: str, device: str | None = None, precision: str = "float32", micro_batch: int = 256):
        reward = AttributeReward(path, copies=0, precision=precision, device=device, micro_batch=micro_batch)
        self.model, self.size, self.files = reward.model, reward.size, reward.files
        self.device, self.dtype, self.micro_batch = reward.device, reward.dtype, micro_batch

    @classmethod
    def check_prompt(cls, prompt: str) -> None:
        """Raises ValueError for a prompt that names no attribute."""
        claims_of([prompt])

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3] -> float32 [B] in [0, 1]."""
        return self.details(images, prompts)["all"]

    def details(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """For each attribute [B]: 1 right, 0 wrong, NaN not claimed; ``all`` is their mean."""
        parts = [slice(i, i + self.micro_batch) for i in range(0, len(images), self.micro_batch)]
        found = [self._correct(images[part], prompts[part]) for part in parts]
        correct = torch.cat(found) if found else torch.zeros(0, len(ATTRIBUTES))
        columns = {name: correct[:, i].numpy() for i, name in enumerate(ATTRIBUTES)}
        return {**columns, "all": correct.nanmean(1).numpy()}

    @torch.no_grad()
    def _correct(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """[B, 8] float32 on the CPU."""
        claims, pixels = claims_of(prompts), resized(to_pixels(images, self.device), self.size)
        with autocast(self.dtype, self.device):
            logits = self.model(pixels)
        return attribute_correct(logits.float().cpu(), claims)
