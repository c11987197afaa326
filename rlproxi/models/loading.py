"""From a folder to a denoiser: our own networks, and diffusers' under the warm-start formula."""

from __future__ import annotations

import copy
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.loading import Config
from ..files import link, write_text
from ..proximal.schedule import VPSchedule
from ..seeds import LAM_BRANCH, Purpose, seed_of
from . import lora
from .autoencoder import Autoencoder
from .backbone import LAM, ProximalBackbone, ProximalNetwork, interface_of
from .checkpoint_files import check_weights, load_network, naming, read_json
from .folders import OWN, ModelFolder, latent_space
from .lam import LamEmbedding
from .preconditioning import Preconditioned
from .text import TextEncoder
from .text_stacks import CACHE_BYTES, ENDS, KINDS, CheckpointText


def own_network(name: object) -> Any:
    """The class ``name`` of our own networks, imported now because it takes seconds; None for a class of another's."""
    module = OWN.get(name) if isinstance(name, str) else None
    return getattr(import_module(f".{module}", __package__), str(name)) if module else None


def load_part(kind: type, folder: Path) -> Any:
    """A module of a diffusers class ``kind`` in float32. Raises ValueError or FileNotFoundError naming the folder."""
    check_weights(folder)
    # Cast here too: diffusers goes by the first tensor's dtype, and a file may hold several.
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    return load_network(kind, folder, "diffusion_pytorch_model", **options).float()


def load_denoiser(
    folder: str | os.PathLike, schedule: VPSchedule | None = None, size: int | None = None
) -> ProximalNetwork:
    """The denoiser of a model folder, run directory or diffusers folder, in float32, for inference (``eval``).

    Args:
        schedule: the proximal schedule of a diffusers folder; None takes its sampler.json, else the default.
        size: H = W of its images in pixels, where the network is free to choose; None: the folder's own.

    Raises FileNotFoundError for a folder without one, ValueError for damaged files or a network that is not supported.
    """
    found = ModelFolder.find(folder)
    denoiser: ProximalNetwork
    with naming(found.path):
        own = own_network(found.network.get("_class_name"))
        denoiser = load_part(own, found.path / found.part) if own else _backbone(found, schedule, size)
        if found.has_adapters:
            lora.load(denoiser, found.path)
    return denoiser.eval()


def _backbone(folder: ModelFolder, schedule: VPSchedule | None, size: int | None) -> ProximalBackbone:
    import diffusers

    interface, noise = folder.interface, folder.noise()
    net = load_part(getattr(diffusers, folder.network["_class_name"]), folder.path / folder.part)
    if (folder.path / LAM).is_dir():
        branch = load_part(LamEmbedding, folder.path / LAM)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(LAM_BRANCH))
            branch = interface.new_branch(net)
    schedule = schedule or folder.settings.schedule.build()
    size = size or folder.settings.size
    return ProximalBackbone(net, branch, noise, schedule, size // folder.latents.factor if size else None)


def save_denoiser(denoiser: ProximalNetwork, folder: Path, origin: Path | None) -> None:
    """Writes the network's parts into ``folder``; with adapters, the frozen base is linked from the folder ``origin``.

    Raises ValueError for adapters without an origin.
    """
    if denoiser.lora is None:
        network = denoiser.net if isinstance(denoiser, ProximalBackbone) else denoiser
        network.save_pretrained(folder / denoiser.part)
        _forget_origin(folder / denoiser.part / "config.json")
    elif origin is None:
        raise ValueError("adapters need a saved base beside them: save the model before model.lora is attached")
    else:
        link(origin / denoiser.part, folder / denoiser.part)
        lora.save(denoiser, folder)
    if isinstance(denoiser, ProximalBackbone):
        denoiser.lam_embedding.save_pretrained(folder / LAM)


def _forget_origin(file: Path) -> None:
    """Take the path that a network was loaded from out of its config.json: it names somebody's machine."""
    values = read_json(file)
    if values.pop("_name_or_path", None) is not None:
        write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def load_autoencoder(folder: str | os.PathLike) -> Autoencoder | None:
    """The autoencoder of a model folder; None for a model of pixels. Raises as ``Autoencoder.from_pretrained``."""
    found = ModelFolder.at(folder)
    with naming(found.path):
        return Autoencoder.from_pretrained(found.path) if found.has_vae else None


def load_encoder(
    folder: str | os.PathLike, dtype: torch.dtype = torch.float32, cache_bytes: int = CACHE_BYTES
) -> TextEncoder | CheckpointText:
    """The text encoders of a model folder: a published checkpoint's stack, one saved from it, or the built-in encoder.

    Args:
        folder: a diffusers pipeline's folder, or what ``save_pretrained`` of one of the classes wrote.
        dtype: of a stack's weights, the same in rollout and learner. bfloat16 halves a T5-XXL to 9.5 GB. The states are
            float32 anyway.
        cache_bytes: of encoded captions that a stack keeps.

    Raises FileNotFoundError naming what is missing, ValueError for encoders that are not supported or damaged files.
    """
    import transformers

    found = ModelFolder.at(folder)
    path = found.path
    with naming(path):
        settings, ends = found.text, found.text_ends
        for end in ends:
            if not (path / f"tokenizer{end}").is_dir():
                raise FileNotFoundError(f"{path / f'tokenizer{end}'} is missing, the tokenizer of text_encoder{end}")
            check_weights(path / f"text_encoder{end}")
        if settings is None:
            return _built_in(found)
        stack = KINDS[settings.kind]
        parts: dict[str, Any] = {}
        for end, kind in zip(ENDS, stack.ENCODERS, strict=False):
            tokenizer, encoder = path / f"tokenizer{end}", path / f"text_encoder{end}"
            parts[tokenizer.name] = parts[encoder.name] = None
            if end in ends:
                parts[tokenizer.name] = _tokenizer(tokenizer)
                parts[encoder.name] = load_network(getattr(transformers, kind), encoder, "model", dtype=dtype)
        return stack(parts, settings, cache_bytes)


def _built_in(folder: ModelFolder) -> TextEncoder:
    import transformers

    part, kind = folder.path / "text_encoder", folder.text_classes["text_encoder"]
    if kind not in TextEncoder.KINDS:
        raise ValueError(f"{part} holds a {kind}; supported text encoders: {', '.join(TextEncoder.KINDS)}")
    tokenizer, model = _tokenizer(folder.path / "tokenizer"), load_network(getattr(transformers, kind), part, "model")
    return TextEncoder(tokenizer, model, min(tokenizer.model_max_length, 512))  # some give 1e30 for no limit


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers' Rust has an error without a class, and converters raise anything
        hint = "a spiece.model alone needs the package sentencepiece"
        raise ValueError(f"{folder} is not a tokenizer that can be loaded ({error}); {hint}") from None


def training_form(
    folder: str | os.PathLike, config: Config, stage: str, dtype: torch.dtype = torch.float32
) -> ProximalNetwork:
    """A model folder's denoiser as ``config`` trains it in ``stage`` (pretrain or rl): the same in learner and rollout.

    Without LoRA everything is trained, with the folder's adapters merged. With it the folder's adapters or new ones
    are trained, the base is held in ``dtype``; pre-training also trains the lam branch. Raises as ``load_denoiser``.
    """
    denoiser = load_denoiser(folder, config.schedule.build(), config.data.size)
    if denoiser.lora and config.model.lora is None:
        lora.merge(denoiser)
    _set_trained(denoiser, config, stage, dtype)
    if config.model.compile:
        denoiser.compile()
    return denoiser


def _set_trained(denoiser: ProximalNetwork, config: Config, stage: str, dtype: torch.dtype) -> None:
    if config.model.lora is None:
        denoiser.requires_grad_(True)
    else:
        if denoiser.lora is None:
            lora.attach(denoiser, config.model.lora, config.run.seed)
        for p in denoiser.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        branch = getattr(denoiser, "lam_embedding", None)
        if stage == "pretrain" and branch is not None:
            branch.float().requires_grad_(True)
    if config.model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name, in the module's order: what optimizers, averages and updates hold."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build_denoiser(config: Config) -> Preconditioned:
    """A new network as the config describes it. Raises ValueError for a size that its levels do not divide."""
    m, s = config.model, config.schedule
    channels, size = latent_space(config)
    if size % (2 ** (len(m.channels) - 1) * m.patch if m.kind == "unet" else m.patch):
        raise ValueError(f"data.size {config.data.size}: model.patch {m.patch} and the levels do not divide {size}")
    folder = ModelFolder.of(config)
    text_dim, pooled_dim = (m.text_dim, m.text_dim) if folder is None else folder.text_shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.run.seed, Purpose.NETWORK))
        common: dict[str, Any] = dict(sample_size=size, in_channels=channels, patch=m.patch, data_std=m.data_std)
        common |= dict(beta_min=s.beta_min, beta_max=s.beta_max, text_dim=text_dim, target=config.pretrain.target)
        if m.kind == "transformer":
            return own_network("ProximalTransformer")(layers=m.layers, heads=m.heads, **common)
        levels = {"channels": tuple(m.channels), "blocks": tuple(m.blocks), "attention": tuple(m.attention)}
        return own_network("ProximalUNet")(**levels, pooled_dim=pooled_dim, refine=m.refine, **common)


def empty_form(config: Config, stage: str, dtype: torch.dtype = torch.float32) -> ProximalNetwork:
    """As ``training_form``, but on the meta device, from config.json files alone: shapes without data."""
    folder = None if config.model.init is None else ModelFolder.find(config.model.init)
    with torch.device("meta"):
        denoiser = build_denoiser(config) if folder is None else _empty_denoiser(folder, config)
        if config.model.lora and folder is not None and folder.has_adapters:
            lora.attach(denoiser, folder.adapters)
        _set_trained(denoiser, config, stage, dtype)
    return denoiser


def _empty_denoiser(folder: ModelFolder, config: Config) -> ProximalNetwork:
    values = copy.deepcopy(folder.network)
    own = own_network(values.get("_class_name"))
    try:
        if own:
            return own.from_config(values)
        import diffusers

        interface = interface_of(values)  # an unknown class is refused before it is looked up
        net = getattr(diffusers, values["_class_name"]).from_config(values)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        file = folder.path / folder.part / "config.json"
        raise ValueError(f"{file} describes no network that is supported: {error}") from None
    with torch.device("cpu"):
        noise = folder.noise()
    return ProximalBackbone(
        net, interface.new_branch(net), noise, config.schedule.build(), config.data.size // folder.latents.factor
    )
