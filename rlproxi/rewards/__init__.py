"""Rewards: one protocol, one registry, one module for each scorer."""

from .base import RewardError, Scorer, ScorerFacts, TorchScorer, checked_scores, provenance
from .registry import build, checked_params, facts, get, is_differentiable, names, parameters, register

__all__ = [
    "RewardError",
    "Scorer",
    "ScorerFacts",
    "TorchScorer",
    "build",
    "checked_params",
    "checked_scores",
    "facts",
    "get",
    "is_differentiable",
    "names",
    "parameters",
    "provenance",
    "register",
]
