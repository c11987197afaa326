"""One protocol and one registry for rewards.

A scorer takes uint8 images with their prompts and returns float32 scores, one for each image. A score that
cannot be had is an error, never a 0: ``checked_scores`` turns wrong answers into ``RewardError``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor, nn

from ..files import sha256
from ..models.precision import compute_dtype


class RewardError(RuntimeError):
    """A scorer failed or returned something that is no score."""


class Scorer(Protocol):
    """What a reward is: anything with this method, built from typed keyword parameters."""

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3], prompts B strings -> float32 [B], higher is better."""
        ...


class TorchScorer(ABC):
    """A scorer that is a network of pixels, with gradients to them.

    A subclass loads its network in ``__init__``, hands it to this one's, and defines ``rewards``. Pre-processing
    belongs into ``rewards``, so that ``score`` and a gradient see the same images.

    Args:
        model: the network; frozen, in evaluation mode, moved to ``device``.
        files: the checkpoint's files: ``provenance`` hashes them.
        device: None is the first GPU that is visible, else the CPU.
        precision: of the network: auto (bfloat16 where the chip has it), float32 or bfloat16. Scores are made from
            its features in float32.
        micro_batch: images of one forward in ``score``; bounds the memory, changes nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        files: Sequence[str | Path] = (),
        device: str | None = None,
        precision: str = "auto",
        micro_batch: int = 32,
    ):
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}; it must be at least 1")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = compute_dtype(precision, self.device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.files = [Path(file) for file in files]
        self.micro_batch = micro_batch

    @abstractmethod
    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels float32 [B, 3, H, W] in [0, 1] of any size, on ``device`` -> float32 [B], differentiable in pixels."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3] -> float32 [B], without gradient, ``micro_batch`` images at a time."""
        parts = []
        with torch.no_grad():
            for i in range(0, len(images), self.micro_batch):
                part = slice(i, i + self.micro_batch)
                parts.append(self.rewards(to_pixels(images[part], self.device), list(prompts[part])).float().cpu())
        return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def to_pixels(images: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def hold_in(dtype: torch.dtype, *modules: nn.Module) -> None:
    """Casts the weights of matrix products and convolutions to ``dtype``, as autocast would at every call: the same
    results in half the memory. For float32 it changes nothing."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(dtype)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """(the different prompts in order, the place of each prompt among them): a group's text is encoded once."""
    places: dict[str, int] = {}
    index = [places.setdefault(prompt, len(places)) for prompt in prompts]
    return list(places), index


def provenance(scorer: Scorer) -> dict[str, str]:
    """What the run log keeps of a scorer: its class, and the SHA-256 of each checkpoint file that it loaded."""
    facts = {"class": f"{type(scorer).__module__}.{type(scorer).__qualname__}"}
    for file in getattr(scorer, "files", ()):
        facts[str(file)] = sha256(file)
    return facts


_REGISTRY: dict[str, Callable[..., Scorer]] = {}


def register(name: str):
    """Class decorator: makes a scorer known by ``name`` in the config."""

    def add(cls):
        _REGISTRY[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The registered scorers."""
    return sorted(_REGISTRY)


def is_differentiable(name: str) -> bool:
    """Whether a registered scorer has gradients to its pixels."""
    kind = _REGISTRY.get(name)
    return isinstance(kind, type) and issubclass(kind, TorchScorer)


def build(name: str, params: dict[str, Any] | None = None) -> Scorer:
    """Makes a scorer. Raises ValueError for an unknown name, or parameters that it does not take."""
    params = checked_params(name, params or {})
    return _REGISTRY[name](**params)


def checked_params(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as a registered scorer's constructor types them, without building it.

    Raises ValueError for an unknown scorer, and for a parameter that it does not take, one that is missing, or a value
    of another type.
    """
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"reward {name!r} is unknown; {hint}Known: {', '.join(names())}")
    schema = _schema(_REGISTRY[name])
    try:
        return {key: value for key, value in schema.model_validate(params) if key in params}
    except ValidationError as error:
        told = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                close = difflib.get_close_matches(key, list(schema.model_fields), n=1)
                told.append(
                    f"it takes no {key!r}"
                    + (
                        f", did you mean {close[0]!r}?"
                        if close
                        else f"; it takes {', '.join(schema.model_fields) or 'none'}"
                    )
                )
            elif item["type"] == "missing":
                told.append(f"{key!r} is missing")
            else:
                told.append(f"{key} = {item['input']!r}: {item['msg']}")
        raise ValueError(f"reward {name!r} cannot be built from params {params}: {'; '.join(told)}") from None


def parameters(name: str) -> list[str]:
    """The names of the parameters that a registered scorer takes."""
    return list(_schema(_REGISTRY[name]).model_fields)


def _schema(cls: type) -> type[BaseModel]:
    """A pydantic model of a constructor's parameters; ``**options`` are those of the next class in line."""
    fields: dict[str, Any] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        hints, signature = get_type_hints(owner.__init__), inspect.signature(owner.__init__).parameters.values()
        for p in list(signature)[1:]:
            if p.kind is not p.VAR_KEYWORD and p.name not in fields and p.name not in _INTERNAL:
                fields[p.name] = (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            break
    return create_model(
        f"{cls.__name__}Params",
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()),
        **fields,
    )


#: What a subclass hands to TorchScorer, and no user.
_INTERNAL = ("model", "files")


def checked_scores(
    scorer: Scorer, name: str, images: np.ndarray, prompts: list[str], partial: bool = False
) -> np.ndarray:
    """The scorer's float32 scores [B]; RewardError if it raises, or returns NaN, Inf or the wrong shape.

    With ``partial`` scores that are NaN or infinite come back as NaN, a missing score, unless all of them are.
    """
    try:
        scores = np.asarray(scorer.score(images, prompts), np.float32)
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(images),):
        raise RewardError(f"reward {name!r} returned shape {scores.shape} for {len(images)} images")
    finite = np.isfinite(scores)
    if partial and finite.any():
        return np.where(finite, scores, np.float32("nan"))
    if not finite.all():
        raise RewardError(
            f"reward {name!r} returned {int((~finite).sum())} scores that are NaN or infinite for {prompts[0]!r}"
        )
    return scores


@register("python")
class FunctionReward:
    """One's own function ``package.module:function``, called with (images uint8 [B, H, W, 3], prompts).

    Replicas import it: the module must be installed, on PYTHONPATH, or in the folder the run is started from.
    """

    def __init__(self, function: str):
        module, colon, attribute = function.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"reward function {function!r} is not of the form package.module:function")
        try:
            self.function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises while it is imported
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"reward function {function!r} cannot be imported: {told}") from None
        if not callable(self.function):
            raise ValueError(f"reward function {function!r} is a {type(self.function).__name__}, not a function")

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return np.asarray(self.function(images, prompts), np.float32)
