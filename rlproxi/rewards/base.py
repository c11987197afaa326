"""The protocol of a reward: uint8 images with their prompts in, one float32 score for each image out.

A score that cannot be had is an error, never a 0: ``checked_scores`` turns wrong answers into ``RewardError``. The
registry, which finds a scorer by its name, is in ``registry``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor, nn

from ..files import sha256
from ..models.precision import compute_dtype


class RewardError(RuntimeError):
    """A scorer failed or returned something that is no score."""


class Scorer(Protocol):
    """A reward: any class with this method that is built from typed keyword parameters."""

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3], prompts B strings -> float32 [B], higher is better."""
        ...


class ScorerFacts:
    """What is known of a scorer before it is built. A scorer that inherits from this class overrides what it knows.

    ``TorchScorer`` inherits from it. A scorer that does not has the values that stand here.
    """

    #: Constructor parameters that name a file, where they are not null. A run checks them before it starts.
    file_parameters: ClassVar[tuple[str, ...]] = ()
    #: The parameter that ``rlproxi score --checkpoint`` fills in; None: the first of ``file_parameters``.
    checkpoint_parameter: ClassVar[str | None] = None
    #: The classifier of the stage ``prepare`` that the parameter ``path`` defaults to; None: the stage makes nothing.
    prepared_as: ClassVar[str | None] = None
    #: Numbers in the weights of the published checkpoint; None: not known before they are loaded.
    published_parameters: ClassVar[int | None] = None

    @classmethod
    def check(cls, params: Mapping[str, Any]) -> None:
        """Raises FileNotFoundError or ValueError for ``params`` that cannot be used; loads no weights."""
        for key in cls.file_parameters if cls.prepared_as is None else ():
            if params.get(key) is not None and not Path(params[key]).exists():
                raise FileNotFoundError(
                    f"{key} {params[key]!r} does not exist: name its file (docs/rewards/ says where it comes from)"
                )

    @classmethod
    def check_prompt(cls, prompt: str) -> None:
        """Raises ValueError for a prompt that the scorer cannot score, whatever its parameters."""

    @classmethod
    def parameter_count(cls, params: Mapping[str, Any]) -> int | None:
        """Numbers in the scorer's weights; None where they are not known before they are loaded."""
        return cls.published_parameters

    @classmethod
    def without_weights(cls, params: Mapping[str, Any], image_size: int, device: str) -> TorchScorer | None:
        """The scorer with its networks on torch's meta device; None where they are not known before they are loaded.

        The memory estimate differentiates it, so its text may be of one token.

        Args:
            params: the constructor's parameters, some of which may be missing.
            image_size: height and width of the run's images in pixels.
            device: 'cpu' or 'cuda', where the scorer will be held; decides what the precision "auto" means.
        """
        return None


_Scorer = TypeVar("_Scorer", bound="TorchScorer")


class TorchScorer(ScorerFacts, ABC):
    """A scorer that is a network of pixels, with gradients to them.

    A subclass loads its network in ``__init__``, hands it to this one's, and defines ``rewards``. Pre-processing
    belongs into ``rewards``, so that ``score`` and a gradient see the same images.

    Args:
        model: the network; frozen, in evaluation mode, moved to ``device``.
        files: the checkpoint's files: ``provenance`` hashes them.
        device: None is the first GPU that is visible, else the CPU.
        precision: of the network: auto (bfloat16 where it is fast), float32 or bfloat16. Scores are made from
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

    @classmethod
    def on_meta(
        cls: type[_Scorer], model: nn.Module, params: Mapping[str, Any], device: str, *cast: nn.Module
    ) -> _Scorer:
        """A scorer around ``model``, a network on the meta device, made without ``__init__``; for ``without_weights``.

        Its attributes are the constructor's parameters under their own names.

        Args:
            params: the constructor's parameters; missing ones have their defaults.
            device: 'cpu' or 'cuda', which decides what the precision "auto" means.
            cast: the parts of ``model`` that ``hold_in`` casts; none: all of it.
        """
        defaults = {key: f.default for key, f in parameter_schema(cls).model_fields.items() if not f.is_required()}
        values = {**defaults, **params}
        precision = values.pop("precision")
        if precision == "auto" and device == "cuda":
            precision = "bfloat16"  # every GPU that this is likely to run on has it
        scorer = cls.__new__(cls)
        TorchScorer.__init__(scorer, nn.Module(), device="cpu", precision=precision)
        hold_in(scorer.dtype, *(cast or [model]))
        scorer.model = model.eval().requires_grad_(False)
        vars(scorer).update({key: value for key, value in values.items() if key not in ("device", "micro_batch")})
        return scorer


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


def parameter_schema(cls: type) -> type[BaseModel]:
    """A pydantic model of a constructor's parameters; ``**options`` stands for those of the next class in its MRO."""
    fields: dict[str, Any] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        constructor = vars(owner)["__init__"]
        hints, signature = get_type_hints(constructor), inspect.signature(constructor).parameters.values()
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
