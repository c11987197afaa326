"""Section ``rl``, which all algorithms share, and what a config asks of an algorithm's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..registry import Registry
from .section import Section


class RL(Section):
    """What every algorithm shares. An iteration is a set of prompts, their samples, and the updates on them."""

    steps: int = Field(100, ge=1, description="Iterations.")
    prompts_per_step: int = Field(16, ge=1, description="Prompts in one iteration, over all ranks.")
    group_size: int = Field(1, ge=1, description="Samples of one prompt.")
    groups_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="Prompts whose samples share one forward; null: as many as the ranks can share evenly "
        "with at most 32 images in each (at least one prompt's).",
    )
    updates_per_step: int = Field(1, ge=1, description="Updates in an iteration, each on its share of the prompts.")
    lr: float = Field(2e-5, gt=0, description="Learning rate after warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Linear warm-up, in iterations.")
    decay_from: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the iterations after which the learning rate falls linearly to 5 %: the noise of the "
        "last updates is averaged away.",
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="AdamW's betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, towards 0.")
    anchor: float = Field(
        0.0, ge=0, description="Weight of ||theta - theta_0||^2 in the loss: decay towards the start."
    )
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the averaged weights, which are then evaluated and saved; 0: none."
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Weight versions a group may be behind. 0 is synchronous; an algorithm that samples on "
        "the learner takes only 0.",
    )
    max_bytes_in_flight: int = Field(2 * 1024**3, ge=1, description="Bound on sampled but untrained data, in bytes.")
    checkpoint_every: int = Field(20, ge=1, description="Iterations between checkpoints.")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of whole groups in one iteration, over all ranks."""
        return self.prompts_per_step // self.groups

    @property
    def groups(self) -> int:
        """``groups_per_micro_batch`` of a whole config, which fills it in where it is null."""
        assert self.groups_per_micro_batch is not None, "only a whole config knows how many groups fit"
        return self.groups_per_micro_batch

    @property
    def rows(self) -> int:
        """Samples in one micro-batch."""
        return self.groups * self.group_size


class Params(Section):
    """Settings of an algorithm of your own (run.algorithm = package.module:Class) that declares none itself."""

    params: dict[str, Any] = Field({}, description="Whatever that class reads.")


class AlgorithmClass:
    """What configs, pages and warnings ask of an algorithm's class; ``algorithms.base.Algorithm`` is the rest of it."""

    #: The class of the algorithm's own section.
    Settings: ClassVar[type[Section]] = Params
    #: Sections that it shares with some other algorithms, by name.
    shared: ClassVar[Mapping[str, type[Section]]] = {}
    #: Values of ``rl`` that differ from its defaults, where a config does not give them.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: Advice in warnings: what keeps the policy nearer to its start, beside a lower rl.lr.
    hold_back: ClassVar[str] = "raise rl.anchor"
    #: Advice in warnings: what makes the rewards of a group differ.
    spread: ClassVar[str] = "a larger rl.group_size"
    #: The key of its section that bounds |ratio - 1| before the first update; None: it has no ratios.
    ratio_tolerance: ClassVar[str | None] = None
    #: Metrics that the report draws under "Is the policy update sound?".
    charts: ClassVar[tuple[str, ...]] = ("loss",)

    @classmethod
    def check_config(cls, config: Any) -> None:  # a ``loading.Config``, which is made of what stands here
        """Raise ValueError, naming the key and the remedy, where the config cannot be trained with this algorithm."""


class Unavailable(AlgorithmClass):
    """Stands for a class that cannot be imported here. Its run can be evaluated; the preflight refuses to train it."""

    class Settings(Section, extra="allow"):
        """Whatever the config holds."""


#: Algorithms by ``run.algorithm``. Each registers itself in its own module.
ALGORITHMS: Registry[type[AlgorithmClass]] = Registry(
    "run.algorithm", "rlproxi.algorithms", "rlproxi.algorithms.base:Algorithm"
)


def configured(algorithm: str) -> type[AlgorithmClass]:
    """The class of a ``run.algorithm``, ``Unavailable`` for one at a path. Raises ValueError for an unknown name."""
    try:
        return ALGORITHMS.get(algorithm)
    except ValueError:
        if ":" in algorithm:
            return Unavailable
        raise


def section_name(algorithm: str) -> str:
    """The section with the settings of an algorithm: its name, or ``custom`` for ``package.module:Class``."""
    return "custom" if ":" in algorithm else algorithm


def algorithm_sections(algorithm: str) -> dict[str, type[Section]]:
    """The sections of all registered algorithms, and ``custom`` as ``algorithm`` defines it.

    Raises ValueError where ``algorithm`` is an unknown name.
    """
    found: dict[str, type[Section]] = {}
    for name in ALGORITHMS.names():
        kind = ALGORITHMS.get(name)
        found |= {**kind.shared, name: kind.Settings}
    kind, own = configured(algorithm), section_name(algorithm)
    return {**found, "custom": Params, **kind.shared, own: kind.Settings}
