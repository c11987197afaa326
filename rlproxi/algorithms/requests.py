"""The request that a rollout actor gets. Light to import: the conductor needs it, and no network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

#: The purpose's number in the names of noise.
PURPOSES = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class SampleRequest:
    """A micro-batch of whole groups, the unit that is sampled and replayed in one shape.

    Args:
        purpose, step: name its noise, with the prompts' indices; see ``PURPOSES``.
        prompts, indices: [P]; each prompt gives ``group_size`` samples.
        window: the positions in the plan whose chain is kept.
        num_steps, guidance_scale: None: the config's.
        keep_last: whether the last step's input is kept as well.
        same_noise: whether the samples of a group share x_N and the noise before the first action.
    """

    purpose: str
    step: int
    prompts: tuple[str, ...]
    indices: tuple[int, ...]
    group_size: int
    window: tuple[int, ...] = ()
    num_steps: int | None = None
    guidance_scale: float | None = None
    keep_last: bool = False
    same_noise: bool = False

    @property
    def images(self) -> int:
        """The number of samples."""
        return len(self.prompts) * self.group_size

    @property
    def rows(self) -> tuple[str, ...]:
        """The prompt of each sample."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.group_size))

    def names(self, seed: int, turn: int = 0) -> list[tuple[int, ...]]:
        """The name of each sample's noise. ``turn`` distinguishes the draws of an iteration that has several."""
        more = (turn,) if turn else ()
        return [
            (seed, PURPOSES[self.purpose], self.step, index, j, *more)
            for index in self.indices
            for j in range(self.group_size)
        ]


def split_request(request: SampleRequest, groups: int) -> list[SampleRequest]:
    """Cut a request into pieces of at most ``groups`` groups."""
    return [
        replace(request, prompts=request.prompts[i : i + groups], indices=request.indices[i : i + groups])
        for i in range(0, len(request.prompts), groups)
    ]


def no_images(images: np.ndarray) -> np.ndarray:
    """Which samples [B, H, W, 3] are NaN or Inf, bool [B]: those that ``GroupSampler.sample`` has masked."""
    if not isinstance(images, np.ma.MaskedArray):
        return np.zeros(len(images), bool)
    return np.ma.getmaskarray(images)[:, 0, 0, 0]
