"""Rewards: one protocol, one registry. Importing this package registers the built-in scorers."""

from . import attributes, jpeg  # noqa: F401  (registration)
from .base import RewardError, Scorer, build, checked_scores, names, register

__all__ = ["RewardError", "Scorer", "build", "checked_scores", "names", "register"]
