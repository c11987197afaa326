"""Section ``guards``: which updates are skipped, and which warnings a run gives (docs/guards.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import Section


class Guards(Section):
    """Checks at the learner's start and in every update (docs/guards.md)."""

    skips_in_a_row: int = Field(
        3,
        ge=1,
        description="After so many skipped updates of one network in a row (NaN, Inf, or a ratio out of bounds), "
        "on_nonfinite is done.",
    )
    on_nonfinite: Literal["rollback", "stop"] = Field(
        "rollback", description="Go back to the last good checkpoint with a lower learning rate, or stop the run."
    )
    lr_factor: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Factor of a rollback on the stage's learning rates, for the rest of the stage.",
    )
    max_rollbacks: int = Field(3, ge=0, description="Rollbacks of a stage; one more stops the run.")
    max_log_ratio: float | None = Field(
        10.0,
        gt=0,
        description="An update whose largest |log-ratio| is above this is skipped (10: a ratio of 22,000). null: no "
        "bound.",
    )
    max_clip_fraction: float | None = Field(
        None, gt=0, le=1, description="An update with a larger share of clipped ratios is skipped. null: no bound."
    )
    on_ratio: Literal["skip", "stop"] = Field(
        "skip", description="Beyond these bounds: the update is skipped, or the run stops."
    )
    on_mismatch: Literal["warn", "stop"] = Field(
        "warn",
        description="Where rollout and learner disagree (first ratios off 1 by more than the algorithm's "
        "first_ratio_tolerance): warn, or stop the run.",
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
    on_flat: Literal["warn", "stop"] = Field("warn", description="Warn, or stop the run.")
    falling_window: int | None = Field(
        20,
        ge=5,
        description="Warn where the training reward's median over so many iterations has been clearly below its best "
        "for two such windows in a row. null: never.",
    )
