"""A score model, warm-started, against proximal pre-training from nothing: the figures of docs/warm-start.md.

    PYTHONPATH=.:tests python tests/studies/warm_start.py --run RUN_DIR --out FOLDER [--seeds 0 1] [--steps 1040]
    PYTHONPATH=.:tests python tests/studies/warm_start.py --out FOLDER --plot [--image docs/images/warm_start.png]

RUN_DIR is a quickstart run whose ``prepare`` stage is done (run.stages=[prepare]): its config, text encoder and judge
are used. A seed names initial weights, portraits and draws; prompts, evaluation noise, text encoder and judge are the
same for all. With T = --steps, each seed trains

- ``prox``: proximal matching from nothing, T steps;
- ``half``: a score model (denoising score matching), T/2 steps;
- ``warm``: ``half`` made a proximal network, then T/2 steps of proximal matching;
- ``score``: a score model, T steps;
- ``control``: ``warm`` with ``half`` left out: its network, untrained, and T/2 steps of proximal matching;
- ``gentle``: ``warm`` at a quarter of the learning rate.

All take the config's batch, optimizer and EMA, and its learning-rate plan over their own steps. One step is one forward
and one backward in all of them. Score models are judged by the warm start's formula. FOLDER keeps a line of JSON for
each judgement and the weights of each finished arm: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fixtures.score import ScoreModel, draw_times, matching_loss, perturb
from fixtures.score import sample as score_sample
from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.pretrain import Matching, drop_captions, first_samples, start_denoiser
from rlproxi.config.loading import Config, load_config
from rlproxi.data import faces
from rlproxi.data.faces import collection
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation.heldout import mean_and_error
from rlproxi.models.loading import load_encoder
from rlproxi.models.pipeline import to_uint8
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.models.preconditioning import noise_features
from rlproxi.models.text import operator
from rlproxi.models.unet import ProximalUNet
from rlproxi.proximal.samplers import plan, sample
from rlproxi.proximal.warmstart import WarmStart
from rlproxi.rewards.attributes import AttributeJudge
from rlproxi.seeds import NamedNoise, generator, rng

ROOT = Path(__file__).parents[2]
COUNTS = (3, 6, 16)
ARMS = ("prox", "half", "warm", "score", "control", "gentle")


class WarmNetwork(nn.Module):
    """eps_prox(y, t, lam, text) of a score model's backbone, by the warm start's formula.

    ``told_lam``: the network hears lam beside t'. See ``forget_lam`` for why that changes nothing at first.
    """

    def __init__(self, backbone: ProximalUNet, told_lam: bool):
        super().__init__()
        self.backbone = backbone
        score = ScoreModel(backbone)
        self.formula = WarmStart(lambda x, t, cond: score(x, t, *cond), "epsilon", backbone.schedule)
        self.told_lam = told_lam

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, text) -> Tensor:
        return self.formula(y, t, lam, (text, lam if self.told_lam else None))


@torch.no_grad()
def forget_lam(backbone: ProximalUNet) -> None:
    """Zeroes the weights that read lam; what they gave at lam = 0, all that score training shows them, goes into the
    bias. The network answers as before, whatever lam it is told, and can learn to listen."""
    reader = backbone.embed_noise[0]
    reader.bias += reader.weight[:, 64:] @ noise_features(torch.zeros(1), torch.zeros(1))[0, 64:]
    reader.weight[:, 64:] = 0


class Judged:
    """Held-out accuracy of denoisers, always on the same prompts and noise."""

    def __init__(self, config: Config, run_dir: Path):
        self.size, self.sampler, self.schedule = config.data.size, config.sampler, config.schedule.build()
        self.text = load_encoder(run_dir / "models" / "text")
        self.judge = AttributeJudge(str(run_dir / "models" / "judge.safetensors"))
        self.prompts = heldout_prompts(config)[1]
        self.dtype = compute_dtype(config.model.precision, "cpu")

    @torch.no_grad()
    def __call__(self, denoiser: nn.Module, samples: int) -> dict[int, dict[str, float]]:
        """N -> {"mean", "sem"} of images drawn in N steps."""
        found = {}
        for count in COUNTS:
            scores = []
            for first in range(0, len(self.prompts), 16):
                prompts = self.prompts[first : first + 16]
                noise = NamedNoise([(0xEA1, first + p, i) for p in range(len(prompts)) for i in range(samples)])
                with autocast(self.dtype, "cpu"):
                    x = self._draw(denoiser, count, noise, self.text.groups(prompts, samples))
                scores.append(self.judge.score(to_uint8(x), [p for p in prompts for _ in range(samples)]))
            found[count] = mean_and_error(np.concatenate(scores), samples)
        return found

    def _draw(self, denoiser: nn.Module, count: int, noise: NamedNoise, text) -> Tensor:
        """By the config's proximal sampler; a bare ScoreModel by DDIM on the same times."""
        s, x = self.sampler, noise.start((3, self.size, self.size))
        if isinstance(denoiser, ScoreModel):
            times = self.schedule.grid(count, s.start_time, s.grid)
            return score_sample(denoiser, self.schedule, "ddim", times, x, text, noise)
        steps = plan(self.schedule, s.name, count, s.start_time, s.grid)
        return sample(operator(denoiser, self.text, 1.0), steps, x, text, noise).x


class Seed:
    """All arms of one seed; FOLDER/seed-<s>.jsonl and FOLDER/seed-<s>-<arm>.safetensors."""

    def __init__(self, config: Config, judged: Judged, seed: int, options: argparse.Namespace):
        self.config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        self.judged, self.seed, self.options = judged, seed, options
        self.log = options.out / f"seed-{seed}.jsonl"

    def run(self, arm: str) -> None:
        unet, first = start_denoiser(self.config, first_samples(self.config, None, None)), 0
        steps = self.options.steps if arm in ("prox", "score") else self.options.steps // 2
        if arm in ("warm", "gentle"):
            unet.load_state_dict(load_file(self.weights("half")))
            first = steps
        if arm in ("warm", "control", "gentle"):
            untold = self._probe(WarmNetwork(unet, told_lam=False))
            forget_lam(unet)
            assert torch.allclose(self._probe(WarmNetwork(unet, told_lam=True)), untold, atol=1e-4), "not the formula"
        self._train(arm, unet, steps, first)

    @torch.no_grad()
    def _probe(self, denoiser: nn.Module) -> Tensor:
        y = torch.randn((4, 3, self.config.data.size, self.config.data.size), generator=generator(7))
        return denoiser(
            y,
            torch.linspace(0, 0.6, 4),
            torch.tensor([0.1, 0.5, 2.0, 4.0]),
            self.judged.text.encode(self.judged.prompts[:4]),
        )

    def _train(self, arm: str, unet: ProximalUNet, steps: int, first: int) -> None:
        p = self.config.pretrain
        matching = Matching(self.config.with_section("pretrain", steps=steps, lr=p.lr / (4 if arm == "gentle" else 1)))
        score = ScoreModel(unet) if arm in ("half", "score") else None
        # Judged is the average of the weights, in a network of the same kind.
        ema, average = EMA(unet, p.ema), copy.deepcopy(unet)
        denoiser, shown = (x if arm == "prox" else WarmNetwork(x, told_lam=score is None) for x in (unet, average))
        optimizer = torch.optim.AdamW(unet.parameters(), lr=p.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self._forget(arm)
        if first:
            self._record(arm, 0, 0.0, self.judged(shown, 2))
        seconds = 0.0
        for step in range(steps):
            begin = time.process_time()
            images, text = self._batch(first + step)
            with autocast(self.judged.dtype, "cpu"):
                loss = (
                    self._score_loss(score, images, text, first + step)
                    if score
                    else next(matching.losses(denoiser, images, text, step))[0]
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), p.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = matching.lr(step)
            optimizer.step()
            ema.update(dict(unet.named_parameters()))
            seconds += time.process_time() - begin
            if (step + 1) % self.options.every == 0 or step + 1 == steps:
                average.load_state_dict(ema.values, strict=False)  # all but the fitted Gaussian, which it has
                self._record(arm, step + 1, seconds, self.judged(shown, 2))
        self._record(f"{arm} final", steps, seconds, self.judged(shown, self.options.final))
        if score:
            self._record(f"{arm} ddim", steps, seconds, self.judged(ScoreModel(average), self.options.final))
        save_file({name: value.contiguous() for name, value in average.state_dict().items()}, self.weights(arm))

    def _batch(self, step: int):
        size = self.config.pretrain.batch_size
        data, rows = self.config.data, np.arange(step * size, (step + 1) * size)
        images, captions, _ = faces.batch(collection(self.seed, "pretrain"), rows, data.size, data.hand_fraction)
        captions = drop_captions(captions, data.caption_dropout, self.seed, step)
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, self.judged.text.encode(captions)

    def _score_loss(self, score: ScoreModel, x0: Tensor, text, step: int) -> Tensor:
        t = draw_times(rng(self.seed, 0x5C0E, step), len(x0))
        n = torch.randn(x0.shape, generator=generator(self.seed, 0x5C0E, step))
        return matching_loss(score(perturb(self.judged.schedule, x0, t, n), t, text), n).mean()

    def weights(self, arm: str) -> Path:
        """What a finished arm leaves, and the sign that it is finished."""
        return self.options.out / f"seed-{self.seed}-{arm}.safetensors"

    def _forget(self, arm: str) -> None:  # what an interrupted run left of it
        kept = [r for r in read(self.log) if r["arm"].split()[0] != arm] if self.log.is_file() else []
        self.log.write_text("".join(json.dumps(r) + "\n" for r in kept))

    def _record(self, arm: str, step: int, seconds: float, by_steps: dict[int, dict[str, float]]) -> None:
        with self.log.open("a") as log:
            print(
                json.dumps(
                    {
                        "seed": self.seed,
                        "arm": arm,
                        "step": step,
                        "total": self.options.steps,
                        "cpu_seconds": round(seconds, 1),
                        "judge": by_steps,
                    }
                ),
                file=log,
            )
        print(
            self.seed,
            arm,
            step,
            f"{seconds:.0f} s",
            *(f"N={n} {v['mean']:.3f}±{v['sem']:.3f}" for n, v in by_steps.items()),
            flush=True,
        )


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def curve(records: list[dict], arm: str, count: int) -> dict[int, np.ndarray]:
    """Step of that arm -> accuracy of each seed that has come so far."""
    found: dict[int, list[float]] = {}
    for r in records:
        if r["arm"] == arm:
            found.setdefault(r["step"], []).append(r["judge"][str(count)]["mean"])
    return {step: np.array(values) for step, values in sorted(found.items())}


def steps_to(reached: dict[int, np.ndarray], accuracy: float) -> float:
    """Where the mean curve, straight between judgements, first reaches ``accuracy``; NaN where it does not."""
    points = [(step, values.mean()) for step, values in reached.items()]
    for before, after in zip([points[0], *points], points):
        if after[1] >= accuracy:
            return float(np.interp(accuracy, (before[1], after[1]), (before[0], after[0])))
    return math.nan


def show(out: Path, image: Path) -> None:
    """Prints the tables and draws the curves. Raises FileNotFoundError where nothing has been judged yet."""
    records = [r for file in sorted(out.glob("seed-*.jsonl")) for r in read(file)]
    if not records:
        raise FileNotFoundError(f"{out} holds no seed-*.jsonl: judge with --run first, or name another --out")
    for count in COUNTS:
        print(f"\nN = {count}: mean over seeds [each seed]")
        for arm in sorted({r["arm"] for r in records}, key=lambda a: (ARMS.index(a.split()[0]), len(a))):
            for step, values in curve(records, arm, count).items():
                print(f"  {arm:14} {step:5}: {values.mean():.3f} [{' '.join(f'{v:.3f}' for v in values)}]")
        for step, values in curve(records, "warm", count).items():
            print(f"  warm after {step}: prox needs {steps_to(curve(records, 'prox', count), values.mean()):.0f} steps")
    print(
        "\nCPU seconds a step:",
        *(f"{r['arm'][:-6]} {r['cpu_seconds'] / r['step']:.3f}" for r in records if r["arm"].endswith(" final")),
    )
    draw(records, max(r["total"] for r in records), image)


def draw(records: list[dict], total: int, image: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    lines = [
        ("prox", 0, "C0", "-", "proximal matching from nothing"),
        ("score", 0, "C7", "-", "score model, formula only"),
        ("half", 0, "C1", ":", "score model for half the steps, formula only"),
        ("warm", total // 2, "C1", "-", "... then warm-started proximal matching"),
        ("warm", 0, "C2", "--", "the same, counting its proximal steps only"),
        ("gentle", total // 2, "C3", ":", "warm-started at a quarter of the learning rate"),
    ]
    for ax, count in zip(panels := figure.subplots(1, len(COUNTS), sharey=True), COUNTS):
        for arm, shift, colour, style, label in lines:
            points = curve(records, arm, count)
            if points:
                steps, low, mean, high = zip(*((k + shift, v.min(), v.mean(), v.max()) for k, v in points.items()))
                ax.plot(steps, mean, color=colour, linestyle=style, marker="o", markersize=3, label=label)
                ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axvline(total / 2, color="0.8", linewidth=1, zorder=0)
        ax.set(title=f"N = {count} sampling steps", xlabel="training steps")
        ax.grid(alpha=0.2)
    panels[0].set_ylabel("held-out judge accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(image, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run directory whose prepare stage is done")
    parser.add_argument("--out", type=Path, required=True, help="for judgements and weights; a started one goes on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=1040, help="T, the training steps that each side gets")
    parser.add_argument("--every", type=int, default=130, help="training steps between judgements")
    parser.add_argument("--final", type=int, default=4, help="samples of each prompt in the last judgement")
    parser.add_argument("--plot", action="store_true", help="only draw and tabulate what --out holds")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "warm_start.png")
    options = parser.parse_args()
    if options.plot:
        return show(options.out, options.image)
    if options.run is None or not (options.run / "models" / "judge.safetensors").is_file():
        parser.error(f"--run {options.run} has no models/judge.safetensors: name a run whose stage 'prepare' is done")
    options.out.mkdir(parents=True, exist_ok=True)
    judged = Judged(config := load_config(options.run / "config.yaml", ["pretrain.target=noise"]), options.run)
    for work in (Seed(config, judged, seed, options) for seed in options.seeds):
        for arm in options.arms:
            if not work.weights(arm).is_file():
                work.run(arm)


if __name__ == "__main__":
    main()
