"""Proximal warm start: any eps-, v- or flow-prediction model as a starting proximal residual.

The prox's input is y = sqrt(ab) x_0 + sqrt(1 - ab + lam) n, with ab = alpha_bar(t): up to a scale it is an
ordinary noisy sample, at the noise level of a later time. A score model therefore already knows
E[n | y], and proximal matching's L2 answer E[n_2 | y] is that times sqrt(lam / (lam + 1 - ab)).

Source: docs/method.md, section 1 (derived). Exact where p_0 is Gaussian (mean and mode agree);
elsewhere it is where MSE training would arrive, and proximal matching finishes the job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .operator import expand
from .schedule import VPSchedule

PREDICTIONS = ("epsilon", "v_prediction", "flow")

#: model(x, time, cond) -> prediction. x [B, ...], time [B], output like x.
TimedModel = Callable[[Tensor, Tensor, Any], Tensor]


class WarmStart(nn.Module):
    """A ``Denoiser`` eps_prox(y, t, lam, cond) made of a model(x, time[B], cond).

    ``epsilon`` and ``v_prediction`` (v = alpha eps - sigma x_0) models are fed

        x = y / sqrt(1 + lam),  ab' = ab / (1 + lam),  t' = told_time(ab')

    and ``flow`` models (x_s = (1 - s) x_0 + s n, velocity n - x_0) are fed

        x = (1 - s) y / sqrt(ab),  s = r / (1 + r),  r = sqrt((1 - ab + lam) / ab).

    Range of t': hybrid and ode plans never ask for a t' beyond the step's own old time t_k, for
    1 + gamma <= exp(gamma). ``backward`` can, by a little, and so can free (t, lam): then
    ab' < alpha_bar(1) and t' > 1, where ``schedule.inverse_integral`` simply goes on. ``max_time`` clamps
    the time the model is told (the input and the algebra keep the true level, so at the clamp the
    model is asked about slightly noisier inputs than it is told).

    The model sees one number, t', where the prox has two: (t, lam) pairs of equal ab' share their
    answer. True of the MMSE part, not of the prox, so a network that is to be fine-tuned by
    proximal matching should learn lam too.

    Arithmetic on samples is float32 (float64 if y is), whatever dtype the model answers in. It is a Module so
    that ``parameters()`` reaches a model that is one.

    Args:
        model: returns its prediction, shaped like x.
        prediction: ``epsilon``, ``v_prediction`` or ``flow``.
        schedule: the *proximal* schedule, which t and lam belong to.
        told_time: the noise level [B] in float64 (ab', or s of a flow) -> the time [B] the model is told, in the model's
            own units; default ``schedule.time_of_alpha_bar``, or s itself. A discrete diffusers schedule goes here.
        max_time: upper bound on the time the model is told, in its own units; None does not clamp.

    Raises:
        ValueError: unknown prediction.
    """

    def __init__(
        self,
        model: TimedModel,
        prediction: str,
        schedule: VPSchedule,
        told_time: Callable[[Tensor], Tensor] | None = None,
        max_time: float | None = None,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
        self.model = model
        self.prediction = prediction
        self.schedule = schedule
        self.told_time = told_time or ((lambda s: s) if prediction == "flow" else schedule.time_of_alpha_bar)
        self.max_time = max_time

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, cond: Any = None) -> Tensor:
        """eps_prox, like y. y [B, ...]; t, lam [B]. lam = 0 gives 0, the limit."""
        work = torch.promote_types(y.dtype, torch.float32)
        # One number for each sample: in float64 it costs nothing, and times are told in thousands.
        t, lam = t.double(), lam.double()
        alpha_bar = self.schedule.alpha_bar(t)
        variance = 1 - alpha_bar + lam  # of the noise in y
        noise = (self._flow_noise if self.prediction == "flow" else self._vp_noise)(
            y.to(work), alpha_bar, variance, lam, cond
        )
        # The clamp only matters at t = lam = 0, where there is no noise to predict.
        share = (lam / variance.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return (expand(share.to(work), y) * noise).to(y.dtype)

    def _vp_noise(self, y: Tensor, alpha_bar: Tensor, variance: Tensor, lam: Tensor, cond: Any) -> Tensor:
        """E[n | y] from an eps or v model."""
        level = alpha_bar / (1 + lam)
        x = y / expand((1 + lam).sqrt().to(y.dtype), y)
        out = self.model(x, self._told(level, y), cond).to(y.dtype)
        if self.prediction == "epsilon":
            return out
        alpha, sigma = level.sqrt().to(y.dtype), (variance / (1 + lam)).sqrt().to(y.dtype)
        return expand(alpha, y) * out + expand(sigma, y) * x

    def _flow_noise(self, y: Tensor, alpha_bar: Tensor, variance: Tensor, lam: Tensor, cond: Any) -> Tensor:
        """E[n | y] from a flow model. n = x_s + (1 - s) velocity directly: via x_0 it would cancel at small s."""
        s = variance.sqrt() / (alpha_bar.sqrt() + variance.sqrt())
        x = expand(((1 - s) / alpha_bar.sqrt()).to(y.dtype), y) * y
        velocity = self.model(x, self._told(s, y), cond).to(y.dtype)
        return x + expand((1 - s).to(y.dtype), y) * velocity

    def _told(self, level: Tensor, y: Tensor) -> Tensor:
        time = self.told_time(level)
        return (time if self.max_time is None else time.clamp(max=self.max_time)).to(y.dtype)
