"""Rewards: one protocol, one registry. Importing this package registers the built-in scorers."""

from . import aesthetic, attributes, clip_score, hpsv2, http, imagereward, jpeg, pickscore  # noqa: F401  (registration)
from .base import (
    RewardError,
    Scorer,
    TorchScorer,
    build,
    checked_params,
    checked_scores,
    names,
    parameters,
    provenance,
    register,
)

__all__ = [
    "RewardError",
    "Scorer",
    "TorchScorer",
    "build",
    "checked_params",
    "checked_scores",
    "names",
    "parameters",
    "provenance",
    "register",
]
