"""Differentiable rewards without their weights: what their gradients cost the rank that takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config.loading import Config
from ..config.sections import Reward
from ..models.autoencoder import Autoencoder
from ..rewards import TorchScorer, facts
from ..rewards.gradients import RewardGradients
from .memory_parts import held
from .memory_trace import without_data


def scorer_bytes(reward: Reward) -> int | None:
    """Bytes of a scorer's weights in float32; None where they are not known before they are loaded."""
    count = facts(reward.kind).parameter_count(reward.params)
    return None if count is None else 4 * count


def empty_scorer(reward: Reward, config: Config, device: str) -> TorchScorer | None:
    """The scorer of ``reward`` on tensors without data, as it would be held on ``device`` ('cpu' or 'cuda').

    None where its network is not known before it is loaded.
    """
    scorer = facts(reward.kind).without_weights(reward.params, config.data.size, device)
    for part in networks(scorer).values():
        without_data(part)
    return scorer


def empty_gradients(
    config: Config, vae: nn.Module | None, normalize: bool, device: str
) -> tuple[RewardGradients, list[str]]:
    """The training rewards' gradients on tensors without data, and the rewards whose network is not known.

    Of those the image alone is differentiated. ``vae``: on the meta device, or without data already.
    """
    scorers: dict[str, tuple[TorchScorer, float]] = {}
    unknown = []
    for reward in config.rewards.train:
        scorer = empty_scorer(reward, config, device)
        if scorer is None:
            unknown.append(reward.name)
        scorers[reward.name] = (scorer or _Unknown(nn.Module(), device="cpu"), reward.weight)
    return RewardGradients(scorers, Autoencoder(without_data(vae)) if vae is not None else None, normalize), unknown


def networks(scorer: Any) -> Mapping[str, nn.Module]:
    """The networks among a scorer's attributes; {} for None."""
    return {} if scorer is None else {name: x for name, x in vars(scorer).items() if isinstance(x, nn.Module)}


def scorer_held(scorer: Any) -> int:
    """Bytes of a scorer's networks."""
    return sum(map(held, networks(scorer).values()))


class _Unknown(TorchScorer):
    """Stands for a scorer about which nothing is known."""

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.flatten(1).mean(1)
