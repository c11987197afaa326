"""The branch that gives a network of one noise level the prox's second number, lam."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .preconditioning import noise_features


class LamEmbedding(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers declares config_name in both
    """(t, lam) -> a vector that is added to a network's time embedding, 0 before it is trained.

    Args:
        dim: width of the time embedding. hidden: of its one hidden layer.
    """

    @register_to_config
    def __init__(self, dim: int, hidden: int = 256):
        super().__init__()
        self.linear_1 = nn.Linear(128, hidden)
        self.linear_2 = nn.Linear(hidden, dim)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, t: Tensor, lam: Tensor) -> Tensor:
        """t, lam [B] float32 -> [B, dim]."""
        return self.linear_2(torch.nn.functional.silu(self.linear_1(noise_features(t, lam))))


@contextlib.contextmanager
def added_to_time(time_embedder: nn.Module, shift: Tensor) -> Iterator[None]:
    """Inside, ``shift`` [B, dim] is added to whatever ``time_embedder`` returns.

    It is a hook, not a changed network, so that weights keep the names that diffusers loads and saves.
    """
    handle = time_embedder.register_forward_hook(lambda module, inputs, output: output + shift.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()
