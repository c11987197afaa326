"""Proximal warm start: an eps-, v- or flow-prediction model as the first proximal residual.

The prox's input is y = sqrt(ab) x_0 + sqrt(1 - ab + lam) n, with ab = alpha_bar(t). Up to a scale it is an ordinary
noisy sample, at the noise level of a later time. So a score model predicts E[n | y], and the L2 answer of proximal
matching, E[n_2 | y], is that times sqrt(lam / (lam + 1 - ab)).

Source: docs/method.md, section 1 (derived). It is exact where p_0 is Gaussian, for there mean and mode agree. Elsewhere
it is the result of MSE training, and proximal matching trains it further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .operator import expand
from .schedule import VPSchedule

#: model(x, time, cond) -> prediction. x [B, ...], time [B], output like x.
TimedModel = Callable[[Tensor, Tensor, Any], Tensor]


class WarmStart(nn.Module):
    """A ``Denoiser`` eps_prox(y, t, lam, cond) made of a model(x, time[B], cond).

    ``epsilon`` and ``v_prediction`` (v = alpha eps - sigma x_0) models are called at

        x = y / sqrt(1 + lam),  ab' = ab / (1 + lam),  t' = model_time(ab')

    and ``flow`` models (x_s = (1 - s) x_0 + s n, velocity n - x_0) at

        x = (1 - s) y / sqrt(ab),  s = r / (1 + r),  r = sqrt((1 - ab + lam) / ab).

    In hybrid and ode plans t' is never beyond the step's own old time t_k, for 1 + gamma <= exp(gamma). In ``backward``
    plans it can be, by a little: then ab' < alpha_bar(1) and t' > 1.

    The model gets one number, t', where the prox has two: (t, lam) pairs of equal ab' share their answer. That is right
    for the MMSE part and wrong for the prox, so a network for proximal matching should get lam too.

    Arithmetic on samples is float32 (float64 if y is), in whatever dtype the model answers. It is a Module so that
    ``parameters()`` reaches a model that is one.

    Args:
        prediction: ``epsilon``, ``v_prediction`` or ``flow``.
        schedule: the *proximal* schedule, which t and lam belong to.
        model_time: returns the time [B] that the model gets, in the model's own unit, for a noise level [B] in float64
            (ab', or s of a flow). Default: ``schedule.time_of_alpha_bar``, or s itself.
    """

    def __init__(
        self,
        model: TimedModel,
        prediction: str,
        schedule: VPSchedule,
        model_time: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self.prediction = prediction
        self.schedule = schedule
        self.model_time = model_time or ((lambda s: s) if prediction == "flow" else schedule.time_of_alpha_bar)

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, cond: Any = None) -> Tensor:
        """Return eps_prox, like y. y [B, ...]; t, lam [B]. lam = 0 gives 0, the limit."""
        work = torch.promote_types(y.dtype, torch.float32)
        # One number for each sample: float64 costs nothing, and a model's time may be in thousands.
        t, lam = t.double(), lam.double()
        alpha_bar = self.schedule.alpha_bar(t)
        variance = 1 - alpha_bar + lam  # of the noise in y
        predict = self._flow_noise if self.prediction == "flow" else self._vp_noise
        noise = predict(y.to(work), alpha_bar, variance, lam, cond)
        # The clamp only matters at t = lam = 0, where there is no noise to predict.
        share = (lam / variance.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return (expand(share.to(work), y) * noise).to(y.dtype)

    def _vp_noise(self, y: Tensor, alpha_bar: Tensor, variance: Tensor, lam: Tensor, cond: Any) -> Tensor:
        """Return E[n | y] from an eps or v model."""
        level = alpha_bar / (1 + lam)
        x = y / expand((1 + lam).sqrt().to(y.dtype), y)
        out = self.model(x, self.model_time(level).to(y.dtype), cond).to(y.dtype)
        if self.prediction == "epsilon":
            return out
        alpha, sigma = level.sqrt().to(y.dtype), (variance / (1 + lam)).sqrt().to(y.dtype)
        return expand(alpha, y) * out + expand(sigma, y) * x

    def _flow_noise(self, y: Tensor, alpha_bar: Tensor, variance: Tensor, lam: Tensor, cond: Any) -> Tensor:
        """Return E[n | y] from a flow model, as n = x_s + (1 - s) velocity: via x_0 digits would cancel at small s."""
        s = variance.sqrt() / (alpha_bar.sqrt() + variance.sqrt())
        x = expand(((1 - s) / alpha_bar.sqrt()).to(y.dtype), y) * y
        velocity = self.model(x, self.model_time(s).to(y.dtype), cond).to(y.dtype)
        return x + expand((1 - s).to(y.dtype), y) * velocity
