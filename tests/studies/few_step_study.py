"""What makes a proximal network good at four steps: the table of docs/few-steps.md.

    PYTHONPATH=. python tests/studies/few_step_study.py --run RUN_DIR --out FOLDER \\
        [--steps 520] [--arms ARM ...] [--plot FILE.png]

RUN_DIR is a quickstart run: its text encoder, classifier and judge are used. Each arm trains the quickstart's network,
from the same weights on the same portraits for the same number of steps, with matching's (t, lam) drawn for another
sampler, start time, grid or set of step counts, and is then drawn from in the ways of ``ASKED``: 64 held-out prompts,
four samples of each, the same first noise in all. One thread for each arm, no Ray. FOLDER keeps a line of JSON for each
measurement: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from arms import collected

from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.pretrain import Matching, drop_captions, first_samples, start_denoiser
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import Config, build_config, config_folder, load_config
from rlproxi.config.sections import Sampler
from rlproxi.data import faces
from rlproxi.data.faces import collection
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation.drawers import Own
from rlproxi.evaluation.heldout import mean_and_error
from rlproxi.evaluation.reference import Comparison
from rlproxi.models.loading import load_encoder, trainable
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.precision import autocast, compute_dtype
from rlproxi.rewards import build

#: AdamW's, as the pre-trainer has them.
BETAS = (0.9, 0.99)
FEW = [3, 4, 6, 8, 16]


def _arm(sampler: dict | None = None, schedule: dict | None = None, **pretrain) -> dict[str, dict]:
    return {
        "sampler": sampler or {},
        "schedule": schedule or {},
        "pretrain": {"candidates": FEW, "loss": "matching", "target": "noise", "weight": "lam", **pretrain},
    }


#: arm -> section -> what differs of the quickstart's.
ARMS: dict[str, dict[str, dict]] = {
    "paper, few": _arm({"start_time": 1.0}),
    "T 0.8": _arm(),
    "T 0.65": _arm({"start_time": 0.65}),
    "T 0.8, four steps only": _arm(candidates=[4]),
    "matched, T 1": _arm({"name": "matched", "start_time": 1.0}),
    "matched, T 0.8": _arm({"name": "matched"}),
    "matched, T 0.8, square": _arm({"name": "matched"}, loss="square"),
    "matched, T 0.8, expected": _arm({"name": "matched"}, target="expected"),
    "matched, T 0.8, expected, square": _arm({"name": "matched"}, target="expected", loss="square"),
    "T 1, expected": _arm({"start_time": 1.0}, target="expected"),
    "T 1, beta_max 12, expected": _arm({"start_time": 1.0}, {"beta_max": 12.0}, target="expected"),
    "T 0.65, expected": _arm({"start_time": 0.65}, target="expected"),
    "T 0.8, expected": _arm(target="expected"),
    "T 0.8, expected, gamma grid": _arm({"grid": "gamma"}, target="expected"),
    "T 0.8, expected, quadratic grid": _arm({"grid": "quadratic"}, target="expected"),
    "T 0.8, expected, four steps only": _arm(target="expected", candidates=[4]),
    "T 0.8, expected, zeta phases": _arm(target="expected", l1_fraction=0.6, zetas=[1.0, 0.5]),
    "T 0.8, expected, square": _arm(target="expected", loss="square"),
    "T 0.8, expected, square, by level": _arm(target="expected", loss="square", weight="level"),
    "ode, T 0.8, expected": _arm({"name": "ode"}, target="expected"),
    "score, T 0.8": _arm({"name": "ddim"}, loss="square"),
}
COUNTS = (4, 8, 16)
#: Ways beside the arm's own sampler in which its network is asked as well: (changes of the sampler, step counts).
BESIDE: dict[str, list[tuple[dict, tuple[int, ...]]]] = {
    "paper, few": [({"start_time": start}, COUNTS) for start in (0.65, 0.8)],
    "T 0.8": [
        ({"grid": "gamma"}, (4,)),
        ({"grid": "quadratic"}, (4,)),
        ({"start_time": 0.65}, (4,)),
        ({"name": "ode"}, COUNTS),
    ],
    "matched, T 0.8, expected": [({"eta": 1.0}, COUNTS), ({"name": "hybrid"}, COUNTS)],
    "matched, T 0.8, expected, square": [({"eta": 1.0}, COUNTS), ({"name": "hybrid"}, COUNTS)],
    "T 0.8, expected": [({"name": "matched"}, COUNTS)],
    "T 0.8, expected, square, by level": [
        ({"name": "matched"}, COUNTS),
        ({"name": "matched", "eta": 1.0}, COUNTS),
        ({"name": "ode"}, COUNTS),
    ],
    "matched, T 0.8": [({"eta": 0.5}, COUNTS), ({"eta": 1.0}, COUNTS), ({"name": "hybrid"}, COUNTS)],
    "score, T 0.8": [({"eta": 1.0}, COUNTS), ({"name": "euler"}, COUNTS), ({"name": "euler", "eta": 1.0}, COUNTS)],
}


def arm_config(run_dir: Path, arm: str, steps: int, seed: int) -> Config:
    values = load_config(config_folder() / "quickstart.yaml").model_dump(mode="json")
    path = lambda name: {"path": str(run_dir / "models" / f"{name}.safetensors")}  # noqa: E731
    values["run"]["seed"] = seed
    values["model"]["precision"] = "float32"  # the same rows on every machine
    for section, changes in ARMS[arm].items():
        values[section].update(changes)
    values["sampler"]["num_inference_steps"] = 4
    values["pretrain"]["steps"] = steps
    values["rewards"].update(
        train=[{"name": "attributes", "params": path("reward")}], heldout=[{"name": "judge", "params": path("judge")}]
    )
    values["run"]["stages"] = ["pretrain"]
    return build_config(values)


def train(config: Config, run_dir: Path, log) -> TextToImage:
    """The pre-trainer's loop (actors/train/pretrainer.py) in one process."""
    p, seed = config.pretrain, config.run.seed
    torch.manual_seed(seed)
    encoder = load_encoder(run_dir / "models" / "pretrained")
    denoiser = start_denoiser(config, first_samples(config, None, None))
    matching = Matching(config)
    weights = trainable(denoiser)
    optimizer = torch.optim.AdamW(weights.values(), lr=p.lr, betas=BETAS, weight_decay=0.0, fused=True)
    ema, dtype = EMA(denoiser, p.ema), compute_dtype(config.model.precision, "cpu")
    for step in range(p.steps):
        indices = np.arange(step * p.batch_size, (step + 1) * p.batch_size)
        images, captions = faces.batch(
            collection(seed, "pretrain"), indices, config.data.size, config.data.hand_fraction
        )[:2]
        text = encoder.encode(drop_captions(list(captions), config.data.caption_dropout, seed, step))
        x0 = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        for loss, values in matching.losses(lambda *asked: _forward(denoiser, dtype, *asked), x0, text, step):
            loss.backward()
            metrics = values
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), p.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = matching.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(weights)
        if step % 20 == 0:
            log(f"step {step} of {p.steps}: {metrics['loss']:.4f}")
    with torch.no_grad():
        for name, value in ema.values.items():
            weights[name].copy_(value)
    return TextToImage(denoiser, encoder, config.schedule, config.sampler)


def _forward(denoiser, dtype: torch.dtype, *asked) -> torch.Tensor:
    with autocast(dtype, "cpu"):
        return denoiser(*asked)


def measured(config: Config, model: TextToImage, sampler: Sampler, steps: int) -> tuple[dict[str, float], np.ndarray]:
    indices, prompts = heldout_prompts(config)
    request = SampleRequest(
        "heldout", 0, tuple(prompts), tuple(indices), config.evaluate.samples, num_steps=steps, guidance_scale=1.0
    )
    images = Own(model, sampler.model_dump()).draw(request, 0)
    found = {
        r.name: mean_and_error(build(r.kind, r.params).score(images, list(request.rows)), config.evaluate.samples)
        for r in [*config.rewards.train, *config.rewards.heldout]
    }
    seen = Comparison(config)(images)
    return (
        {
            **{name: value["mean"] for name, value in found.items()},
            "judge_sem": found[config.rewards.heldout[0].name]["sem"],
            "diversity": seen["diversity"],
            **seen["distance"],
        },
        images[:: config.evaluate.samples],
    )


def job(run: str, out: Path, steps: int, arm: str, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    run_dir, folder = Path(run), out / f"{arm}-{seed}".replace(", ", "-").replace(" ", "")
    config = arm_config(run_dir, arm, steps, seed)
    if not (folder / "model_index.json").is_file():
        with open(f"{folder}.log", "w", encoding="utf-8") as file:
            train(config, run_dir, lambda line: print(line, file=file, flush=True)).save_pretrained(folder)
    model, rows = TextToImage.from_pretrained(folder), []
    for changes, counts in [({}, COUNTS), *BESIDE.get(arm, [])]:
        for count in counts:
            sampler = config.sampler.model_copy(update=changes)
            values, images = measured(config, model, sampler, count)
            rows.append({"arm": arm, "seed": seed, "asked": changes, "steps": count, **values})
            if not changes:
                np.save(f"{folder}-{count}.npy", images[:12])
    return rows


def table(rows: list[dict]) -> str:
    """Means over seeds; the judge's standard error over prompts, or its deviation over seeds where there are more."""
    keys = list(dict.fromkeys((row["arm"], json.dumps(row["asked"])) for row in rows))
    keys.sort(key=lambda key: list(ARMS).index(key[0]))
    lines = [
        f"| trained for | asked by | {' | '.join(f'{n} steps' for n in COUNTS)} |",
        "|---|---|" + "---|" * len(COUNTS),
    ]
    for arm, asked in keys:
        cells = []
        for count in COUNTS:
            found = [row for row in rows if (row["arm"], json.dumps(row["asked"]), row["steps"]) == (arm, asked, count)]
            judge = [row["judge"] for row in found]
            cells.append(
                f"{np.mean(judge):.3f} / {np.mean([row['total'] for row in found]):.3f} / "
                f"{np.mean([row['diversity'] for row in found]):.3f}"
                if found
                else ""
            )
        words = ", ".join(f"{key} {value}" for key, value in json.loads(asked).items()) or "the same"
        lines.append(f"| {arm} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(out: Path, rows: list[dict], file: Path) -> None:
    """A row of twelve prompts for each arm at four steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = [row for row in rows if not row["asked"] and row["seed"] == 0 and row["steps"] == 4]
    first.sort(key=lambda row: list(ARMS).index(row["arm"]))
    figure, axes = plt.subplots(len(first), 1, figsize=(8, 0.7 * len(first)), squeeze=False)
    for axis, row in zip(axes[:, 0], first):
        name = f"{row['arm']}-{row['seed']}".replace(", ", "-").replace(" ", "")
        axis.imshow(np.concatenate(list(np.load(out / f"{name}-4.npy")), 1))
        axis.set_ylabel(
            f"{row['arm']}\n{row['judge']:.2f} / {row['total']:.2f}", rotation=0, ha="right", va="center", fontsize=7
        )
        axis.set(xticks=[], yticks=[])
    figure.subplots_adjust(left=0.27, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    wanted = [(arm, seed) for seed in options.seeds for arm in options.arms] if options.run else []
    rows = collected(options.out, partial(job, options.run, options.out, options.steps), wanted, options.processes)
    print(table(rows))
    if options.plot:
        plot(options.out, rows, options.plot)


if __name__ == "__main__":
    main()
