"""From a scorer's name in the config to its class, its parameters and the scorer itself."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from .base import Scorer, ScorerFacts, TorchScorer, parameter_schema

Kind = TypeVar("Kind", bound=type)

_REGISTERED: dict[str, type] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: makes a scorer known by ``name`` in the config."""

    def add(kind: Kind) -> Kind:
        _REGISTERED[name] = kind
        return kind

    return add


def names() -> list[str]:
    """The registered scorers, in alphabetical order; imports every module of this package first."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return sorted(_REGISTERED)


def get(name: str) -> type:
    """The class of a scorer: a registered name, or a class of one's own as ``package.module:Class``.

    Raises ValueError for an unknown name, a class that cannot be imported, and one that is no scorer.
    """
    if name not in _REGISTERED and ":" not in name and name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"reward {name!r} is unknown; {hint}Known: {', '.join(names())}, or a class as package.module:Class"
        )
    if name in _REGISTERED:
        return _REGISTERED[name]
    kind = imported("reward", name)
    if not (isinstance(kind, type) and callable(getattr(kind, "score", None))):
        raise ValueError(f"reward {name!r} is not a class with a method score(images, prompts)")
    return kind


def imported(what: str, name: str) -> Any:
    """The object that ``package.module:object`` names. Raises ValueError, which begins with ``what`` and the name."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{what} {name!r} is not of the form package.module:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        message = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{what} {name!r} cannot be imported: {message}; it must be installed or on PYTHONPATH"
        ) from None


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
