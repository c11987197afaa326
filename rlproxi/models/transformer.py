"""A PixArt-class diffusion transformer for the proximal residual, trained from nothing."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from ..proximal.schedule import VPSchedule
from .backbone import PixArtInterface
from .lam import LamEmbedding, added_to_time
from .preconditioning import Preconditioned
from .text import TextStates


class ProximalTransformer(Preconditioned):
    """diffusers' PixArtTransformer2DModel as the network F: adaLN-single from t and lam, cross-attention to the text.

    Args:
        sample_size: H = W. in_channels: C. patch: patch size.
        layers, heads, head_dim: its depth and width (heads x head_dim).
        text_dim: width of the text states. The pooled text vector is not used, as in PixArt.
        data_std, beta_min, beta_max: as for ``ProximalUNet``.
    """

    part = "transformer"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        patch: int = 2,
        layers: int = 12,
        heads: int = 6,
        head_dim: int = 64,
        text_dim: int = 64,
        data_std: float = 1.0,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        target: str = "noise",
    ):
        super().__init__()
        self.precondition(in_channels, sample_size, data_std, VPSchedule(beta_min, beta_max), target)
        self.net = PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=2 * in_channels,
            out_channels=in_channels,
            num_layers=layers,
            cross_attention_dim=heads * head_dim,
            caption_channels=text_dim,
            sample_size=sample_size,
            patch_size=patch,
            use_additional_conditions=False,
        )
        self.lam_embedding = LamEmbedding(heads * head_dim)
        # F = 0 at the start: the fitted Gaussian's exact prox.
        nn.init.zeros_(self.net.proj_out.weight)
        nn.init.zeros_(self.net.proj_out.bias)

    def network(self, x: Tensor, t: Tensor, lam: Tensor, text: TextStates) -> Tensor:
        """F: the bare network, [B, 2 C, H, W] -> [B, C, H, W]."""
        calls = PixArtInterface()
        with added_to_time(calls.time_embedder(self.net), self.lam_embedding(t, lam)):
            return calls.call(self.net, x, 1000 * t, text)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the transformer alone; the closed form around it is a few operations."""
        self.net.compile(*args, **kwargs)
