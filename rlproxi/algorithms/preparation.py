"""Training of the parts that the embedded default builds, because nothing is downloaded.

They are a text encoder, a reward classifier and a held-out judge. Each takes a minute of supervised training on one
or two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..config.loading import Config
from ..data import degradations, faces
from ..models.text import TextEncoder, build_text_encoder
from ..rewards.attributes import HEADS, AttributeClassifier, blur, classification_loss
from ..rewards.preference import PreferenceModel, QualityModel, bradley_terry_loss, quality_loss
from ..seeds import Collection, generator, rng

#: Gets (steps taken, loss).
Progress = Callable[[int, float], None]


def _train(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, loss_of: Callable[[int], Tensor], progress: Progress
) -> None:
    """Take ``steps`` steps on ``loss_of`` each step's number, at a rate that warms up and then falls to 0."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, loss.item())


def train_text_encoder(config: Config, progress: Progress) -> TextEncoder:
    """Train a text encoder whose pooled vector separates every attribute of a caption, and freeze it.

    Linear heads on the pooled output are trained with it and thrown away.
    """
    p, m, seed = config.prepare, config.model, config.run.seed
    source = faces.collection(seed, "text")
    captions = [faces.portrait(source, i, 0.5) for i in range(4096)]
    words = [c.caption for c in captions] + [""]
    encoder = build_text_encoder(words, m.text_dim, m.text_layers, m.text_length, seed)
    model = encoder.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.Linear(m.text_dim, sum(HEADS))

    def loss_of(step: int) -> Tensor:
        chosen = [captions[i] for i in rng(seed, Collection.TEXT, step).integers(len(captions), size=64)]
        ids, mask = encoder.tokenize([c.caption for c in chosen])
        targets = torch.from_numpy(np.stack([faces.labels(c.attributes) for c in chosen]))
        pooled = model(input_ids=ids, attention_mask=mask).pooler_output
        return classification_loss(heads(pooled), targets)

    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=p.lr)
    _train(optimizer, p.lr, p.text_steps, loss_of, progress)
    model.eval().requires_grad_(False)
    return encoder


def train_scorer(config: Config, purpose: str, file: Path, progress: Progress) -> str:
    """Train the network ``purpose`` (reward, judge, preference or quality), save it in ``file``; say how good it is."""
    if purpose == "preference":
        return f"prefers the better of two new portraits in {train_preference(config, file, progress):.0%} of cases"
    if purpose == "quality":
        return f"{train_quality(config, file, progress):.3f} off the quality of new portraits on average"
    return f"{train_classifier(config, purpose, file, progress):.3f} of attributes right on new portraits"


def train_classifier(config: Config, purpose: str, file: Path, progress: Progress) -> float:
    """Train the ``reward`` or the ``judge`` classifier, save it in ``file`` and return its accuracy on new portraits.

    The two differ in their data (other seeds) and in their initial weights. Noise, blur and shifts keep both from
    relying on single pixels.
    """
    p, seed, size = config.prepare, config.run.seed, config.data.size
    source = faces.collection(seed, purpose)
    images, _, labels = faces.batch(source, np.arange(p.samples), size, 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source)
        # torch's stubs lack this overload of `to`.
        model = AttributeClassifier(size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(step: int) -> Tensor:
        draw = rng(source, step)
        index = draw.integers(p.samples, size=p.batch_size)
        pixels = _pixels(images[index])
        blurred = torch.from_numpy(draw.random(len(index)) < 0.3)[:, None, None, None]
        pixels = torch.where(blurred, blur(pixels), pixels)
        strength = torch.from_numpy(draw.random(len(index)).astype(np.float32))[:, None, None, None]
        pixels = pixels + 0.15 * strength * torch.randn(pixels.shape, generator=generator(source, step))
        pixels = pixels.roll(tuple(int(d) for d in draw.integers(-2, 3, size=2)), (2, 3))
        return classification_loss(model(pixels), torch.from_numpy(labels[index]))

    optimizer = torch.optim.AdamW(model.parameters(), lr=p.lr, weight_decay=1e-2)
    _train(optimizer, p.lr, p.classifier_steps, loss_of, progress)
    model.eval()
    model.save(file)
    return _accuracy(model, source, p.samples, size)


def train_preference(config: Config, file: Path, progress: Progress) -> float:
    """Train the preference model, save it in ``file``; return how often it prefers the better of two new portraits."""

    def loss_of(model: nn.Module, pixels: Tensor, strengths: Tensor, draw: np.random.Generator) -> Tensor:
        numbers = torch.from_numpy(draw.random((len(pixels), len(pixels)), np.float32))
        return bradley_terry_loss(model(pixels), strengths, numbers)

    model, pixels, strengths = _train_on_quality(config, "preference", PreferenceModel, loss_of, progress)
    model.save(file)
    with torch.no_grad():
        scores = model(pixels)
    i, j = torch.triu_indices(len(scores), len(scores), 1)
    differ = (strengths[i] - strengths[j]).abs() > 1e-3
    right = (scores[i] > scores[j]) == (strengths[i] < strengths[j])
    return float(right[differ].float().mean())


def train_quality(config: Config, file: Path, progress: Progress) -> float:
    """Train the held-out judge of quality, save it in ``file``; return its mean absolute error on new portraits."""

    def loss_of(model: nn.Module, pixels: Tensor, strengths: Tensor, draw: np.random.Generator) -> Tensor:
        return quality_loss(model(pixels), strengths)

    model, pixels, strengths = _train_on_quality(config, "quality", QualityModel, loss_of, progress)
    model.save(file)
    with torch.no_grad():
        return float((model(pixels).sigmoid() - torch.exp(-strengths)).abs().mean())


def _train_on_quality(config: Config, purpose: str, kind: type, loss_of, progress: Progress):
    """Train a new ``kind`` on portraits of mixed quality; return it with 1024 new portraits and their strengths."""
    p, size = config.prepare, config.data.size
    source = faces.collection(config.run.seed, purpose)

    def drawn(first: int, count: int) -> tuple[Tensor, Tensor]:
        indices = np.arange(first, first + count)
        images, strengths = degradations.degraded(faces.batch(source, indices, size, 0.25)[0], source, indices, 0.85)
        return _pixels(images), torch.from_numpy(np.abs(strengths).sum(1))

    pixels, strengths = drawn(0, p.samples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source)
        model = kind(size).to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        draw = rng(source, step)
        index = torch.from_numpy(draw.integers(p.samples, size=p.batch_size))
        images, more = degradations.spoil(pixels[index], draw)
        return loss_of(model, images, strengths[index] + more, draw)

    optimizer = torch.optim.AdamW(model.parameters(), lr=p.lr, weight_decay=1e-2)
    _train(optimizer, p.lr, p.classifier_steps, loss, progress)
    return model.eval(), *drawn(p.samples, 1024)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def _accuracy(model: AttributeClassifier, source: int, after: int, size: int) -> float:
    images, _, labels = faces.batch(source, np.arange(after, after + 1024), size, 0.5)
    parts = model(_pixels(images)).split(HEADS, 1)
    return float(np.mean([(part.argmax(1).numpy() == labels[:, i]).mean() for i, part in enumerate(parts)]))
