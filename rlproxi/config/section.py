"""What every section of a config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Amounts = dict[str, Annotated[float, Field(gt=0)]]
# The grid of every count is computed when a config is read, so a count is bounded by the times of a discrete model.
StepCount = Annotated[int, Field(ge=1, le=10_000)]


class Section(BaseModel):
    """A section of a config. Unknown keys, and numbers that are infinite or NaN, are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
