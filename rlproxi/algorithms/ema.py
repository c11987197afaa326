"""Averaged weights: what pre-training hands on, and what a generator is evaluated and saved as."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.loading import trainable


class EMA:
    """An exponential moving average of parameters, warmed up: decay_k = min(decay, (1 + k)/(10 + k))."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.values = {name: p.detach().clone().float() for name, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]) -> None:
        """``weights``: name -> parameter, the same names."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self.values.items():
            value.lerp_(weights[name].to(value), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, and the number of updates."""
        return {**self.values, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where ``state`` is of another network."""
        wrong = [name for name, value in self.values.items() if name not in state or state[name].shape != value.shape]
        if wrong or "updates" not in state:
            raise ValueError(
                f"these averaged weights are of another network; missing or of another shape: "
                f"{', '.join([*wrong, 'updates'][:4])}"
            )
        self.updates = int(state["updates"])
        self.values = {name: state[name].to(value.device, copy=True) for name, value in self.values.items()}
