"""Differentiable rewards without their weights: what their gradients cost the rank that takes them.

Sizes are those of the published checkpoints, or a folder's config.json. Text goes through as one token: it is encoded
without gradient, and its length is padded to the network's anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.loading import Config
from ..config.sections import Reward
from ..models.autoencoder import Autoencoder
from ..rewards.aesthetic import WIDTHS, Aesthetic
from ..rewards.attributes import AttributeClassifier, AttributeReward
from ..rewards.base import TorchScorer, hold_in
from ..rewards.blip import ImageRewardNetwork, Sizes
from ..rewards.clip import ClipScorer
from ..rewards.clip_score import ClipScore
from ..rewards.clip_text import ClipTokens
from ..rewards.gradients import RewardGradients
from ..rewards.hpsv2 import HPSv20, HPSv21
from ..rewards.imagereward import MAX_TOKENS, ImageRewardScorer
from ..rewards.pickscore import PickScore
from .memory_parts import held
from .memory_trace import without_data

#: ViT-L/14 (OpenAI) and ViT-H/14 (LAION): transformers' CLIPConfig.
_TOWERS = {
    "L": {"vision": (1024, 4096, 16, 24), "text": (768, 3072, 12, 12), "width": 768, "act": "quick_gelu"},
    "H": {"vision": (1280, 5120, 16, 32), "text": (1024, 4096, 16, 24), "width": 1024, "act": "gelu"},
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def empty_scorer(reward: Reward, config: Config, device: str) -> TorchScorer | None:
    """The scorer of ``reward`` on tensors without data, as it would be held on ``device`` ('cpu' or 'cuda').

    None where its network is not known before it is loaded: one of the user's own, or a file of another size.
    """
    make = _BUILDERS.get(reward.kind)
    return make(reward, config, device) if make else None


def empty_gradients(
    config: Config, vae: nn.Module | None, normalize: bool, device: str
) -> tuple[RewardGradients, list[str]]:
    """The training rewards' gradients on tensors without data, and the rewards whose network is not known.

    Of those the image alone is differentiated. ``vae``: on the meta device, or without data already.
    """
    scorers, unknown = {}, []
    for reward in config.rewards.train:
        scorer = empty_scorer(reward, config, device)
        if scorer is None:
            unknown.append(reward.name)
        scorers[reward.name] = (scorer or _Unknown(), reward.weight)
    return RewardGradients(scorers, vae and Autoencoder(without_data(vae)), normalize), unknown


def scorer_held(scorer: Any) -> int:
    """Bytes of a scorer's networks."""
    return sum(held(part) for part in vars(scorer).values() if isinstance(part, nn.Module))


class _Unknown:
    """In the place of a scorer about which nothing is known."""

    def rewards(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.flatten(1).mean(1)


# -- one builder for each kind; ``__init__`` would look for files ---------------------------


def _ready(
    kind: type[TorchScorer],
    reward: Reward,
    device: str,
    model: nn.Module,
    default: str = "auto",
    held_in: Sequence[nn.Module] | None = None,
    **attributes: Any,
) -> TorchScorer:
    """A scorer of ``kind`` around ``model`` (on the meta device), with what its ``__init__`` would set."""
    precision = reward.params.get("precision", default)
    if precision == "auto" and device == "cuda":
        precision = "bfloat16"  # of every GPU that this is likely to run on
    scorer = kind.__new__(kind)
    TorchScorer.__init__(scorer, nn.Module(), device="cpu", precision=precision)
    hold_in(scorer.dtype, *(held_in or [model]))
    scorer.model = without_data(model.eval().requires_grad_(False))
    vars(scorer).update({name: reward.params.get(name, value) for name, value in attributes.items()})
    return scorer


def _attributes(reward: Reward, config: Config, device: str) -> TorchScorer:
    sizes = _classifier_sizes(reward.params.get("path")) or {"sample_size": config.data.size}
    with torch.device("meta"):
        model = AttributeClassifier(**sizes)
    scorer = _ready(AttributeReward, reward, device, model, "float32", copies=4, noise=0.1)
    scorer.size, scorer._drawn = model.sizes["sample_size"], {}
    return scorer


def _classifier_sizes(path: str | None) -> dict[str, int] | None:
    """The sizes that a classifier's file carries; None where the stage prepare is still to make it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path or "", framework="pt") as file:
            return {key: int(value) for key, value in file.metadata().items()}
    except (OSError, SafetensorError, AttributeError, ValueError):
        return None


def _clip(kind: type[ClipScorer], tower: str, **attributes: Any) -> Callable[[Reward, Config, str], TorchScorer | None]:
    """A builder for a scorer on CLIP: the published ``tower``, or that of the folder in params.clip."""

    def make(reward: Reward, config: Config, device: str) -> TorchScorer | None:
        from transformers import CLIPModel

        sizes = _clip_config(reward.params.get("clip"), tower)
        if sizes is None:
            return None
        with torch.device("meta"):
            model, head = CLIPModel(sizes), nn.Sequential(*(nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:])))
        if kind is Aesthetic:
            model.text_model = model.text_projection = None
        scorer = _ready(kind, reward, device, model, **attributes)
        scorer.tokens = ClipTokens(lambda texts: [[1]] * len(texts), 0, 2)
        if kind is Aesthetic:
            scorer.head = without_data(head.requires_grad_(False))
        return scorer

    return make


def _clip_config(folder: str | None, tower: str):
    """transformers' CLIPConfig of a folder, else of the published ``tower``; None: a folder that is not here."""
    from transformers import CLIPConfig

    if folder is not None:
        return CLIPConfig.from_pretrained(folder) if (Path(folder) / "config.json").is_file() else None
    known = _TOWERS[tower]
    shared = {"projection_dim": known["width"], "hidden_act": known["act"]}
    return CLIPConfig(
        projection_dim=known["width"],
        vision_config={**dict(zip(_SIZES, known["vision"])), "image_size": 224, "patch_size": 14, **shared},
        text_config={
            **dict(zip(_SIZES, known["text"])),
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            **shared,
        },
    )


def _imagereward(reward: Reward, config: Config, device: str) -> TorchScorer:
    with torch.device("meta"):
        model = ImageRewardNetwork(Sizes(224, 16, 1024, 24, 4096, 768, 12, 3072, 30524, 512))
    scorer = _ready(ImageRewardScorer, reward, device, model, held_in=[model.vision, model.text], eight_bit=True)
    scorer.tokens = lambda prompts: (torch.zeros(2, len(prompts), MAX_TOKENS, dtype=torch.long) + 1).unbind()
    return scorer


_BUILDERS: dict[str, Callable[[Reward, Config, str], TorchScorer | None]] = {
    "attributes": _attributes,
    "imagereward": _imagereward,
    "aesthetic": _clip(Aesthetic, "L", eight_bit=True),
    "clip": _clip(ClipScore, "L", scale=100.0, clamp=True, eight_bit=True),
    "pickscore": _clip(PickScore, "H", eight_bit=True),
    "hpsv2": _clip(HPSv21, "H", antialias=True),
    "hpsv2.1": _clip(HPSv21, "H", antialias=True),
    "hpsv2.0": _clip(HPSv20, "H", antialias=True),
}
