"""The proximal network as an ordinary eps-model: the same weights and cost, told lam = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.unet import ProximalUNet
from ..proximal.operator import ProximalOperator, expand

#: eps(x, t, cond): the noise in x_t. x [B, ...], t [B], output like x.
EpsModel = Callable[[Tensor, Tensor, Any], Tensor]


class ScoreModel(nn.Module):
    """eps(x, t, cond) from a proximal network: ``backbone.estimate_noise`` at lam = 0.

    The backbone's own preconditioning is the prox's, whose eps vanishes at lam = 0. This one is the same closed
    form with the score model's split into signal and noise: signal = alpha_bar S, noise = 1 - alpha_bar, so
    F = 0 is the fitted Gaussian's exact E[n | x]. Same network, same inputs, same scaling: what is compared is
    the method.

    Args:
        backbone: a ``ProximalUNet``. Save and load that, it holds everything.
    """

    def __init__(self, backbone: ProximalUNet):
        super().__init__()
        self.backbone = backbone
        self.schedule = backbone.schedule

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, lam: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] float32, t [B] float32 in [0, 1]. Returns eps like x.

        lam [B] is what the network is told beside t, and changes nothing else: None tells it 0, as score training
        does; a warm start that goes on to proximal matching tells it the prox's.
        """
        alpha_bar = expand(self.schedule.alpha_bar(t), x)
        # 1 - alpha_bar without cancellation, and never 0, where F's scale would be 0/0.
        noise = expand(-torch.expm1(-self.schedule.integral(0.0, t)), x).clamp(min=1e-8)
        signal = alpha_bar * self.backbone.gaussian.variance
        return self.backbone.estimate_noise(
            x, alpha_bar, signal, noise, t, torch.zeros_like(t) if lam is None else lam, cond
        )


def guided(
    model: EpsModel,
    guidance_scale: float = 1.0,
    null_cond: Callable[[Any], Any] | None = None,
    join: Callable[[Any, Any], Any] | None = None,
) -> EpsModel:
    """Classifier-free guidance, eps_null + w (eps_c - eps_null): the proximal operator's own code.

    w = 1 costs one forward, any other w one forward on a doubled batch. Arguments and ValueError
    as in ``ProximalOperator``.
    """
    operator = ProximalOperator(lambda x, t, lam, cond: model(x, t, cond), guidance_scale, null_cond, join)
    return lambda x, t, cond=None: operator.residual(x, t, torch.zeros_like(t), cond)
