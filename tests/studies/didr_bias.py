"""The diffused reward proxy's bias: how strong each estimate pulls, and where training by it ends.

    PYTHONPATH=. python tests/studies/didr_bias.py [--image docs/images/didr_bias.png]

Prints, for a Gaussian on the line, the (mean, variance) at which each clamp leaves an affine generator (that training
does end there is checked by tests/algorithms/test_distillation.py); then, for the six modes of didr_modes.py, how far
each estimate is from the exact diffused reward score, by noise level. Under a minute.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import didr_modes as modes
import matplotlib
import numpy as np
import torch
from torch import Tensor

from rlproxi.algorithms.diffused_reward import denoise_steps
from rlproxi.proximal.clean import Ladder, Level
from rlproxi.proximal.matching import TimeTable
from rlproxi.proximal.schedule import VPSchedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCHEDULE = VPSchedule()
LADDER = Ladder(TimeTable(SCHEDULE, [100]), SCHEDULE)


def gaussian_steps(level: Level, m: int, eta: float | None) -> tuple[Tensor, Tensor]:
    """Slope of Phi_m in y and variance of its noise, [B] each, for p_ref = N(0, 1) on the line."""

    def clean(y: Tensor, at: Level, cond) -> Tensor:
        return (at.alpha / (at.alpha**2 + at.sigma**2))[:, None] * y

    leaves = [torch.zeros(len(level.t), 1, requires_grad=True) for _ in range(m)]
    x0 = denoise_steps(clean, leaves[0], level, LADDER, m, noise=lambda k, like: leaves[k], eta=eta)
    slope, *rest = torch.autograd.grad(x0.sum(), leaves, allow_unused=True)
    return slope[:, 0], sum((g[:, 0].square() for g in rest if g is not None), torch.zeros(len(slope)))


def draw_bias(image: Path, q: float = 1.0, optimum: float = -1.5) -> None:
    """p_ref = N(0, 1), r = -q/2 (x - optimum)^2, beta = 1: each estimate's pull against the exact one, and its end.

    With slope J and noise variance v_m of Phi_m, and infinitely many particles, the pull at y is
    -w q J (J y - optimum) / (1 + q v_m). An affine generator with an exact fake score then stops at the mean and
    variance where the level-averaged direction and its correlation with z vanish.
    """
    t = torch.linspace(0.02, 0.98, 200)
    level = Level.of(SCHEDULE, t, torch.full_like(t, 1e-4))
    h = level.alpha / (level.alpha**2 + level.sigma**2)
    v = 1 - level.alpha * h
    ways = {"exact": (h, v), "m=1": (h, 0 * v)}
    ways |= {f"m={m}, eta=0": gaussian_steps(level, m, 0.0) for m in (2, 4)}
    ways |= {f"m={m}, posterior noise": gaussian_steps(level, m, None) for m in (2, 4, 8)}

    def ends(slope: Tensor, spread: Tensor, kappa_max: float) -> tuple[float, float]:
        pull = (level.kappa.clamp(max=kappa_max) * q * slope / (1 + q * spread)).double()
        a, j = level.alpha.double(), slope.double()
        grid = torch.linspace(0, 1.2, 2401).double()
        fake = a * grid[:, None] / (a**2 * grid[:, None] + level.sigma.double() ** 2)
        excess = (a * (fake - h + pull * j)).mean(1)
        return float((pull * optimum).mean() / (1 - a * h + pull * j * a).mean()), float(grid[excess.abs().argmin()])

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    clamps = [math.inf, 100, 50, 20, 10, 7, 5, 4, 3, 2, 1.5, 1, 0.7, 0.5, 0.35, 0.25]
    for name, (slope, spread) in ways.items():
        left.loglog(level.sigma / level.alpha, (slope / h) ** 2 * (1 + q * v) / (1 + q * spread), label=name)
        path = [ends(slope, spread, k) for k in clamps]
        right.plot(*zip(*path), marker=".", markersize=4)
        print(f"{name:22}" + "  ".join(f"{k:g}: {m:.2f}, {s:.2f}" for k, (m, s) in zip(clamps, path)))
    right.plot(*ends(h, v, math.inf), "k*", markersize=13, label="target")
    right.plot(0, 1, "ko", label="reference")
    right.axvline(optimum, color="grey", linestyle=":", label="reward's optimum")
    left.set(xlabel="sigma / alpha", ylabel="slope of the estimated pull / slope of the true one")
    right.set(
        xlabel="mean",
        ylabel="variance",
        xlim=(-3.2, 0.3),
        title="where training ends, for clamps from none (left) to 0.25",
    )
    left.legend()
    right.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(image, dpi=90)


def estimator_errors(beta: float, batch: int = 2000) -> None:
    """Prints ||kappa (estimate - s_r)|| / ||kappa s_r|| on the six modes, root mean square over the target's own y."""
    modes.settle(beta)
    rng = torch.Generator().manual_seed(0)
    level = modes.LADDER.draw(np.random.default_rng(0), batch)
    y = level.diffuse(modes.TARGET.sample(batch, rng), torch.randn(batch, 2, generator=rng))
    exact = modes.exact_pull(y, level, rng)
    ratio = level.sigma / level.alpha
    bands = {
        f"{low:g} to {high:g}": (ratio >= low) & (ratio < high)
        for low, high in ((0, 0.3), (0.3, 1), (1, 3), (3, 10), (10, 1000))
    }
    tried = {"m=1": modes.plug_in(math.inf), "m=1, kappa<=5": modes.plug_in(5.0), "m=1 damped": modes.damped_pull}
    tried |= {f"m={m}, eta=0": modes.plug_in(math.inf, m, 1, 0.0) for m in (2, 4)}
    tried |= {f"m={m}, K={k}": modes.plug_in(math.inf, m, k) for m in (2, 4, 8) for k in (4, 64)}
    print(f"error of kappa s_r, beta {beta:g}, by sigma/alpha\n" + " " * 20 + "".join(f"{b:>12}" for b in bands))
    for name, pull in tried.items():
        error = (pull(y, level, rng) - exact).square().sum(1)
        cells = (math.sqrt(float(error[rows].mean() / exact[rows].square().sum(1).mean())) for rows in bands.values())
        print(f"{name:20}" + "".join(f"{c:12.2f}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=Path("docs/images/didr_bias.png"))
    draw_bias(parser.parse_args().image)
    for beta in (3.0, 1.0, 0.5):
        estimator_errors(beta)


if __name__ == "__main__":
    main()
