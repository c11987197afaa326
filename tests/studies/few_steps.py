"""GRPO, R0 and DIDR with their baselines at equal compute, on the embedded portraits: the table of docs/algorithms.md.

    PYTHONPATH=. python tests/studies/few_steps.py --run RUN_DIR --out FOLDER [--seeds 0 1 2] [--seconds 240]
        [--arms r0 didr ...] [--processes 2] [key=value ...]
    PYTHONPATH=. python tests/studies/few_steps.py --out FOLDER --plot [--image docs/images/few_steps.png]

RUN_DIR is a quickstart run: its starting policy (models/pretrained), classifier and judge are used. Every arm trains
that policy for the same CPU seconds of one thread, with the loss objects, rewards and optimizer of a real run and
without Ray; a seed names prompts and noise. FOLDER keeps a line of JSON for each (arm, seed) and its images: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from arms import collected

from rlproxi.algorithms.anchor import AnchoredAdamW
from rlproxi.algorithms.base import Algorithm, Batch, Parts, build_algorithm
from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.algorithms.rollout import GroupSampler, flatten
from rlproxi.config.loading import Config, build_config, load_config
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation.heldout import mean_and_error
from rlproxi.evaluation.reference import Comparison
from rlproxi.models.loading import load_encoder, trainable, training_form
from rlproxi.rewards import build
from rlproxi.rewards.combine import combine
from rlproxi.rewards.gradients import RewardGradients

FEW = ["sampler.num_inference_steps=4", "sampler.start_time=0.8"]
R0 = [*FEW, "run.algorithm=r0", "rl.lr=5.0e-5", "rl.warmup_steps=5", "rl.ema=0.9"]
ONE = [
    "sampler.num_inference_steps=1",
    "sampler.start_time=0.8",
    "run.algorithm=didr",
    "rl.lr=5.0e-5",
    "fake.lr=2.0e-4",
    "rl.warmup_steps=5",
    "rl.ema=0.9",
]
GRPO = [
    *FEW,
    "rl.lr=1.0e-4",
    "rl.warmup_steps=5",
    "grpo.kl_coef=0",
    "grpo.trained_steps=null",
    "rl.prompts_per_step=8",
]
#: arm -> overrides. ``start`` arms are not trained.
ARMS: dict[str, list[str]] = {
    **{
        f"start-{n}": ["run.algorithm=r0", f"sampler.num_inference_steps={n}", "sampler.start_time=0.8"]
        for n in (1, 4, 8, 16)
    },
    "grpo": GRPO,
    "grpo+last": [*GRPO, "grpo.last_step_weight=1.0"],
    "r0": R0,
    "r0+": [*R0, "r0.plus=true"],
    "r0-match": [*R0, "r0.distribution_weight=0.5", "fake.updates=1", "fake.lr=2.0e-4"],
    "r0-guidance": [*R0, "r0.guidance_weight=1.0"],
    "r0-free": [*R0, "rl.anchor=0", "rl.lr=2.0e-4"],
    "di": [*ONE, "didr.reward=none"],
    "di++": [*ONE, "didr.reward=terminal", "didr.reward_weight=150"],
    "didr": [*ONE, "didr.beta=0.03"],
}


@dataclass
class Local:
    """A learner of one process: the loop of actors/train/rank.py without engine, checkpoints and actors."""

    config: Config
    folder: Path

    def __post_init__(self) -> None:
        c, s = self.config, self.config.rl
        self.algorithm: Algorithm = build_algorithm(c)
        denoiser = training_form(self.folder, c, "rl")
        encoder = load_encoder(self.folder)
        self.networks = self.algorithm.networks(denoiser)
        self.optimizers = {
            name: AnchoredAdamW(
                list(trainable(network).values()),
                lr=s.lr,
                betas=s.betas,
                weight_decay=s.weight_decay,
                fused=True,
                anchor=s.anchor,
            )
            for name, network in self.networks.items()
        }
        self.ema = EMA(denoiser, s.ema) if s.ema else None
        reference = (
            training_form(self.folder, c, "rl").requires_grad_(False) if self.algorithm.needs_reference else None
        )
        gradients = (
            RewardGradients.build(c.rewards.train, None, self.algorithm.normalize_gradients, "cpu")
            if self.algorithm.needs_gradients
            else None
        )
        self.algorithm.connect(
            Parts(
                self.networks, self.networks, reference, encoder, gradients, denoiser.sample_shape, torch.device("cpu")
            )
        )
        self.sampler = GroupSampler.from_pretrained(c, self.folder)
        self.scorers = {r.name: build(r.kind, r.params) for r in c.rewards.train}

    def weights(self) -> np.ndarray:
        """Of the network that is evaluated, averaged where there is an average."""
        return flatten(self.ema.values if self.ema else trainable(next(iter(self.networks.values()))))

    def train(self, seconds: float, log) -> int:
        """Iterations until the process has used so many CPU seconds."""
        begun, iteration = time.process_time(), 0
        while time.process_time() - begun < seconds:
            metrics = self._iterate(self._batch(iteration))
            iteration += 1
            if iteration % 10 == 0:
                log({"iteration": iteration, "cpu": time.process_time() - begun, **metrics})
        return iteration

    def _batch(self, iteration: int) -> Batch:
        requests = self.algorithm.requests(iteration)
        if not self.algorithm.needs_rollouts:
            return Batch(iteration, requests, 0, 1)
        self.sampler.take(self.weights())
        sampled = [self.sampler.sample(request) for request in requests]
        rewards = [self._reward(images, request) for (images, _), request in zip(sampled, requests)]
        chains = [{key: torch.from_numpy(value) for key, value in chain.items()} for _, chain in sampled]
        return Batch(iteration, requests, 0, 1, np.concatenate(rewards).astype(np.float32), lambda j: chains[j])

    def _reward(self, images: np.ndarray, request: SampleRequest) -> np.ndarray:
        """[P, G], combined as in a real run."""
        r = self.config.rewards
        rows = list(request.rows)
        scores = {n: s.score(images, rows).reshape(len(request.prompts), -1) for n, s in self.scorers.items()}
        return combine(scores, {reward.name: reward.weight for reward in r.train}, r.normalize)

    def _iterate(self, batch: Batch) -> dict[str, float]:
        found: dict[str, float] = {}
        for update in self.algorithm.updates(batch):
            optimizer, network = self.optimizers[update.network], self.networks[update.network]
            count = self.algorithm.losses_per_update(1)[update.network]
            for loss, metrics in update.losses:
                (loss / count).backward()
                found |= metrics
            found["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.rl.grad_clip))
            for group in optimizer.param_groups:
                group["lr"] = update.lr
            optimizer.step()
            optimizer.zero_grad()
        if self.ema:
            self.ema.update(trainable(self.networks["policy"]))
        return {**found, **self.algorithm.metrics(batch)}


def judged(config: Config, sampler: GroupSampler, images_file: Path) -> dict[str, float]:
    """The held-out prompts at the config's own step count: the table's columns but the time."""
    indices, prompts = heldout_prompts(config)
    request = SampleRequest(
        "heldout",
        0,
        tuple(prompts),
        tuple(indices),
        config.evaluate.samples,
        num_steps=config.sampler.num_inference_steps,
        guidance_scale=1.0,
    )
    images = sampler.sample(request)[0]
    np.savez_compressed(images_file, images=images, prompts=np.array(prompts))
    scores = {
        r.name: mean_and_error(build(r.kind, r.params).score(images, list(request.rows)), config.evaluate.samples)
        for r in [*config.rewards.train, *config.rewards.heldout]
    }
    seen = Comparison(config)(images)
    return {
        **{name: value["mean"] for name, value in scores.items()},
        "judge_sem": scores[config.rewards.heldout[0].name]["sem"],
        "diversity": seen["diversity"],
        **seen["distance"],
    }


def job(run: str, out_dir: Path, seconds: float, overrides: list[str], arm: str, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    run_dir = Path(run)
    config = arm_config(run_dir, arm, overrides)
    folder = run_dir / "models" / "pretrained"
    begun = time.process_time()
    with open(out_dir / f"{arm}-{seed}.log", "w", encoding="utf-8") as file:

        def log(values: dict) -> None:
            print(json.dumps(values), file=file, flush=True)

        iterations = 0
        if not arm.startswith("start"):
            # The evaluation's prompts and noise are those of seed 0 in every arm; training is named by its own seed.
            local = Local(config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})}), folder)
            iterations = local.train(seconds, log)
        sampler = GroupSampler.from_pretrained(config, folder)
        if not arm.startswith("start"):
            sampler.take(local.weights())
            sampler.pipeline.save_pretrained(out_dir / "models" / f"{arm}-{seed}")
    return [
        {
            "arm": arm,
            "seed": seed,
            "iterations": iterations,
            "cpu": time.process_time() - begun,
            "overrides": overrides,
            **judged(config, sampler, out_dir / f"{arm}-{seed}.npz"),
        }
    ]


def arm_config(run_dir: Path, arm: str, overrides: list[str]) -> Config:
    path = lambda name: {"path": str(run_dir / "models" / f"{name}.safetensors")}  # noqa: E731
    p = load_config(run_dir / "config.yaml").pretrain
    values = {
        "fake": {"loss": "l2" if p.loss == "square" else "l1"},  # the fake score errs as the start does
        "rewards": {
            "train": [{"name": "attributes", "params": path("reward")}],
            "heldout": [{"name": "judge", "params": path("judge")}],
        },
        "run": {"stages": ["rl"]},
        "resources": {"threads": 1},
        "pretrain": {"candidates": p.candidates, "target": p.target},
        "evaluate": {"steps": [1]},
        "model": {"init": str(run_dir / "models" / "pretrained")},
    }
    return build_config(values, [*ARMS[arm], *overrides])


def seconds_per_image(run_dir: Path, repeats: int = 5) -> dict[str, float]:
    """arm -> CPU seconds, the fewest of a few calls on 32 images, one thread. Networks are equal: steps decide."""
    torch.set_num_threads(1)
    by_count: dict[int, float] = {}
    found = {}
    for arm in ARMS:
        config = arm_config(run_dir, arm, [])
        count = config.sampler.num_inference_steps
        if count not in by_count:
            sampler = GroupSampler.from_pretrained(config, run_dir / "models" / "pretrained")
            indices, prompts = heldout_prompts(config)
            request = SampleRequest(
                "heldout", 0, tuple(prompts[:8]), tuple(indices[:8]), 4, num_steps=count, guidance_scale=1.0
            )
            times = []
            for _ in range(repeats):
                begun = time.process_time()
                sampler.sample(request)
                times.append(time.process_time() - begun)
            by_count[count] = min(times) / request.images
        found[arm] = by_count[count]
    return found


COLUMNS = ("attributes", "judge", "diversity", "total", "layout", "texture")


def table(rows: list[dict], seconds: dict[str, float]) -> str:
    """Means over seeds, with their standard deviation where there are several."""
    lines = [
        "| arm | seeds | iterations | training reward | held-out judge | diversity | distance | layout | texture "
        "| ms an image |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted({row["arm"] for row in rows}, key=list(ARMS).index):
        found = [row for row in rows if row["arm"] == arm]
        cells = []
        for name in COLUMNS:
            values = [row[name] for row in found]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append(
            f"| {arm} | {len(found)} | {np.mean([row['iterations'] for row in found]):.0f} | "
            + " | ".join(cells)
            + f" | {1000 * seconds[arm]:.1f} |"
        )
    return "\n".join(lines)


def plot(out: Path, rows: list[dict], file: Path, arms: list[str], prompts: int = 6) -> None:
    """For each arm a row of its first seed's samples: the same prompts and noise in all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(arms), 1, figsize=(11, 0.62 * len(arms) + 0.4), squeeze=False)
    for axis, arm in zip(axes[:, 0], arms):
        row = min((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        images = np.load(out / f"{arm}-{row['seed']}.npz")["images"]
        samples = len(images) // 64
        shown = np.concatenate([images[p * samples + s] for p in range(prompts) for s in range(min(3, samples))], 1)
        axis.imshow(shown)
        axis.set_ylabel(
            f"{arm}\n{row['judge']:.2f} / {row['total']:.2f}", rotation=0, ha="right", va="center", fontsize=7
        )
        axis.set_xticks([])
        axis.set_yticks([])
    figure.subplots_adjust(left=0.1, right=0.995, top=0.995, bottom=0.005, hspace=0.08)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--image", type=Path)
    options = parser.parse_intermixed_args()
    wanted = [
        (arm, seed)
        for seed in options.seeds
        for arm in options.arms
        if options.run and not options.plot and not (arm.startswith("start") and seed != options.seeds[0])
    ]
    work = partial(job, options.run, options.out, options.seconds, options.overrides)
    rows = collected(options.out, work, wanted, options.processes)
    timed = options.out / "seconds.json"
    if options.run and not timed.is_file():
        timed.write_text(json.dumps(seconds_per_image(Path(options.run))))
    print(table(rows, json.loads(timed.read_text())))
    if options.image:
        plot(options.out, rows, options.image, [arm for arm in ARMS if any(row["arm"] == arm for row in rows)])


if __name__ == "__main__":
    main()
