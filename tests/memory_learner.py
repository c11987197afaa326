"""Learners of every algorithm, with data and without, at sizes that a test can measure."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from memory_fixtures import profiled_peak, real_network, small_folder
from rlproxi.algorithms import registry
from rlproxi.algorithms.base import Update
from rlproxi.config import Config, build_config
from rlproxi.memory_parts import empty_vae
from rlproxi.memory_steps import first_updates
from rlproxi.models.autoencoder import Autoencoder
from rlproxi.models.folders import parts_folder
from rlproxi.models.loading import trainable
from rlproxi.models.lora import without_adapters
from rlproxi.models.precision import autocast
from rlproxi.rewards.attributes import AttributeClassifier
from rlproxi.rewards.gradients import RewardGradients

LORA = {"rank": 4, "alpha": 4}


def learner_config(root: Path, algorithm: str, kind: str = "new", model: dict | None = None, size: int = 16,
                   steps: int = 3, **settings) -> Config:
    """A learner of ``size`` images in a micro-batch, of a new U-Net or a small checkpoint's; its reward is a classifier."""
    side = 32 if kind == "new" else 64
    classifier, folder = root / "classifier.safetensors", root / kind
    if not classifier.exists():
        AttributeClassifier(32).save(classifier)
    if kind != "new" and not folder.exists():
        small_folder(kind, folder)
    start = {"channels": [32, 64]} if kind == "new" else {"init": str(folder)}
    return build_config({
        "run": {"stages": ["rl"], "algorithm": algorithm}, "data": {"size": side},
        "model": {"precision": "float32", **start, **(model or {})},
        "sampler": {"num_inference_steps": 1 if algorithm == "didr" else steps},
        "rewards": {"train": [{"name": "attributes", "params": {"path": str(classifier), "copies": 1}}], "heldout": []},
        algorithm: {"group_size": 2, "prompts_per_step": size // 2, "groups_per_micro_batch": size // 2, **settings}})


def real_updates(config: Config):
    """A function that makes, of each network, the first update of a learner with random weights and real tensors."""
    dtype = getattr(torch, config.model.precision)
    algorithm, network = registry.build(config), real_network(config, dtype)
    networks = algorithm.networks(network)
    for p in (p for x in networks.values() for p in trainable(x).values()):
        p.grad = torch.zeros_like(p)
    reference = without_adapters(network, network)
    if not config.model.lora:
        reference = copy.deepcopy(network).requires_grad_(False)
    gradients = None
    if algorithm.needs_gradients:
        gradients = RewardGradients.build(config.rewards.train, _real_vae(config), algorithm.normalize_gradients, "cpu")
    if not algorithm.needs_reference:
        reference = None
    return lambda: first_updates(config, algorithm, networks, reference, gradients)


def _real_vae(config: Config) -> Autoencoder | None:
    vae = empty_vae(parts_folder(config))
    if vae is None:
        return None
    vae = vae.to_empty(device="cpu")
    with torch.no_grad():
        for p in vae.parameters():
            p.normal_(0, 0.02)
    return Autoencoder(vae)


def real_peaks(config: Config) -> dict[str, int]:
    """network -> bytes at the worst moment of its first update, by torch's profiler; the update is made once before."""
    make = real_updates(config)

    def step(update: Update) -> None:
        with autocast(getattr(torch, config.model.precision), "cpu"):
            for loss, _ in update.losses:
                loss.backward()

    for update in make().values():
        step(update)
    return {name: profiled_peak(lambda: step(update)) for name, update in make().items()}
