"""The parts of a run that follow from sizes alone: text encoders, autoencoder, DeepSpeed's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config.loading import Config
from ..data import faces
from ..models.folders import ModelFolder
from ..models.text import build_text_encoder

#: The most gradients in DeepSpeed's reduction buffer (actors/train/engine.py). ZeRO 1 and later allocate all of it.
BUCKET = 500_000_000


def count(tensors: Iterable[Tensor]) -> int:
    """Numbers in ``tensors``."""
    return sum(x.numel() for x in tensors)


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(x.nbytes for x in module.parameters()) + sum(x.nbytes for x in module.buffers())


def text_shape(config: Config) -> tuple[int, int, int]:
    """(tokens, width of the states, width of the pooled vector) of an encoded caption.

    Raises as ``ModelFolder``.
    """
    folder = ModelFolder.of(config)
    if folder is None:
        return config.model.text_length, config.model.text_dim, config.model.text_dim
    return folder.text_shape


def text_encoders(config: Config, folder: ModelFolder | None) -> list[nn.Module]:
    """The text models on the meta device; enter ``torch.device('meta')`` first."""
    import transformers

    if folder is None:
        captions = [faces.portrait(0, i, 0.5).caption for i in range(256)]
        m = config.model
        return [build_text_encoder([*captions, ""], m.text_dim, m.text_layers, m.text_length).model]
    models = []
    for part, name in folder.text_classes.items():
        kind = getattr(transformers, name)
        models.append(kind(kind.config_class.from_dict(folder.json(f"{part}/config.json"))))
    return models


def text_encoder_bytes(config: Config, folder: ModelFolder | None, dtype: torch.dtype) -> int:
    """Bytes of the text models as ``load_encoder`` holds them: the built-in one in float32, others in ``dtype``."""
    with torch.device("meta"):
        models = text_encoders(config, folder)
    built_in = folder is None or folder.text is None
    size = 4 if built_in else dtype.itemsize
    return sum(size * count(model.parameters()) for model in models)


def empty_vae(folder: ModelFolder | None) -> nn.Module | None:
    """The folder's AutoencoderKL on the meta device; None for a model of pixels."""
    if folder is None or not folder.has_vae:
        return None
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(folder.json("vae/config.json"))


def with_engines(
    parts: Mapping[str, int],
    config: Config,
    trained: Mapping[str, int],
    activations: Mapping[str, int],
    anchor: float = 0.0,
) -> dict[str, int]:
    """``parts`` with what DeepSpeed holds (measured on its 0.19: docs/memory.md) and the activations.

    trained, activations: numbers and bytes, of each network that has an engine; their weights are the parts whose names
    end in 'network'. anchor: as ``Engine``'s.
    """
    parts, stage, n = dict(parts), config.learner.zero_stage, config.resources.learner_workers
    sizes = {name: 4 * numbers for name, numbers in trained.items()}
    share = {name: size // n if stage else size for name, size in sizes.items()}
    gathered = 0
    if stage == 3:
        for key in [key for key in parts if key.endswith("network")]:
            gathered += parts[key]  # layers gathered for their turn stay for the next, up to a billion numbers
            parts[key] //= n
    if stage:
        parts["master weights"] = sum(share.values())
    parts["Adam moments"] = 2 * sum(share.values())
    if anchor:
        parts["anchor"] = sum(share.values())
    # What goes after an update is one network's at a time; the network whose update is the worst decides.
    own = {name: share[name] if stage >= 2 else size for name, size in sizes.items()}
    # After the last backward, when activations are gone: gradients made flat for the reduction or the optimizer.
    flat = {name: {0: min(size, 4 * BUCKET), 3: size}.get(stage, share[name]) for name, size in sizes.items()}
    seen = {name: activations[name] + gathered for name in sizes}
    worst = max(sizes, key=lambda name: own[name] + max(seen[name], flat[name]))
    parts["gradients"] = sum(own.values()) if stage >= 2 else own[worst]
    if stage and config.resources.learner_gpus:  # untouched, so free, in host memory
        kept = sizes.values() if stage == 3 else [sizes[worst]]
        parts["reduction buffer"] = sum(min(size, 4 * BUCKET) for size in kept)
    parts["activations" if seen[worst] >= flat[worst] else "flat gradients"] = max(seen[worst], flat[worst])
    return parts
