"""From a folder to a denoiser: our own networks, and diffusers' under the warm-start formula."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.loading import Config
from ..config.sections import Schedule
from ..files import link
from ..proximal.schedule import VPSchedule
from ..seeds import LAM_BRANCH, Purpose, seed_of
from . import lora
from .autoencoder import Autoencoder, latent_facts
from .backbone import LAM, NoiseLevels, ProximalBackbone, adapter_of
from .checkpoint_files import load_network, naming, read_json
from .folders import check_weights, find_model, latent_space, network_config, parts_folder, read_settings
from .lam import LamEmbedding
from .text import TextEncoder
from .text_loading import load_text, text_widths
from .text_stacks import CheckpointText


def own_network(name: str | None) -> type | None:
    """Our own network's class; None for a class of another's. Imported when it is asked for: ``ProximalTransformer``
    brings all of diffusers' transformers along, seconds for every process of a run."""
    if name == "ProximalUNet":
        from .unet import ProximalUNet

        return ProximalUNet
    if name == "ProximalTransformer":
        from .transformer import ProximalTransformer

        return ProximalTransformer
    return None


def load_part(kind: type, folder: Path) -> nn.Module:
    """A diffusers-style module in float32. Raises ValueError or FileNotFoundError naming the folder."""
    check_weights(folder)
    # Cast here too: diffusers goes by the first tensor's dtype, and a file may hold several.
    return load_network(
        kind, folder, "diffusion_pytorch_model", torch_dtype=torch.float32, low_cpu_mem_usage=False
    ).float()


def load_denoiser(folder: str | os.PathLike, schedule: VPSchedule | None = None, size: int | None = None) -> nn.Module:
    """The denoiser of a model folder, run directory or diffusers folder, in float32, for inference (``eval``).

    Args:
        schedule: the proximal schedule of a diffusers folder, which has none of its own; None takes the folder's
            sampler.json, else the default.
        size: H = W of its images in pixels, where the network is free to choose; None: the folder's own.

    Raises FileNotFoundError for a folder without one, ValueError for damaged files, weights that do not fit
    their config.json, or a network that is not known.
    """
    folder = find_model(folder)
    part, values = network_config(folder)
    with naming(folder):
        own = own_network(values.get("_class_name"))
        if own:
            denoiser = load_part(own, folder / part)
        else:
            denoiser = _backbone(folder, part, values, schedule, size)
        if (folder / lora.FOLDER).is_dir():
            lora.load(denoiser, folder)
    return denoiser.eval()


def _backbone(folder: Path, part: str, values: dict, schedule: VPSchedule | None, size: int | None) -> ProximalBackbone:
    import diffusers

    try:
        adapter_of(values)
    except ValueError as error:
        raise ValueError(f"{folder / part}: {error}") from None
    levels = NoiseLevels(folder)
    net = load_part(getattr(diffusers, values["_class_name"]), folder / part)
    if (folder / LAM).is_dir():
        branch = load_part(LamEmbedding, folder / LAM)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(LAM_BRANCH))
            branch = LamEmbedding(adapter_of(values).time_embedder(net).linear_2.out_features)
    settings = read_settings(folder)
    if schedule is None:
        schedule = Schedule.model_validate(settings.get("schedule", {})).build()
    size = size or settings.get("size")
    return ProximalBackbone(net, branch, levels, schedule, size // latent_facts(folder)[1] if size else None)


def part_of(denoiser: nn.Module) -> str:
    """The folder of a denoiser's network: 'unet' or 'transformer'."""
    if isinstance(denoiser, ProximalBackbone):
        return denoiser.adapter.part
    return denoiser.part


def save_denoiser(denoiser: nn.Module, folder: Path, origin: Path | None) -> None:
    """Writes the network's parts into the model folder ``folder``.

    With adapters, the base is linked from ``origin``, the folder it came from: it was frozen, so it is not written
    again. Raises ValueError for adapters without an origin.
    """
    part = part_of(denoiser)
    if denoiser.lora is None:
        denoiser.save_pretrained(folder if isinstance(denoiser, ProximalBackbone) else folder / part)
        return
    if origin is None:
        raise ValueError(
            "adapters are saved beside the base they belong to, and this base was never saved: save the model "
            "before model.lora is attached"
        )
    link(origin / part, folder / part)
    lora.save(denoiser, folder)
    if isinstance(denoiser, ProximalBackbone):
        denoiser.lam_embedding.save_pretrained(folder / LAM)


def load_autoencoder(folder: Path) -> Autoencoder | None:
    """The autoencoder of a model folder; None for a model of pixels."""
    with naming(folder):
        return Autoencoder.from_pretrained(folder) if (folder / "vae").is_dir() else None


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoder | CheckpointText:
    """The text encoders of a model folder. Large frozen stacks are held in the network's ``dtype``; what rolls out and
    what trains must give the same one.

    Raises as ``load_text``, and ValueError naming a file of weights that is damaged.
    """
    for part in sorted(folder.glob("text_encoder*")):
        check_weights(part)
    with naming(folder):
        return load_text(folder, dtype)


def training_form(
    folder: str | os.PathLike, config: Config, stage: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A model folder's denoiser as ``config`` trains it in ``stage`` (pretrain or rl): the same in learner and rollout.

    Without LoRA everything is trained, adapters of the folder merged into it. With it the folder's adapters go on, or
    new ones are attached, and the frozen base is held in ``dtype``; pre-training trains the lam branch as well.
    ``trainable`` tells what is trained.
    """
    denoiser = load_denoiser(folder, config.schedule.build(), config.data.size)
    if denoiser.lora and config.model.lora is None:
        lora.merge(denoiser)
    _set_trained(denoiser, config, stage, dtype)
    if config.model.compile:
        denoiser.compile()
    return denoiser


def _set_trained(denoiser: nn.Module, config: Config, stage: str, dtype: torch.dtype) -> None:
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
    """name -> parameter of what is trained, in the module's order: what optimizers, averages and updates hold."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build_denoiser(config: Config) -> nn.Module:
    """A new network as the config describes it; the run's seed names its initial weights."""
    m, s = config.model, config.schedule
    channels, size = latent_space(config)
    if size % (2 ** (len(m.channels) - 1) * m.patch if m.kind == "unet" else m.patch):
        raise ValueError(
            f"a sample is {size} wide (data.size {config.data.size}), which model.patch {m.patch} and the "
            "levels do not divide"
        )
    folder = parts_folder(config)
    text_dim, pooled_dim = (m.text_dim, m.text_dim) if folder is None else text_widths(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.run.seed, Purpose.NETWORK))
        common = dict(
            sample_size=size,
            in_channels=channels,
            patch=m.patch,
            data_std=m.data_std,
            beta_min=s.beta_min,
            beta_max=s.beta_max,
            text_dim=text_dim,
            target=config.pretrain.target,
        )
        if m.kind == "transformer":
            return own_network("ProximalTransformer")(layers=m.layers, heads=m.heads, **common)
        return own_network("ProximalUNet")(
            channels=tuple(m.channels),
            blocks=tuple(m.blocks),
            attention=tuple(m.attention),
            pooled_dim=pooled_dim,
            **common,
        )


def empty_form(config: Config, stage: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """What ``config`` trains in ``stage``, as ``training_form`` gives it, but on the meta device: shapes without data.

    Built from config.json files alone, in seconds at any size. Raises FileNotFoundError or ValueError as loading does.
    """
    with torch.device("meta"):
        denoiser = build_denoiser(config) if config.model.init is None else _empty_denoiser(config)
        folder = None if config.model.init is None else find_model(config.model.init)
        if config.model.lora and folder is not None and (folder / lora.FOLDER).is_dir():
            lora.attach(denoiser, lora.LoRA.model_validate(read_json(folder / lora.FOLDER / lora.SETTINGS)))
        _set_trained(denoiser, config, stage, dtype)
    return denoiser


def _empty_denoiser(config: Config) -> nn.Module:
    folder = find_model(config.model.init)
    part, values = network_config(folder)
    own = own_network(values.get("_class_name"))
    try:
        if own:
            return own.from_config(values)
        import diffusers

        adapter = adapter_of(values)  # an unknown class is refused before it is looked up
        net = getattr(diffusers, values["_class_name"]).from_config(values)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{folder / part / 'config.json'} describes no network that is known here: {error}") from None
    with torch.device("cpu"):
        levels = NoiseLevels(folder)
    branch = LamEmbedding(adapter.time_embedder(net).linear_2.out_features)
    return ProximalBackbone(net, branch, levels, config.schedule.build(), config.data.size // latent_facts(folder)[1])
