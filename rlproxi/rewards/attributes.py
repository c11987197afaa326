"""The attribute classifier of the embedded portraits: a reward that can be checked word by word.

Two of these are trained apart, on other seeds: one is the training reward, one the held-out
judge, which nothing ever optimises.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.faces import ATTRIBUTES, labels, parse_caption
from .base import register

HEADS = [len(values) for values in ATTRIBUTES.values()]


class AttributeClassifier(nn.Module):
    """[B, 3, H, W] float in [0, 1] -> logits [B, sum of all attributes' value counts].

    Saved as one safetensors file that carries its two sizes; it needs nothing but torch, so a reward replica
    starts quickly.
    """

    def __init__(self, sample_size: int = 32, width: int = 32):
        super().__init__()
        self.sizes = {"sample_size": sample_size, "width": width}
        w = width
        self.features = nn.Sequential(
            nn.Conv2d(3, w, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(w, w, 3, padding=1), nn.GroupNorm(8, w), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.GroupNorm(8, 2 * w), nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 3, stride=2, padding=1), nn.SiLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * w * (sample_size // 8) ** 2, 128), nn.SiLU(),
                                  nn.Linear(128, sum(HEADS)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features((2 * pixels - 1).contiguous(memory_format=torch.channels_last)))

    def save(self, file: str | Path) -> None:
        """Writes the weights to ``file`` (.safetensors); its folder is made."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, file, metadata={key: str(value) for key, value in self.sizes.items()})

    @classmethod
    def load(cls, file: str | Path) -> "AttributeClassifier":
        """Raises FileNotFoundError, or ValueError naming a file that is damaged or holds something else."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"classifier {str(file)!r} is missing: the stage 'prepare' makes it, or name one "
                                    "with the reward's params.path")
        try:
            with safe_open(file, framework="pt") as stored:
                model = cls(**{key: int(value) for key, value in stored.metadata().items()})
                model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})
        except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a usable attribute classifier: {error}") from None
        return model.eval()


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


class _AttributeScorer:
    """Loads a classifier and compares an image with what its prompt claims."""

    def __init__(self, path: str):
        self.model = AttributeClassifier.load(path)

    def _inputs(self, images: np.ndarray, prompts: list[str]) -> tuple[Tensor, Tensor]:
        claims = np.stack([labels(parse_caption(p)) for p in prompts])
        silent = [p for p, c in zip(prompts, claims) if (c < 0).all()]
        if silent:
            raise ValueError(f"prompt {silent[0]!r} names none of the attributes {', '.join(ATTRIBUTES)}")
        pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
        return pixels, torch.from_numpy(claims)


@register("attributes")
class AttributeReward(_AttributeScorer):
    """Mean over the claimed attributes of the probability of the claimed value, in [0, 1].

    Averaged over ``copies`` noised and blurred copies of each image, which takes away the
    fine textures that would otherwise be the cheapest way to please a small classifier. The noise is
    the same for every image, so a score depends on nothing but the image.
    """

    def __init__(self, path: str, copies: int = 4, noise: float = 0.1):
        super().__init__(path)
        self.copies = copies
        self.noise = noise

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        pixels, claims = self._inputs(images, prompts)
        shape = (max(1, self.copies), *pixels.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * (self.noise if self.copies else 0)
        total = torch.zeros(len(pixels))
        for i, n in enumerate(noise):
            view = blur(pixels) if i % 2 else pixels
            total += attribute_probabilities(self.model(view + n), claims).nanmean(1)
        return (total / len(noise)).numpy()


@register("judge")
class AttributeJudge(_AttributeScorer):
    """Held-out accuracy: the share of the claimed attributes that the classifier finds as claimed."""

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return self.details(images, prompts)["all"]

    @torch.no_grad()
    def details(self, images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """For each attribute [B]: 1 right, 0 wrong, NaN not claimed; ``all`` is their mean."""
        pixels, claims = self._inputs(images, prompts)
        correct = attribute_correct(self.model(pixels), claims)
        columns = {name: correct[:, i].numpy() for i, name in enumerate(ATTRIBUTES)}
        return {**columns, "all": correct.nanmean(1).numpy()}
