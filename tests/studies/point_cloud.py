"""Proximal and score samplers on a cloud of points, with the exact prox and score: ProxDM's synthetic experiment.

    PYTHONPATH=.:tests python tests/studies/point_cloud.py [--plot docs/images/point_cloud.png] [--json FILE]

No network and no training: what differs is the sampler alone. W2 is the exact optimal transport between as many samples
as the target has points, and has a floor: a second draw of as many points from the same spiral.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fixtures.closed_form import PointCloud
from rlproxi.proximal.samplers import plan, sample, smallest_backward_steps
from rlproxi.proximal.schedule import VPSchedule
from rlproxi.score.samplers import sample as score_sample

COUNTS = (5, 7, 10, 20, 30, 40)
SCHEDULE = VPSchedule()
SAMPLERS = ("prox hybrid", "prox backward", "prox ode", "score euler_maruyama", "score ode", "score ddim")


def spiral(count: int, seed: int) -> Tensor:
    """[count, 2] float64 points of two arms, of variance 1 in each dimension."""
    draw = torch.Generator().manual_seed(seed)
    turn = 3 * math.pi * torch.rand(count, generator=draw, dtype=torch.float64).sqrt() + 0.6
    arm = torch.randint(2, (count,), generator=draw) * math.pi
    points = torch.stack([turn * torch.cos(turn + arm), turn * torch.sin(turn + arm)], 1)
    return points / points.std(0)


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact W2 of two clouds of equally many points."""
    cost = torch.cdist(a, b).square().numpy()
    return math.sqrt(cost[linear_sum_assignment(cost)].mean())


def draw(name: str, steps: int, cloud: PointCloud, count: int, seed: int) -> Tensor | None:
    """[count, 2] samples; None where the sampler cannot take so few steps."""
    family, sampler = name.split()
    generator = torch.Generator().manual_seed(seed)
    noise = lambda k, like: torch.randn(like.shape, dtype=like.dtype, generator=generator)  # noqa: E731
    x = noise(0, torch.zeros(count, 2, dtype=torch.float64))
    if family == "score":
        return score_sample(cloud.eps, SCHEDULE, sampler, SCHEDULE.grid(steps), x, noise=noise)
    if sampler == "backward" and steps < smallest_backward_steps(SCHEDULE, 1.0, "uniform"):
        return None
    return sample(cloud.prox, plan(SCHEDULE, sampler, steps), x, noise=noise).x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cloud = PointCloud(spiral(options.points, 0))
    floor = wasserstein2(cloud.points, spiral(options.points, 1))
    found: dict[str, dict[int, list[float]]] = {name: {} for name in SAMPLERS}
    shown: dict[tuple[str, int], Tensor] = {}
    print(f"W2 to {options.points} points, mean of {options.seeds} seeds; another draw of the target: {floor:.3f}\n")
    print(f"| sampler | {' | '.join(f'{n} steps' for n in COUNTS)} |\n|---|{'---|' * len(COUNTS)}")
    for name in SAMPLERS:
        for steps in COUNTS:
            clouds = [draw(name, steps, cloud, options.points, seed) for seed in range(options.seeds)]
            if clouds[0] is not None:
                found[name][steps] = [wasserstein2(x, cloud.points) for x in clouds]
                shown[name, steps] = clouds[0]
        cells = (f"{np.mean(found[name][n]):.3f}" if n in found[name] else "impossible" for n in COUNTS)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"floor": floor, "w2": found}))
    if options.plot:
        picture(cloud, shown, found, floor, options.plot)


def picture(cloud: PointCloud, shown: dict, found: dict, floor: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, rows = (5, 10, 20), ("prox hybrid", "score euler_maruyama", "score ddim")
    figure = pyplot.figure(figsize=(12, 6.6))
    grid = figure.add_gridspec(3, 5)
    for i, name in enumerate(rows):
        for j, steps in enumerate(columns):
            axis = figure.add_subplot(grid[i, j])
            axis.scatter(*cloud.points.T, s=2, color="lightgray")
            axis.scatter(*shown[name, steps].clamp(-4, 4).T, s=2, color="tab:orange" if i == 0 else "tab:blue")
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{steps} steps", fontsize=9) if i == 0 else None
            axis.set_ylabel(name, fontsize=8) if j == 0 else None
    axis = figure.add_subplot(grid[:, 3:])
    for name, by_steps in found.items():
        axis.plot(
            list(by_steps),
            [np.mean(values) for values in by_steps.values()],
            "o-" if name.startswith("prox") else "s--",
            label=name,
            markersize=4,
        )
    axis.axhline(floor, color="gray", linewidth=1, label="another draw of the target")
    axis.set(yscale="log", xlabel="steps", ylabel="W2 to the target")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
