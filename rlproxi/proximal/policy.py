"""The auxiliary-variable policy of ProxT2I: the state is the prox's *input* z.

x_{k-1} given x_k is a Gaussian pushed through a network and has no density. z_{k-1} given z_k has one:

    pi_theta(z_{k-1} | z_k, c) = N(a_{k-1} prox_theta(z_k; t_{k-1}, lam_k, c), s_{k-1}^2 I)

for k = N..2. So N steps give N - 1 actions, and x_0 = prox_theta(z_1) is deterministic.

For ``ddim``, ``euler`` and ``matched`` with eta > 0 the noise comes after the prox: z_{k-1} = a_{k-1} (b_k P + d_k x_k
+ e_k n), with P the prox's output. This is a Gaussian in z too, and a part of its mean does not depend on theta.

Ratios and divergences are computed in float32, or in the inputs' dtype where that is wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .samplers import Step

#: Over a sample's dimensions.
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Action:
    """The draw of z_{k-1} after the prox at ``step`` (k), with the next step's a and s."""

    index: int  # position of ``step`` in the plan, 0 = k = N
    step: Step
    a: float  # what the prox is multiplied by: a_{k-1} b_k
    s: float  # spread of z_{k-1}
    shift: float = 0.0  # what z_k is multiplied by beside it: a_{k-1} d_k / a_k, where x_k = z_k / a_k

    def free(self, z: Tensor, z_next: Tensor) -> Tensor:
        """Return z_{k-1} without the part of its mean that does not depend on theta, as ``log_ratio`` takes it."""
        return z_next - self.shift * z if self.shift else z_next


def actions(steps: list[Step]) -> list[Action]:
    """Return the N - 1 actions of a plan. Raises ValueError where the sampler draws no noise, or N is 1."""
    if len(steps) < 2:
        raise ValueError("sampler.num_inference_steps is 1: N steps give N - 1 actions to train, so use at least 2")
    found = [
        Action(i, step, nxt.a * step.b, math.hypot(nxt.s, nxt.a * step.e), nxt.a * step.d / step.a)
        for i, (step, nxt) in enumerate(pairwise(steps))
    ]
    if any(action.s == 0.0 for action in found):
        raise ValueError(
            "the sampler draws no noise and so has no policy to train: set sampler.name to hybrid or backward, or "
            "sampler.eta above 0 with ddim, euler or matched, or leave 'rl' out of run.stages"
        )
    return found


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _reduce(x: Tensor, reduction: Reduction) -> Tensor:
    flat = x.flatten(1)
    return {"mean": flat.mean, "sum": flat.sum}[reduction](1)  # a KeyError for another word


def log_ratio(
    action: Action,
    prox_new: Tensor,
    prox_old: Tensor,
    z_next: Tensor,
    reduction: Reduction = "mean",
    regulated: bool = False,
) -> Tensor:
    """Return ln pi_new(z_next | z) - ln pi_old(z_next | z) of each sample, [B].

    With delta = a (P_new - P_old)/s and the drawn noise n = (z_next - a P_old)/s, it is <n, delta> - 1/2 ||delta||^2.
    So it is exactly 0 where P_new == P_old, and no two large squares are subtracted.

    Args:
        prox_new, prox_old: [B, ...], the prox's outputs P_new and P_old.
        z_next: [B, ...] as ``Action.free`` gives it.
        reduction: ``sum`` over dimensions, or ``mean``, which divides by their number.
        regulated: return s <n, delta> instead (the idea of GRPO-Guard). It lacks the quadratic term, which is never
            positive, and its unit does not depend on the step, so that one clip range fits all steps.
    """
    prox_new, prox_old, z_next = _widen(prox_new, prox_old, z_next)
    delta = (prox_new - prox_old) * (action.a / action.s)
    drawn = (z_next - action.a * prox_old) / action.s
    if regulated:
        return action.s * _reduce(delta * drawn, reduction)
    return _reduce(delta * drawn - 0.5 * delta * delta, reduction)


def kl(action: Action, prox_new: Tensor, prox_ref: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the exact KL(pi_new || pi_ref) of one step, 1/2 ||a (P_new - P_ref)/s||^2, of each sample, [B]."""
    prox_new, prox_ref = _widen(prox_new, prox_ref)
    delta = (prox_new - prox_ref) * (action.a / action.s)
    return _reduce(0.5 * delta * delta, reduction)


def log_prob(action: Action, prox: Tensor, z_next: Tensor) -> Tensor:
    """Return ln N(z_next; a prox, s^2 I) summed over dimensions, [B]. For checks; training uses ``log_ratio``."""
    residual = (z_next - action.a * prox) / action.s
    dims = residual[0].numel()
    const = dims * (torch.log(torch.tensor(2 * torch.pi * action.s**2, dtype=residual.dtype)))
    return -0.5 * (residual.flatten(1).square().sum(1) + const)
