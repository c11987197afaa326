"""The schema of one request to ``rlproxi serve``, and its limits. Nothing here knows Ray or the model."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from rlproxi.config.sections import Sampler, Schedule

#: The largest seed: what a JSON number holds exactly in every client.
MAX_SEED = 2**53 - 1
#: Guidance beyond this has no use, and ends in NaN.
MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class Limits:
    """The largest request that is served, and how many are served at once."""

    queue: int = 64  # requests that are accepted and not yet answered
    batch: int = 8  # images in one forward
    wait_ms: float = 20.0  # milliseconds that a batch waits to fill up
    steps: int = 100  # of the sampler
    prompt_chars: int = 2000

    @property
    def body_bytes(self) -> int:
        """Bytes of a request's body: JSON may spell a character in twelve."""
        return 12 * self.prompt_chars + 4096


class ImageRequest(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] | None = None


class Refused(Exception):
    """A request that is not served: its HTTP status, and the message to the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def parse(body: bytes, limits: Limits, sampler: Sampler, schedule: Schedule) -> tuple[str, int, int, float]:
    """A request's body -> (prompt, seed, steps, guidance scale), defaults filled in.

    Raises Refused naming the field, its value and its bound.
    """

    def not_finite(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a JSON number")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=not_finite)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refused(400, f"the body must be a JSON object, not {_short(values)}")
    try:
        request = ImageRequest.model_validate(values)
    except ValidationError as error:
        raise Refused(422, "; ".join(map(_message, error.errors()))) from None
    if len(request.prompt) > limits.prompt_chars:
        raise Refused(422, f"prompt: {len(request.prompt)} characters, at most {limits.prompt_chars} are allowed")
    try:
        request.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(422, "prompt: half of a surrogate pair is no character") from None
    steps = sampler.num_inference_steps if request.steps is None else request.steps
    if request.steps is not None and steps > limits.steps:
        raise Refused(422, f"steps: {steps}, at most {limits.steps} are allowed")
    try:
        sampler.plan(schedule.build(), steps)
    except ValueError as error:
        raise Refused(422, f"steps: {error}") from None
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    guidance = sampler.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return request.prompt, seed, steps, guidance


def _message(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"]) or "body"
    if error["type"] == "extra_forbidden":
        return f"{_short(name)}: unknown field; known are {', '.join(ImageRequest.model_fields)}"
    if error["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: {error['msg']}, not {_short(error['input'])}"


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:  # a value that was just shallow enough to be read
        text = f"a {type(value).__name__} too deep to be shown"
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
