"""What a rollout actor is asked for. Light to import: the conductor needs it, and no network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..seeds import Purpose


@dataclass(frozen=True)
class SampleRequest:
    """A micro-batch of whole groups: the unit that is sampled, and replayed, in one shape.

    prompts [P] with the indices that name them; each gives ``group_size`` samples. ``num_steps`` and
    ``guidance_scale`` None: the config's. ``window``: the positions in the plan whose chain is kept;
    ``keep_last``: the last step's input as well.
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

    @property
    def images(self) -> int:
        return len(self.prompts) * self.group_size

    @property
    def rows(self) -> tuple[str, ...]:
        """The prompt of each sample."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.group_size))

    def names(self, seed: int, turn: int = 0) -> list[tuple[int, ...]]:
        """The name of each sample's noise. ``turn`` tells the draws of one iteration apart, where it has several."""
        more = (turn,) if turn else ()
        return [
            (seed, Purpose[self.purpose.upper()], self.step, index, j, *more)
            for index in self.indices
            for j in range(self.group_size)
        ]


def split_request(request: SampleRequest, groups: int) -> list[SampleRequest]:
    """Cuts a request into pieces of at most ``groups`` groups."""
    return [
        replace(request, prompts=request.prompts[i : i + groups], indices=request.indices[i : i + groups])
        for i in range(0, len(request.prompts), groups)
    ]
