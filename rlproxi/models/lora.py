"""Low-rank adapters, by peft. Few weights are trained, and the reference policy is the network with adapters off.

A model folder keeps the adapters apart from the base, in ``lora/``, so sampling computes exactly what training did.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.sections import LoRA
from ..seeds import Purpose, seed_of

if TYPE_CHECKING:
    from .backbone import ProximalNetwork

FOLDER, WEIGHTS, SETTINGS = "lora", "adapter_model.safetensors", "adapter_config.json"

_PUBLISHED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
#: Ends of the names of attention's linear layers: diffusers' networks, then our U-Net.
ATTENTION = (*_PUBLISHED, "qkv", "text_kv", "middle.1.out", "attend.out")


def network_of(denoiser: nn.Module) -> Any:
    """The network inside a denoiser: a backbone's or transformer's ``net``, else the denoiser itself."""
    return getattr(denoiser, "net", denoiser)


def attach(denoiser: ProximalNetwork, lora: LoRA, seed: int = 0) -> None:
    """Adds float32 adapters that change nothing yet (B = 0) and freezes everything else; ``seed`` names their weights.

    Raises ValueError where ``lora.targets`` names no layer of the network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    net = network_of(denoiser)
    denoiser.requires_grad_(False)
    layers = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    ends = tuple("." + end for end in lora.targets or ATTENTION)
    found = [name for name in layers if ("." + name).endswith(ends)]
    if not found:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in net.named_modules() if isinstance(m, nn.Linear)})
        message = f"model.lora.targets {lora.targets} name no layer of {type(net).__name__}"
        raise ValueError(f"{message}; its linear layers end in {', '.join(names)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, Purpose.LORA))
        # peft annotates alpha as int and only divides by the rank.
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=found)  # type: ignore[arg-type]
        inject_adapter_in_model(config, net)
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(True)
    denoiser.lora = lora


def _layers(denoiser: nn.Module) -> list[Any]:
    """peft's layers of a denoiser."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]


@contextlib.contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the network is its base: the reference policy, without a second copy."""
    layers = _layers(denoiser)
    before = [layer._disable_adapters for layer in layers]
    # Not peft's enable_adapters: that also switches requires_grad, and a graph may still await its backward.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def without_adapters(prox: Callable[..., Tensor], denoiser: nn.Module) -> Callable[..., Tensor]:
    """``prox``, whose network is ``denoiser``, as the base computes it: the reference policy."""

    def reference(*args: Any) -> Tensor:
        with adapters_off(denoiser):
            return prox(*args)

    return reference


def merge(denoiser: ProximalNetwork) -> None:
    """Adds the adapters to the base's weights, in the base's dtype, and removes them. Call it in float32."""
    net = network_of(denoiser)
    for name, module in [(n, m) for n, m in net.named_modules() if m in set(_layers(net))]:
        module.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, module.get_base_layer())
    denoiser.lora = None


def adapter_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by their names in ``network_of(denoiser)``."""
    return {name: p for name, p in network_of(denoiser).named_parameters() if "lora_" in name}


def save(denoiser: ProximalNetwork, folder: str | os.PathLike) -> None:
    """Writes ``folder``/lora. Raises ValueError for a denoiser without adapters."""
    if denoiser.lora is None:
        raise ValueError(f"{type(denoiser).__name__} has no adapters to save: attach some first (lora.attach)")
    folder = Path(folder) / FOLDER
    folder.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in adapter_weights(denoiser).items()}, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(denoiser.lora.model_dump(), indent=2) + "\n", encoding="utf-8")


def load(denoiser: ProximalNetwork, folder: str | os.PathLike) -> None:
    """Attaches the adapters of ``folder``/lora. Raises ValueError where they do not fit the network."""
    from safetensors import SafetensorError

    folder = Path(folder) / FOLDER
    try:
        attach(denoiser, LoRA.model_validate_json((folder / SETTINGS).read_text(encoding="utf-8")))
        saved = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no usable adapter: {error}") from None
    own = adapter_weights(denoiser)
    wrong = sorted(set(own) ^ set(saved)) or [n for n, p in own.items() if p.shape != saved[n].shape]
    if wrong:
        raise ValueError(f"{folder}: the adapter does not fit the network: {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])
