"""The request that a rollout actor gets. Light to import: the conductor needs it, and no network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..seeds import Purpose


@dataclass(frozen=True)
class SampleRequest:
    """A micro-batch of whole groups, the unit that is sampled and replayed in one shape.

    Args:
        purpose, step: name its noise, with the prompts' indices; see ``seeds.Purpose``.
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
            (seed, Purpose[self.purpose.upper()], self.step, index, j, *more)
            for index in self.indices
            for j in range(self.group_size)
        ]


def split_request(request: SampleRequest, groups: int) -> list[SampleRequest]:
    """Cut a request into pieces of at most ``groups`` groups."""
    return [
        replace(request, prompts=request.prompts[i : i + groups], indices=request.indices[i : i + groups])
        for i in range(0, len(request.prompts), groups)
    ]
