"""Pre-training by proximal matching: a loss from images and captions, and the learning-rate plan."""

from __future__ import annotations

import math
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..schema import Pretrain as Settings
from ..data import faces
from ..models.text import TextStates
from ..models.unet import ProximalUNet, build_unet
from ..proximal.matching import TimeTable, corrupt, matching_loss
from ..proximal.operator import Denoiser
from ..proximal.schedule import VPSchedule
from ..seeds import generator, rng
from .prepare import collection


class Matching:
    """The loss object of pre-training.

    Every draw is named by (seed, step, micro-batch), so a resumed run repeats it.
    """

    def __init__(self, settings: Settings, schedule: VPSchedule, times: TimeTable, seed: int):
        self.settings = settings
        self.schedule = schedule
        self.times = times
        self.seed = seed
        # Divided by its mean over the draws, so that the power moves the emphasis and not the learning rate.
        self.lam_scale = float((times.lam**settings.lam_power * times.probability).sum())

    def zeta(self, step: int) -> float | None:
        """None in the L1 phase, then the zetas in equally long phases."""
        first = round(self.settings.l1_fraction * self.settings.steps)
        if step < first or not self.settings.zetas:
            return None
        phase = (step - first) * len(self.settings.zetas) // max(1, self.settings.steps - first)
        return self.settings.zetas[min(phase, len(self.settings.zetas) - 1)]

    def lr(self, step: int) -> float:
        """Linear warm-up, constant, then cosine to 3 % of the peak."""
        s = self.settings
        warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
        begin = s.decay_from * s.steps
        through = max(0.0, (step - begin) / max(1.0, s.steps - begin))
        return s.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, through))))

    def losses(self, denoiser: Denoiser, images: Tensor, text: TextStates, step: int,
               rank: int = 0) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """One loss for each micro-batch of this rank's images [B, C, H, W] in [-1, 1].

        A micro-batch is named by its place in the global batch: two ranks draw what one rank would.
        """
        size = self.settings.micro_batch_size or len(images)
        first = rank * len(images) // size
        for index, start in enumerate(range(0, len(images), size)):
            name = (self.seed, 0x9A7C, step, first + index)
            part = slice(start, start + size)
            x0 = images[part]
            draw = self.times.draw(rng(*name), len(x0))
            noise = torch.randn((2, *x0.shape), generator=generator(*name)).to(x0.device)
            t, lam = draw.t.to(x0.device), draw.lam.to(x0.device)
            y = corrupt(self.schedule, x0, t, lam, noise[0], noise[1])
            each = matching_loss(denoiser(y, t, lam, text[part]), noise[1], self.zeta(step))
            loss = (lam**self.settings.lam_power / self.lam_scale * each).mean()
            yield loss, {"loss": loss.item()}


def start_unet(config: Config) -> ProximalUNet:
    """The network that pre-training starts from: new, with the Gaussian of its preconditioning fitted to the data."""
    unet = build_unet(config)
    images, _, _ = faces.batch(collection(config.run.seed, "pretrain"), np.arange(2048), config.data.size,
                               config.data.hand_fraction)
    unet.gaussian.fit(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return unet


def drop_captions(captions: list[str], probability: float, seed: int, step: int, rank: int = 0) -> list[str]:
    """Captions replaced by '' with the given probability, named by (seed, step) and the row of the global batch;
    every rank holds equally many rows."""
    first = rank * len(captions)
    dropped = rng(seed, 0xD809, step).random(first + len(captions))[first:] < probability
    return ["" if d else c for c, d in zip(captions, dropped)]


class EMA:
    """An exponential moving average of parameters, warmed up: decay_k = min(decay, (1 + k)/(10 + k))."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.values = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]) -> None:
        """``weights``: name -> parameter, the same names."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self.values.items():
            value.lerp_(weights[name].to(value), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.values, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        self.values = {name: state[name].to(value.device, copy=True) for name, value in self.values.items()}
