"""Published diffusion networks as proximal ones: diffusers' own classes inside the warm-start formula.

A checkpoint of any eps-, v- or flow-prediction model is a proximal policy as it stands (``proximal.warmstart``).
What it lacks is lam: a zero-initialised branch adds that to its time embedding, so that at load the output *is* the
formula, and training moves on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..proximal.schedule import VPSchedule
from ..proximal.warmstart import WarmStart
from .checkpoint_files import read_json
from .lam import LamEmbedding, told_of_lam
from .text import TextStates

#: Folder of the lam branch inside a model folder.
LAM = "lam_embedding"


class Adapter:
    """What differs between diffusers' networks: how they are called, and where their time embedding is made."""

    part = "unet"

    def time_embedder(self, net: nn.Module) -> nn.Module:
        return net.time_embedding

    def call(self, net: nn.Module, x: Tensor, time: Tensor, text: TextStates) -> Tensor:
        return net(x, time, encoder_hidden_states=text.states).sample


class SDXLAdapter(Adapter):
    """SDXL's U-Net: pooled text and six sizes beside the text states."""

    def call(self, net, x, time, text):
        sizes = text.time_ids
        if sizes is None:  # what a sampler asks for: an image that was that large and not cropped
            height, width = (8.0 * side for side in x.shape[-2:])
            sizes = torch.tensor([[height, width, 0.0, 0.0, height, width]], device=x.device).expand(len(x), -1)
        return net(
            x,
            time,
            encoder_hidden_states=text.states,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
        ).sample


class SD3Adapter(Adapter):
    """SD3's transformer: joint attention, pooled text in the time embedding."""

    part = "transformer"

    def time_embedder(self, net):
        return net.time_text_embed.timestep_embedder

    def call(self, net, x, time, text):
        return net(x, encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=time).sample


class PixArtAdapter(Adapter):
    """PixArt's transformer: T5 states under their mask; resolution embeddings where the checkpoint has them."""

    part = "transformer"

    def time_embedder(self, net):
        return net.adaln_single.emb.timestep_embedder

    def call(self, net, x, time, text):
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if net.use_additional_conditions:
            height, width = (8.0 * side for side in x.shape[-2:])
            added = {
                "resolution": torch.tensor([[height, width]], device=x.device).expand(len(x), -1),
                "aspect_ratio": torch.tensor([[height / width]], device=x.device).expand(len(x), -1),
            }
        # Beside the prediction it has the variance's channels, which a prox does not need.
        return net(
            x,
            encoder_hidden_states=text.states,
            timestep=time,
            encoder_attention_mask=text.mask,
            added_cond_kwargs=added,
        ).sample[:, : x.shape[1]]


def adapter_of(net_config: dict) -> Adapter:
    """The adapter for a network's config.json. Raises ValueError for a class that is not known here."""
    kind = net_config.get("_class_name")
    if kind == "UNet2DConditionModel":
        if net_config.get("class_embed_type") or net_config.get("in_channels") != net_config.get("out_channels"):
            raise ValueError(
                "this UNet2DConditionModel takes more than a latent, a time and a text (an inpainting, "
                "upscaling or image-conditioned checkpoint); use a plain text-to-image one"
            )
        if net_config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(f"addition_embed_type {net_config['addition_embed_type']!r} is not known here")
        return SDXLAdapter() if net_config.get("addition_embed_type") == "text_time" else Adapter()
    known = {"SD3Transformer2DModel": SD3Adapter, "PixArtTransformer2DModel": PixArtAdapter}
    if kind not in known:
        raise ValueError(
            f"a {kind} cannot be made a proximal network here; known: UNet2DConditionModel, {', '.join(known)}"
        )
    return known[kind]()


class NoiseLevels:
    """The noise levels of a checkpoint's own scheduler: which prediction, and which time belongs to an alpha_bar.

    Read from scheduler/scheduler_config.json, with diffusers' own class.
    """

    def __init__(self, folder: Path):
        file = folder / "scheduler" / "scheduler_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: it says what the network predicts and at which noise levels")
        values = read_json(file)
        if str(values.get("_class_name", "")).startswith("FlowMatch"):
            self.prediction, self.log_snr = "flow", None
            self.steps = values.get("num_train_timesteps", 1000)
            return
        from diffusers import DDIMScheduler

        # Whatever sampler the checkpoint names, its betas are told by the same keys.
        scheduler = DDIMScheduler.from_config({key: value for key, value in values.items() if key != "_class_name"})
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{file}: prediction_type {self.prediction!r} is not known here; epsilon, v_prediction and flow are"
            )
        self.steps = scheduler.config.num_train_timesteps
        levels = scheduler.alphas_cumprod.double().clamp_min(1e-8)  # 0 at the end with a zero terminal SNR
        self.log_snr = (levels / (1 - levels)).log()

    def time(self, level: Tensor) -> Tensor:
        """The time [B] in the network's units, in float64: of alpha_bar [B], linear in log SNR between the discrete
        levels and clamped to them; for a flow of s [B], s times their number."""
        if self.prediction == "flow":
            return level.double() * self.steps
        wanted = level.double().clamp(1e-12, 1 - 1e-12).logit()
        falling = self.log_snr = self.log_snr.to(wanted.device)
        right = torch.searchsorted(-falling, -wanted).clamp(1, len(falling) - 1)
        high, low = falling[right - 1], falling[right]
        return right - 1 + ((high - wanted) / (high - low)).clamp(0, 1)


class ProximalBackbone(nn.Module):
    """eps_theta(y, t, lam, text): a diffusers network ``net`` under the warm-start formula, told of lam by a branch.

    Args:
        net: a UNet2DConditionModel, SD3Transformer2DModel or PixArtTransformer2DModel. lam_embedding: the branch.
        levels: the checkpoint's noise levels. schedule: the proximal one.
        size: H = W of a sample in latent pixels; None takes what the checkpoint was made for.
    """

    #: The adapters' settings, where there are any (``models.lora``).
    lora = None

    def __init__(
        self,
        net: nn.Module,
        lam_embedding: LamEmbedding,
        levels: NoiseLevels,
        schedule: VPSchedule,
        size: int | None = None,
    ):
        super().__init__()
        self.net, self.lam_embedding = net, lam_embedding
        self.adapter = adapter_of(dict(net.config))
        self.schedule, self.levels = schedule, levels
        size = size or net.config.sample_size
        self.sample_shape = (net.config.in_channels, size, size)
        self.formula = WarmStart(self._predict, levels.prediction, schedule, levels.time)

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """y [B, C, H, W] float32; t, lam [B] float32; text with B rows. Returns eps, float32 like y."""
        return self.formula(y, t, lam, (text, self.lam_embedding(t, lam)))

    def _predict(self, x: Tensor, time: Tensor, cond: tuple[TextStates, Tensor]) -> Tensor:
        text, shift = cond
        with told_of_lam(self.adapter.time_embedder(self.net), shift):
            return self.adapter.call(self.net, x, time, text)

    @property
    def device(self) -> torch.device:
        return self.net.device

    def enable_gradient_checkpointing(self) -> None:
        self.net.enable_gradient_checkpointing()

    def compile(self, *args, **kwargs) -> None:
        """Compiles the network alone; the formula around it is a few operations."""
        self.net.compile(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the network and the branch as two parts of the model folder ``folder``."""
        self.net.save_pretrained(Path(folder) / self.adapter.part)
        self.lam_embedding.save_pretrained(Path(folder) / LAM)
