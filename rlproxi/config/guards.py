"""The section of what is not trained on, and of what a run notices about itself; see ``schema`` and docs/guards.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .sections import Section


class Guards(Section):
    """What is watched at the learner's start and in every update (docs/guards.md)."""

    skips_in_a_row: int = Field(
        3,
        ge=1,
        description="So many skipped updates of one network in a row (NaN, Inf, or a ratio out of bounds) end in what "
        "on_nonfinite says.",
    )
    on_nonfinite: Literal["rollback", "stop"] = Field(
        "rollback", description="Then: back to the last good checkpoint with a lower learning rate, or the run stops."
    )
    lr_factor: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="What a rollback multiplies the stage's learning rates by, for the rest of the stage.",
    )
    max_rollbacks: int = Field(3, ge=0, description="Rollbacks of a stage; where one more would follow, the run stops.")
    max_log_ratio: float | None = Field(
        10.0,
        gt=0,
        description="An update whose largest |log-ratio| is above this is not made (10: a ratio of 22,000). null: no "
        "bound.",
    )
    max_clip_fraction: float | None = Field(
        None, gt=0, le=1, description="An update with a larger share of clipped ratios is not made. null: no bound."
    )
    on_ratio: Literal["skip", "stop"] = Field(
        "skip", description="Beyond these bounds: the update is skipped, or the run stops."
    )
    on_mismatch: Literal["warn", "stop"] = Field(
        "warn",
        description="Where rollout and learner come to disagree (first ratios off 1 by more than "
        "grpo.first_ratio_tolerance): a warning, or the run stops.",
    )
    sampler_tolerance: float = Field(
        0.01,
        gt=0,
        description="How far one noise-free step of the learner's network may be from the deterministic sampler's "
        "at the start, as a share of the output's RMS.",
    )
    flat_iterations: int | None = Field(
        10, ge=1, description="Iterations in a row without a group whose rewards differ, before on_flat. null: never."
    )
    on_flat: Literal["warn", "stop"] = Field("warn", description="Then: a warning, or the run stops.")
    falling_window: int | None = Field(
        20,
        ge=5,
        description="Warn where the training reward's median over so many iterations has been clearly below its best "
        "for two such windows in a row. null: never.",
    )
