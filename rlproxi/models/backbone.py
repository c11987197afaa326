"""Published diffusion networks as proximal ones: diffusers' own classes inside the warm-start formula.

A checkpoint of any eps-, v- or flow-prediction model is a proximal policy as it stands (``proximal.warmstart``). A
zero-initialised branch, which adds lam to the time embedding, changes nothing until it is trained.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.sections import LoRA
from ..proximal.schedule import VPSchedule
from ..proximal.warmstart import WarmStart
from .lam import LamEmbedding, added_to_time
from .preconditioning import Preconditioned
from .text import TextStates

#: Folder of the lam branch inside a model folder.
LAM = "lam_embedding"


class Interface(ABC):
    """How one of diffusers' networks is called. A subclass names the class ``network`` and so makes it supported."""

    network: str
    #: The network's subfolder in a model folder.
    part = "transformer"
    #: The layer whose output is the time embedding [B, dim].
    embedder: str

    def time_embedder(self, net: nn.Module) -> Any:
        """The layer of ``net`` whose output is the time embedding."""
        return net.get_submodule(self.embedder)

    def new_branch(self, net: nn.Module) -> LamEmbedding:
        """A new lam branch, as wide as the time embedding of ``net``."""
        return LamEmbedding(self.time_embedder(net).linear_2.out_features)

    def check(self, config: Mapping[str, Any]) -> None:  # noqa: B027  # most classes have one form only
        """Raises ValueError where a network of this config.json takes other inputs."""

    @abstractmethod
    def call(self, net: Any, x: Tensor, time: Tensor, text: TextStates) -> Tensor:
        """The prediction of ``net``, like x [B, C, H, W]; time [B] in the network's units."""


class UNetInterface(Interface):
    """The U-Net of Stable Diffusion; SDXL's takes pooled text and six sizes beside the text states."""

    network = "UNet2DConditionModel"
    part = "unet"
    embedder = "time_embedding"

    def check(self, config: Mapping[str, Any]) -> None:
        """As ``Interface.check``."""
        if config.get("class_embed_type") or config.get("in_channels") != config.get("out_channels"):
            raise ValueError("this U-Net takes more than a latent, a time and a text: use a text-to-image checkpoint")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(f"addition_embed_type {config['addition_embed_type']!r} is not supported")

    def call(self, net: Any, x: Tensor, time: Tensor, text: TextStates) -> Tensor:
        """As ``Interface.call``; without time_ids, those of an image of x's own size that was not cropped."""
        added = None
        if net.config.addition_embed_type == "text_time":
            sizes = text.time_ids
            if sizes is None:
                height, width = (8.0 * side for side in x.shape[-2:])
                sizes = torch.tensor([[height, width, 0.0, 0.0, height, width]], device=x.device).expand(len(x), -1)
            added = {"text_embeds": text.pooled, "time_ids": sizes}
        return net(x, time, encoder_hidden_states=text.states, added_cond_kwargs=added).sample


class SD3Interface(Interface):
    """SD3's transformer: joint attention, pooled text in the time embedding."""

    network = "SD3Transformer2DModel"
    embedder = "time_text_embed.timestep_embedder"

    def call(self, net: Any, x: Tensor, time: Tensor, text: TextStates) -> Tensor:
        """As ``Interface.call``."""
        return net(x, encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=time).sample


class PixArtInterface(Interface):
    """PixArt's transformer: T5 states under their mask; resolution embeddings where the checkpoint has them."""

    network = "PixArtTransformer2DModel"
    embedder = "adaln_single.emb.timestep_embedder"

    def call(self, net: Any, x: Tensor, time: Tensor, text: TextStates) -> Tensor:
        """As ``Interface.call``."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if net.use_additional_conditions:
            height, width = (8.0 * side for side in x.shape[-2:])
            added = {
                "resolution": torch.tensor([[height, width]], device=x.device).expand(len(x), -1),
                "aspect_ratio": torch.tensor([[height / width]], device=x.device).expand(len(x), -1),
            }
        captions = {"encoder_hidden_states": text.states, "encoder_attention_mask": text.mask}
        # The output also has channels for the variance, which a prox does not need.
        return net(x, timestep=time, added_cond_kwargs=added, **captions).sample[:, : x.shape[1]]


def interface_of(net_config: Mapping[str, Any]) -> Interface:
    """The interface for a network's config.json. Raises ValueError for a class that is not supported."""
    kinds = {kind.network: kind for kind in Interface.__subclasses__()}
    name = net_config.get("_class_name")
    if name not in kinds:
        raise ValueError(f"a {name} cannot be made a proximal network; supported: {', '.join(kinds)}")
    interface = kinds[name]()
    interface.check(net_config)
    return interface


class CheckpointNoise:
    """A checkpoint's own noise levels: which quantity its network predicts, and which time belongs to an alpha_bar.

    Args:
        values: scheduler_config.json, read by diffusers' own class. file: its place, for error messages.

    Attributes:
        prediction: epsilon, v_prediction or flow. steps: the number of discrete times.

    Raises ValueError for another prediction_type.
    """

    def __init__(self, values: Mapping[str, Any], file: str | os.PathLike = "scheduler_config.json"):
        self._log_snr = torch.empty(0)
        if str(values.get("_class_name", "")).startswith("FlowMatch"):
            self.prediction = "flow"
            self.steps = values.get("num_train_timesteps", 1000)
            return
        from diffusers import DDIMScheduler

        # All of diffusers' schedulers name their betas by the same keys.
        scheduler = DDIMScheduler.from_config({key: value for key, value in values.items() if key != "_class_name"})
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"{file}: prediction_type {self.prediction!r} is not epsilon, v_prediction or flow")
        self.steps = scheduler.config.num_train_timesteps
        levels = scheduler.alphas_cumprod.double().clamp_min(1e-8)  # 0 at the end with a zero terminal SNR
        self._log_snr = (levels / (1 - levels)).log()

    def time(self, level: Tensor) -> Tensor:
        """The time [B] in the network's units, float64, of the noise level [B]: an alpha_bar, or a flow's s.

        An alpha_bar's time is linear in log SNR between the discrete levels and clamped to them.
        """
        if self.prediction == "flow":
            return level.double() * self.steps
        wanted = level.double().clamp(1e-12, 1 - 1e-12).logit()
        falling = self._log_snr = self._log_snr.to(wanted.device)
        right = torch.searchsorted(-falling, -wanted).clamp(1, len(falling) - 1)
        high, low = falling[right - 1], falling[right]
        return right - 1 + ((high - wanted) / (high - low)).clamp(0, 1)


class ProximalBackbone(nn.Module):
    """eps_theta(y, t, lam, text): a diffusers network ``net`` under the warm-start formula; a branch adds lam.

    Args:
        net: a UNet2DConditionModel, SD3Transformer2DModel or PixArtTransformer2DModel.
        lam_embedding: the branch. noise: the checkpoint's noise levels. schedule: the proximal schedule.
        size: H = W of a sample in latent pixels; None takes what the checkpoint was made for.
    """

    #: Settings of the LoRA adapters, where there are any (``models.lora``).
    lora: LoRA | None = None

    def __init__(
        self,
        net: Any,
        lam_embedding: LamEmbedding,
        noise: CheckpointNoise,
        schedule: VPSchedule,
        size: int | None = None,
    ):
        super().__init__()
        self.net = net
        self.lam_embedding = lam_embedding
        self.interface = interface_of(dict(net.config))
        self.schedule = schedule
        side = size or net.config.sample_size
        #: [C, H, W] of a sample.
        self.sample_shape: tuple[int, int, int] = (net.config.in_channels, side, side)
        self.formula = WarmStart(self._predict, noise.prediction, schedule, noise.time)

    @property
    def part(self) -> str:
        """The subfolder of its network inside a model folder: 'unet' or 'transformer'."""
        return self.interface.part

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """y [B, C, H, W] float32; t, lam [B] float32; text with B rows. Returns eps, float32 like y."""
        return self.formula(y, t, lam, (text, self.lam_embedding(t, lam)))

    def _predict(self, x: Tensor, time: Tensor, cond: tuple[TextStates, Tensor]) -> Tensor:
        text, shift = cond
        with added_to_time(self.interface.time_embedder(self.net), shift):
            return self.interface.call(self.net, x, time, text)

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return self.net.device

    def enable_gradient_checkpointing(self) -> None:
        """Makes the network recompute activations in the backward."""
        self.net.enable_gradient_checkpointing()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the network alone; the formula around it is a few operations."""
        self.net.compile(*args, **kwargs)


#: What this project samples from and trains: a network of its own, or a published one under the warm-start formula.
ProximalNetwork = Preconditioned | ProximalBackbone
