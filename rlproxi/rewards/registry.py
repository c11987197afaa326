"""From a scorer's name in the config to its class, its parameters and the scorer itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..registry import Registry
from .base import Scorer, ScorerFacts, TorchScorer, parameter_schema

SCORERS: Registry[type] = Registry("reward", "rlproxi.rewards")
register, names = SCORERS.register, SCORERS.names


def get(name: str) -> type:
    """The class of a scorer: a registered name, or a class of your own as ``package.module:Class``.

    Raises ValueError for an unknown name, a class that cannot be imported, and one that is no scorer.
    """
    kind = SCORERS.get(name)
    if not (isinstance(kind, type) and callable(getattr(kind, "score", None))):
        raise ValueError(f"reward {name!r} is not a class with a method score(images, prompts)")
    return kind


def find(name: str) -> type | None:
    """As ``get``; None where it raises: the name is unknown, or only a replica's environment has the module."""
    try:
        return get(name)
    except ValueError:
        return None


def facts(name: str) -> type[ScorerFacts]:
    """What a scorer says about itself; the defaults where ``find`` does not find it, or it says nothing."""
    kind = find(name)
    return kind if kind is not None and issubclass(kind, ScorerFacts) else ScorerFacts


def is_differentiable(name: str) -> bool:
    """Whether ``find`` finds a scorer with gradients to its pixels."""
    kind = find(name)
    return kind is not None and issubclass(kind, TorchScorer)


def build(name: str, params: Mapping[str, Any] | None = None) -> Scorer:
    """Makes a scorer. Raises ValueError for an unknown name, or parameters that it does not take."""
    return get(name)(**checked_params(name, params or {}))


def parameters(name: str) -> list[str]:
    """The names of the parameters that a scorer takes. Raises ValueError as ``get``."""
    return list(parameter_schema(get(name)).model_fields)


def checked_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a scorer's constructor types them, without building it.

    Raises ValueError for an unknown scorer, and for a parameter that it does not take, one that is missing, or a value
    of another type.
    """
    schema = parameter_schema(get(name))
    try:
        return {key: value for key, value in schema.model_validate(params) if key in params}
    except ValidationError as error:
        faults = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                close = difflib.get_close_matches(key, list(schema.model_fields), n=1)
                known = f"it takes {', '.join(schema.model_fields) or 'none'}"
                faults.append(f"it takes no {key!r}" + (f", did you mean {close[0]!r}?" if close else f"; {known}"))
            elif item["type"] == "missing":
                faults.append(f"{key!r} is missing")
            else:
                faults.append(f"{key} = {item['input']!r}: {item['msg']}")
        raise ValueError(f"reward {name!r} cannot be built from params {params}: {'; '.join(faults)}") from None
