"""Distribution matching for one-step generators, in clean predictions D(y) = E[x_0 | y].

KL family (Diff-Instruct, DMD, DI++, DIDR): the gradient of the KL at one level is

    E[(s_fake - s_target)(y)^T alpha dx_0/dtheta],    s_fake - s_target = (alpha / sigma^2) (D_fake - D_target),

and any positive weight of the level may stand in for the factors (docs/method.md, section 4).

G = D_fake - D_target is how far the generator's clean prediction is from the target's.

Score divergences (DI*, arXiv 2410.20898): E d(s_fake - s_ref), by the identity of score implicit matching (SIM,
arXiv 2410.16794, theorem 3.1).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..proximal.clean import Clean, Level
from ..proximal.operator import expand


def normalise(gap: Tensor, x0: Tensor, clean_ref: Tensor) -> Tensor:
    """G / mean |x_0 - D_ref|, per sample (DMD's weight): the size of G no longer depends on the noise level.

    All [B, ...]; the result is detached.
    """
    scale = (x0 - clean_ref).detach().flatten(1).abs().mean(1).clamp_min(1e-6)
    return gap.detach() / expand(scale, gap)


def surrogate(x0: Tensor, gap: Tensor) -> Tensor:
    """1/2 ||x_0 - stop-grad(x_0 - G)||^2 / dims, per sample [B].

    Its gradient with respect to x_0 [B, ...] is G / dims: the mean over dimensions, so that the loss means the same at
    any size.
    """
    target = (x0 - gap).detach()
    return 0.5 * (x0 - target).flatten(1).square().mean(1)


def score_divergence(
    x0: Tensor, n: Tensor, level: Level, fake: Clean, ref: Clean, cond: Any = None, c: float | None = None
) -> Tensor:
    """DI*'s loss at one level, per sample [B]: -<d'(u), D_fake(y) - x_0>, with y = alpha x_0 + sigma n,
    u = D_fake(y) - D_ref(y), d the pseudo-Huber distance sqrt(||u||^2 + c^2) - c, d'(u) = u / sqrt(||u||^2 + c^2).

    Its gradient, averaged over x_0 and n, is that of E d(D_theta(y) - D_ref(y)), D_theta the exact clean prediction of
    the generator, *with y's distribution held still*: SIM's divergence, whose sampling distribution carries no
    gradient. Gradients flow through y, into both networks, and through x_0; neither network's weights may be
    among what is trained (freeze them).

    SIM writes it in scores. s_fake - s_ref = (alpha / sigma^2) u, so theirs with the constant alpha c / sigma^2 is
    alpha / sigma^2 times this one: a weight of the level, and a constant that follows it.

    Args:
        x0: the generator's samples [B, ...], with their graph.
        n: normal noise like x0.
        level: [B].
        fake, ref: clean predictions; the fake must be that of the generator as it is.
        c: None is 0.00054 sqrt(dims), the constant of improved consistency training (arXiv 2310.14189).
    """
    y = level.diffuse(x0, n)
    estimate = fake(y, level, cond)
    gap = estimate - ref(y, level, cond)
    dims = x0[0].numel()
    c = 0.00054 * dims**0.5 if c is None else c
    length = (gap.flatten(1).square().sum(1) + c**2).sqrt()
    return -(gap * (estimate - x0)).flatten(1).sum(1) / length
