"""torch generators as names of noise: what a diffusers user passes, and what ``NamedNoise`` takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, prompts: int, each: int) -> list[int]:
    """A seed for each of prompts * each images. Raises ValueError for a list of another length.

    A generator is a name here, not a source of noise. The noise is drawn on the CPU from the seed, so an image is the
    same on every device and in every batch. The generator is advanced, so that using it again gives other images.
    """
    if generator is None:
        return torch.randint(2**31, (prompts * each,)).tolist()
    if isinstance(generator, torch.Generator):
        first = generator.initial_seed()
        if not _draw(generator):
            return [first + j for j in range(each)] * prompts
        return torch.randint(2**31, (prompts * each,), generator=generator, device=generator.device).tolist()
    if len(generator) != prompts * each:
        raise ValueError(f"{len(generator)} generators for {prompts * each} images: give one for each, or a single one")
    return [seed for one in generator for seed in seeds_of(one, 1, 1)]


def _draw(generator: torch.Generator) -> bool:
    """Draws a number; whether any had been drawn before."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    used = not torch.equal(fresh.get_state(), generator.get_state())
    torch.rand(1, generator=generator, device=generator.device)
    return used
