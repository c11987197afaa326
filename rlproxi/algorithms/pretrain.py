"""Pre-training by proximal matching: a loss from images and captions, and the learning-rate plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.loading import Config
from ..data import cache as cached
from ..data import faces
from ..models.autoencoder import Autoencoder
from ..models.loading import build_denoiser
from ..models.preconditioning import Preconditioned
from ..models.text import TextEncoder, TextStates
from ..models.text_stacks import CheckpointText
from ..proximal.matching import TimeTable, corrupt, level_weight, looks_for_mode, matching_loss, matching_target
from ..proximal.operator import Denoiser
from ..seeds import Purpose, generator, rng
from .base import Update


@dataclass
class MatchingBatch:
    """One rank's share of a step: images x_0 [B, C, H, W] in [-1, 1], or latents, with their encoded captions."""

    step: int
    images: Tensor
    text: TextStates
    rank: int
    denoiser: Denoiser


class Matching:
    """The loss object of pre-training.

    Every draw is named by (seed, step, micro-batch), so a resumed run repeats it.
    """

    def __init__(self, config: Config):
        s = config.sampler
        self.settings, self.schedule, self.seed = config.pretrain, config.schedule.build(), config.run.seed
        self.times = TimeTable(self.schedule, self.settings.candidates, s.name, s.start_time, s.grid)
        self._means: dict[float | None, float] = {}

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.settings.steps

    def updates(self, batch: MatchingBatch) -> Iterator[Update]:
        """The step's one update."""
        losses = self.losses(batch.denoiser, batch.images, batch.text, batch.step, batch.rank)
        yield Update("policy", self.lr(batch.step), losses)

    def zeta(self, step: int) -> float | None:
        """None in the L1 phase, then the zetas in equally long phases; infinite where the loss is the square error."""
        s = self.settings
        if s.loss == "square":
            return math.inf
        first = round(s.l1_fraction * s.steps)
        if step < first or not s.zetas:
            return None
        phase = (step - first) * len(s.zetas) // max(1, s.steps - first)
        return s.zetas[min(phase, len(s.zetas) - 1)]

    def weight(self, t: Tensor, lam: Tensor, zeta: float | None) -> Tensor:
        """The weight of each draw, [B]. Its mean over all draws is 1, so that it leaves the learning rate as it is."""
        if zeta not in self._means:
            every = self._raw_weight(torch.from_numpy(self.times.t), torch.from_numpy(self.times.lam), zeta)
            self._means[zeta] = float((every.numpy() * self.times.probability).sum())
        return self._raw_weight(t, lam, zeta) / self._means[zeta]

    def _raw_weight(self, t: Tensor, lam: Tensor, zeta: float | None) -> Tensor:
        s = self.settings
        if s.weight == "level" and s.target != "noise" and not looks_for_mode(zeta):
            return level_weight(self.schedule, t, lam, s.lam_power, zeta)
        return lam**s.lam_power

    def lr(self, step: int) -> float:
        """Linear warm-up, constant, then cosine to 3 % of the peak."""
        s = self.settings
        warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
        begin = s.decay_from * s.steps
        through = max(0.0, (step - begin) / max(1.0, s.steps - begin))
        return s.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, through))))

    def losses(
        self, denoiser: Denoiser, images: Tensor, text: TextStates, step: int, rank: int = 0
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """One loss for each micro-batch of this rank's images [B, C, H, W] in [-1, 1].

        A micro-batch is named by its place in the global batch: two ranks draw what one rank would.
        """
        size = self.settings.micro_batch_size or len(images)
        first = rank * len(images) // size
        for index, start in enumerate(range(0, len(images), size)):
            name = (self.seed, Purpose.PRETRAIN, step, first + index)
            part = slice(start, start + size)
            x0 = images[part]
            t, lam = (column.to(x0.device) for column in self.times.draw(rng(*name), len(x0)))
            noise = torch.randn((2, *x0.shape), generator=generator(*name)).to(x0.device)
            y = corrupt(self.schedule, x0, t, lam, noise[0], noise[1])
            zeta = self.zeta(step)
            target = matching_target(self.settings.target != "noise", zeta, self.schedule, y, x0, t, lam, noise[1])
            each = matching_loss(denoiser(y, t, lam, text[part]), target, zeta)
            loss = (self.weight(t, lam, zeta) * each).mean()
            yield loss, {"loss": loss.item()}


def start_denoiser(config: Config, samples: Tensor) -> Preconditioned:
    """A new network to pre-train, its preconditioning fitted to samples [B, C, H, W]: pixels in [-1, 1], or latents."""
    denoiser = build_denoiser(config)
    denoiser.gaussian.fit(samples)
    return denoiser


def first_samples(config: Config, vae: Autoencoder | None, cache: str | None, count: int = 2048) -> Tensor:
    """Samples [B, C, H, W] of the data for ``start_denoiser``: the first portraits, or the first rows of ``cache``."""
    if cache is not None:
        return torch.from_numpy(cached.first_samples(config, Path(cache), count))
    source, indices = faces.collection(config.run.seed, "pretrain"), np.arange(count if vae is None else count // 8)
    images, _, _ = faces.batch(source, indices, config.data.size, config.data.hand_fraction, config.data.degraded)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels if vae is None else vae.encode(pixels)


def drop_captions(captions: list[str], probability: float, seed: int, step: int, rank: int = 0) -> list[str]:
    """The captions, each replaced by '' with the given probability.

    The draw is named by (seed, step) and the row of the global batch, of which every rank holds equally many.
    """
    first = rank * len(captions)
    dropped = rng(seed, Purpose.CAPTION_DROPOUT, step).random(first + len(captions))[first:] < probability
    return ["" if d else c for c, d in zip(captions, dropped, strict=True)]


def conditioning(
    encoder: TextEncoder | CheckpointText,
    batch: Mapping[str, np.ndarray],
    captions: list[str],
    pixels: tuple[int, int],
    device: torch.device,
) -> TextStates:
    """The conditioning of a batch: its captions, some of them dropped, and SDXL's six sizes where the data have them.

    The captions are encoded, or read from the cache's columns text_states, text_pooled and text_mask. The sizes come
    from the column size [B, 4] (original height and width, crop top and left) and from ``pixels``, the images' height
    and width.
    """

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.array(batch[name])).to(device).float()

    if "text_states" in batch:
        text = TextStates(column("text_states"), column("text_pooled"), column("text_mask"))
        null = encoder.null_like(text)
        dropped = torch.tensor([caption == "" for caption in captions], device=device)
        pick = lambda a, b: torch.where(dropped.reshape(-1, *[1] * (a.dim() - 1)), b, a)  # noqa: E731
        text = TextStates(pick(text.states, null.states), pick(text.pooled, null.pooled), pick(text.mask, null.mask))
    else:
        text = encoder.encode(captions)
    if "size" in batch:
        size = column("size")
        text = replace(text, time_ids=torch.cat([size, size.new_tensor([pixels]).expand(len(size), -1)], 1))
    return text
