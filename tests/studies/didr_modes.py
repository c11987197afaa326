"""DI, DI++ and DIDR on six modes: who keeps them?

    PYTHONPATH=. python tests/studies/didr_modes.py [--seeds 0 1 2] [--steps 1500] [--beta 3] [--image FILE]

The reference is a ring of six equal Gaussians in the plane, the reward r = -1/2 ||x - x*||^2 with x* on one of them, so
reference and tilted target have closed forms at every level. Generator and fake score are small MLPs, trained in turn
by the package's functions: the same initial weights, draws, steps and optimizer for every arm of a seed. Terminal
rewards are run at several weights, for nothing says which is the target's; the figure takes the one whose mean reward
is nearest to the target's, and the strongest.

Prints the averaged generators (EMA) against the target, a mean over seeds with the standard deviation:

- reward: its mean; TV, KL: the histogram over the nearest mode against the target's (KL target to samples);
- on a mode: samples within 3 standard deviations of the centre of one of the target's modes;
- weak modes: those at the three modes that the reward likes least, over the target's: 1 is kept, 0 is lost;
- energy: the energy distance to the target's samples, 2 E|x - y| - E|x - x'| - E|y - y'|.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from rlproxi.algorithms.diffused_reward import damped, denoise_steps, proxy
from rlproxi.algorithms.distillation import normalise, surrogate
from rlproxi.proximal.clean import Ladder, Level
from rlproxi.proximal.matching import TimeTable
from rlproxi.proximal.operator import expand
from rlproxi.proximal.schedule import VPSchedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCHEDULE = VPSchedule()
LADDER = Ladder(TimeTable(SCHEDULE, [50], spacing="quadratic"), SCHEDULE)
MODES, RADIUS, STD = 6, 2.0, 0.25
FAKE_UPDATES, BATCH, WIDTH = 3, 128, 64
DATA_STD = math.sqrt(RADIUS**2 / 2 + STD**2)


@dataclass(frozen=True)
class Mixture:
    """sum_i w_i N(m_i, var I) in the plane."""

    weights: Tensor
    means: Tensor
    var: float

    def clean(self, y: Tensor, level: Level, cond=None) -> Tensor:
        """E[x_0 | y], exact."""
        alpha, total = level.alpha[:, None], (level.alpha**2 * self.var + level.sigma**2)[:, None]
        logits = self.weights.log() - (y[:, None] - alpha[..., None] * self.means).square().sum(-1) / (2 * total)
        centre = torch.softmax(logits, 1) @ self.means
        return centre + alpha * self.var / total * (y - alpha * centre)

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        index = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        return self.means[index] + self.var**0.5 * torch.randn(count, 2, generator=rng)


ANGLES = 2 * math.pi * torch.arange(MODES) / MODES
REF = Mixture(torch.full((MODES,), 1 / MODES), RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), STD**2)
BEST = REF.means[1]


def reward(x: Tensor) -> Tensor:
    return -0.5 * (x - BEST).square().sum(-1)


def tilt(ref: Mixture, beta: float) -> Mixture:
    """ref times exp(r / beta): every Gaussian moves towards BEST, narrows, and is weighted by its integral."""
    share = ref.var / (ref.var + beta)
    logs = ref.weights.log() - (ref.means - BEST).square().sum(1) / (2 * (ref.var + beta))
    return Mixture(torch.softmax(logs, 0), ref.means + share * (BEST - ref.means), ref.var * (1 - share))


BETA = 3.0
TARGET = tilt(REF, BETA)


def settle(beta: float) -> None:
    """Another temperature, for all of this module."""
    global BETA, TARGET
    BETA, TARGET = beta, tilt(REF, beta)


class Stack(nn.Module):
    """R independent MLPs in one batched product: [R, B, inputs] -> [R, B, 2]. Run r starts from seeds[r] alone."""

    def __init__(self, inputs: int, seeds: list[int], layers: int = 3):
        super().__init__()
        sizes = [inputs] + [WIDTH] * layers + [2]
        draws = [torch.Generator().manual_seed(1000 + s) for s in seeds]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in itertools.pairwise(sizes):
            scale = (1 if b != 2 else 0.1) / math.sqrt(a)
            self.weights.append(torch.stack([scale * torch.randn(a, b, generator=g) for g in draws]))
            self.biases.append(torch.zeros(len(seeds), 1, b))

    def forward(self, x: Tensor) -> Tensor:
        for k, (w, b) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(b, x, w)
            x = nn.functional.silu(x) if k + 1 < len(self.weights) else x
        return x


def generate(net: Stack, z: Tensor) -> Tensor:
    return 1.5 * z + net(z)


def fake_clean(net: Stack, y: Tensor, level: Level) -> Tensor:
    """D_fake(y), preconditioned by a Gaussian of the data's spread. y [R, B, 2], level of [B], shared by the runs."""
    noise = (level.sigma / level.alpha)[:, None]
    spread = (DATA_STD**2 + noise**2).sqrt()
    x = y / level.alpha[:, None]
    features = torch.cat([x / spread, x.clamp(-4, 4), level.log_noise[:, None].expand(*y.shape[:-1], 1) / 2], -1)
    return DATA_STD**2 / spread**2 * x + noise * DATA_STD / spread * net(features)


def fake_loss(net: Stack, x0: Tensor, n: Tensor, level: Level) -> Tensor:
    """Denoising score matching with unit weight on the network's output."""
    y = level.alpha[:, None] * x0 + level.sigma[:, None] * n
    noise = level.sigma / level.alpha
    scale = (DATA_STD * noise / (DATA_STD**2 + noise**2).sqrt())[:, None]
    return ((fake_clean(net, y, level) - x0) / scale).square().mean((1, 2)).sum()


Pull = Callable[[Tensor, Level, torch.Generator], Tensor]


def plug_in(kappa_max: float, m: int = 1, particles: int = 1, eta: float | None = None) -> Pull:
    def pull(y: Tensor, level: Level, rng: torch.Generator) -> Tensor:
        score = proxy(
            y,
            lambda leaf, k: denoise_steps(
                REF.clean, leaf, level, LADDER, m, noise=lambda i, like: torch.randn(like.shape, generator=rng), eta=eta
            ),
            reward,
            BETA,
            particles,
        )
        return expand(level.kappa.clamp(max=kappa_max), y) * score

    return pull


def damped_pull(y: Tensor, level: Level, rng: torch.Generator) -> Tensor:
    return damped(y, lambda leaf, k: REF.clean(leaf, level), reward, BETA, level.kappa)


def exact_pull(y: Tensor, level: Level, rng: torch.Generator) -> Tensor:
    return TARGET.clean(y, level) - REF.clean(y, level)


#: name -> (kappa s_r or None, beta times the weight of the terminal reward)
ARMS: dict[str, tuple[Pull | None, float]] = {
    "DI": (None, 0.0),
    "DI++ 0.3/beta": (None, 0.3),
    "DI++ 0.6/beta": (None, 0.6),
    "DI++ 1.2/beta": (None, 1.2),
    "DIDR exact": (exact_pull, 0.0),
    "DIDR m=1": (plug_in(math.inf), 0.0),
    "DIDR m=1, kappa<=5": (plug_in(5.0), 0.0),
    "DIDR m=1 damped": (damped_pull, 0.0),
    "DIDR m=4, K=4": (plug_in(math.inf, 4, 4, None), 0.0),
}


def train(seeds: list[int], steps: int, lr: float = 3e-3) -> Tensor:
    """Samples [arms, seeds, 20000, 2] of the averaged generators."""
    runs = [s for _ in ARMS for s in seeds]
    generator, fake, average = Stack(2, runs), Stack(5, runs), Stack(2, runs)
    optimizers = [
        torch.optim.Adam(net.parameters(), rate, betas=(0.0, 0.99)) for net, rate in ((generator, lr), (fake, 2 * lr))
    ]
    draws = [torch.Generator().manual_seed(s) for s in seeds]
    levels = np.random.default_rng(seeds[0])

    def normals() -> Tensor:
        """Per seed, the same for every arm: [R, BATCH, 2]."""
        return torch.stack([torch.randn(BATCH, 2, generator=g) for g in draws]).repeat(len(ARMS), 1, 1)

    def fit_fake() -> None:
        with torch.no_grad():
            x0 = generate(generator, normals())
        optimizers[1].zero_grad()
        fake_loss(fake, x0, normals(), LADDER.draw(levels, BATCH)).backward()
        optimizers[1].step()

    for _ in range(200):
        fit_fake()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer, rate in zip(optimizers, (lr, 2 * lr)):
            optimizer.param_groups[0]["lr"] = rate * max(decay, 0.02)
        for _ in range(FAKE_UPDATES):
            fit_fake()
        level = LADDER.draw(levels, BATCH)
        x0 = generate(generator, normals())
        n = normals()
        with torch.no_grad():
            y = level.alpha[:, None] * x0 + level.sigma[:, None] * n
            estimate = fake_clean(fake, y, level)
        loss = 0.0
        for k, (pull, terminal) in enumerate(ARMS.values()):
            rows = slice(k * len(seeds), (k + 1) * len(seeds))
            many = Level(*(part.repeat(len(seeds)) for part in (level.t, level.lam, level.alpha, level.sigma)))
            x, noisy, own = (part[rows].flatten(0, 1) for part in (x0, y, estimate))
            ref = REF.clean(noisy, many)
            extra = 0 if pull is None else pull(noisy, many, draws[0])
            gap = normalise(own - ref - extra, x, ref)
            loss = loss + (surrogate(x, gap) - terminal / BETA * reward(x)).sum() / BATCH
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), generator.parameters()):
                kept.lerp_(now, 1.0 if step == 0 else 0.01)
    z = torch.stack([torch.randn(20_000, 2, generator=g) for g in draws]).repeat(len(ARMS), 1, 1)
    with torch.no_grad():
        return generate(average, z).unflatten(0, (len(ARMS), len(seeds)))


def shares(x: Tensor) -> Tensor:
    """The fraction of x [N, 2] nearest to each mode."""
    return torch.bincount(torch.cdist(x, REF.means).argmin(1), minlength=MODES) / len(x)


def energy(x: Tensor, y: Tensor, count: int = 3000) -> float:
    """The energy distance of two samples; pairs of a sample with itself are left out."""
    x, y = x[:count], y[:count]
    own = sum(torch.pdist(v).mean() for v in (x, y))
    return float(2 * torch.cdist(x, y).mean() - own)


def judge(x: Tensor, target: Tensor) -> dict[str, float]:
    """One run's samples [N, 2] against the target's."""
    found, wanted = shares(x), shares(target)
    weak = TARGET.weights.argsort()[:3]

    def near(points: Tensor, modes: Tensor) -> Tensor:
        return (torch.cdist(points, TARGET.means[modes]).amin(1) < 3 * STD).float().mean()

    return {
        "reward": float(reward(x).mean()),
        "TV": float((found - wanted).abs().sum() / 2),
        "KL": float((wanted * (wanted / found.clamp_min(1e-4)).log()).sum()),
        "on a mode": float(near(x, torch.arange(MODES))),
        "weak modes": float(near(x, weak) / near(target, weak)),
        "energy": energy(x, target),
    }


def table(samples: dict[str, Tensor], target: Tensor) -> None:
    keys = ("reward", "TV", "KL", "on a mode", "weak modes", "energy")
    print(f"{'':20}" + "".join(f"{k:>16}" for k in keys) + "   shares of the modes, from the best counter-clockwise")
    for name, runs in samples.items():
        rows = [judge(x, target) for x in runs]
        cells = [(np.mean([r[k] for r in rows]), np.std([r[k] for r in rows])) for k in keys]
        share = torch.stack([shares(x) for x in runs]).mean(0).roll(-1)
        print(
            f"{name:20}"
            + "".join(f"{f'{m:.3f} +- {s:.3f}':>16}" for m, s in cells)
            + "   "
            + " ".join(f"{100 * float(v):4.1f}" for v in share)
        )


def draw_modes(samples: dict[str, Tensor], image: Path) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for ax, (name, runs) in zip(axes.flat, samples.items()):
        ax.scatter(*runs[0][:4000].T, s=1, alpha=0.25, color="tab:blue" if name != "target" else "black", linewidths=0)
        ax.scatter(*BEST, marker="*", s=60, color="tab:red", zorder=3)
        for mean, wanted, found in zip(REF.means, shares(samples["target"][0]), shares(runs[0])):
            ax.text(
                *(1.42 * mean),
                f"{100 * float(found):.0f}",
                ha="center",
                va="center",
                fontsize=9,
                color="black" if found > wanted / 4 else "tab:red",
            )
        ax.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), aspect="equal", title=name)
    figure.text(0.5, 0.01, "Numbers: % of samples nearest to each mode. Star: the reward's optimum.", ha="center")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(image, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--beta", type=float, default=BETA)
    parser.add_argument("--image", type=Path, default=Path("docs/images/didr_modes.png"))
    args = parser.parse_args()
    settle(args.beta)
    torch.set_num_threads(1)
    started = time.perf_counter()
    targets = TARGET.sample(200_000, torch.Generator().manual_seed(7))
    trained = train(args.seeds, args.steps)
    samples = {"target": TARGET.sample(20_000, torch.Generator().manual_seed(8))[None], **dict(zip(ARMS, trained))}
    table(samples, targets)
    goal = float(reward(targets).mean())
    nearest = min((a for a in ARMS if a.startswith("DI++")), key=lambda a: abs(float(reward(samples[a]).mean()) - goal))
    shown = ["target", "DI", nearest, "DI++ 1.2/beta", "DIDR exact", "DIDR m=1", "DIDR m=1 damped", "DIDR m=4, K=4"]
    draw_modes({name: samples[name] for name in shown}, args.image)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
