"""The learned proximal operator: prox(y; t, lam, c) = y - sqrt(lam) eps_theta(y, t, lam, c).

Source: ProxDM (arXiv 2507.08956), section 3: prox = argmin_x 1/2 ||x - y||^2 - lam ln p_t(x | c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: eps_theta(y, t, lam, cond) -> residual. y [B, ...], t and lam [B] float32, output like y.
Denoiser = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
#: prox(y, t, lam, cond) -> x, with scalar t and lam, the form that samplers call.
Prox = Callable[[Tensor, float, float, Any], Tensor]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Return [B] as [B, 1, ..., 1] with the number of dimensions of ``like``."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True, eq=False)
class ProximalOperator:
    """A ``Prox`` made of a denoiser, with proximal classifier-free guidance.

    Guidance (ProxT2I, derived): eps = eps_null + w (eps_c - eps_null), which is prox_null + w (prox_c - prox_null).
    w = 1 is no guidance and costs one forward, any other w costs one forward on a doubled batch.

    The network may compute in bfloat16. y, sqrt(lam) and the result stay in y's dtype, which is float32 in training and
    sampling (docs/method.md).

    Args:
        guidance_scale: w.
        with_null: returns a cond with its unconditional input behind it, along the batch; needed when w != 1.
    """

    denoiser: Denoiser
    guidance_scale: float = 1.0
    with_null: Callable[[Any], Any] | None = None

    def residual(self, y: Tensor, t: Tensor, lam: Tensor, cond: Any = None) -> Tensor:
        """Return the guided eps, a tensor like y. y [B, ...]; t, lam [B]."""
        w = self.guidance_scale
        if w == 1.0:
            return self.denoiser(y, t, lam, cond).to(y.dtype)
        assert self.with_null is not None, f"guidance_scale {w} needs with_null"
        both = self.with_null(cond)
        eps = self.denoiser(torch.cat([y, y]), torch.cat([t, t]), torch.cat([lam, lam]), both)
        eps_cond, eps_null = eps.to(y.dtype).chunk(2)
        return eps_null + w * (eps_cond - eps_null)

    def __call__(self, y: Tensor, t: float, lam: float, cond: Any = None) -> Tensor:
        """Return prox(y; t, lam, cond), like y, for one t and one lam that the batch shares."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        times, lams = (torch.full((len(y),), value, dtype=dtype, device=y.device) for value in (t, lam))
        return y - lam**0.5 * self.residual(y, times, lams, cond)
