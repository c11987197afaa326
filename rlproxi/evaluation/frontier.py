"""``rlproxi eval``: what models and samplers reach at each number of steps, with what it costs.

Any set of models (run directories, model folders, diffusers folders with or without a LoRA) and samplers is drawn from on the
same held-out prompts, judged by the same rewards, and told as a table, a CSV, a plot, a row of images and a line of JSON for each
measurement. Noise is named by (seed, prompt, sample), so two models, or a model today and tomorrow, get the same.
"""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from ..algorithms.requests import SampleRequest
from ..config.loading import Config, load_config
from ..data.prompts import heldout_prompts
from ..errors import ConfigError
from ..planning.preflight import with_paths
from ..run_directory import RunDirectory
from .drawers import Drawer, open_model, split_name
from .heldout import mean_and_error
from .reference import Comparison

LINES, CSV, TABLE, PLOT, IMAGES = "frontier.jsonl", "frontier.csv", "frontier.md", "frontier.png", "images"
#: Two-sided 95 % points of Student's t for 1 .. 30 degrees of freedom; 1.96 beyond.
_T = (
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


@dataclass(frozen=True)
class Measured:
    """One model by one sampler at one number of steps with one seed of the noise.

    reward: name -> mean over the samples; error: name -> standard error over prompts. ``distance`` and ``diversity`` as in
    ``reference``, None where there is nothing to compare with. seconds: for an image, all of its sampler call and decoding.
    """

    label: str
    model: str
    sampler: str
    steps: int
    seed: int
    reward: dict[str, float | None]
    error: dict[str, float | None]
    diversity: float | None
    distance: float | None
    seconds: float
    setting: str = (
        ""  # prompts, samples, guidance, arithmetic and whose judges: what was measured otherwise is another thing
    )

    @property
    def key(self) -> tuple:
        return self.label, self.model, self.sampler, self.steps, self.seed, self.setting


@dataclass(frozen=True)
class FrontierRow:
    """What is told of a label at a number of steps: figure -> (mean, half-width of its 95 % interval over runs and seeds).

    With a single measurement the interval of a reward is that over prompts, and the others have none (NaN).
    """

    label: str
    steps: int
    count: int
    figures: dict[str, tuple[float, float]]


def judge_of(config: Config) -> str:
    """The reward that the frontier is about: the first held-out one, else the first training reward."""
    return (config.rewards.heldout or config.rewards.train)[0].name


def settings(path: str | None, models: Sequence[str]) -> Config:
    """The config that names prompts, rewards and data: ``path``, or that of the first model that is a run directory.

    Raises ConfigError where there is none.
    """
    folders = [Path(path)] if path else [Path(split_name(model)[1]) for model in models]
    for folder in folders:
        file = RunDirectory(folder).config
        if file.is_file():
            return with_paths(load_config(file), folder)
    if path and Path(path).is_file():
        return load_config(path)
    raise ConfigError(
        f"{path} is neither a config nor a run directory"
        if path
        else "none of the models is a run directory, so nothing says which prompts and rewards: add --config RUN_DIR "
        "or --config FILE.yaml with its sections data, rewards and evaluate"
    )


class Frontier:
    """Measures, keeps every measurement in ``out``/frontier.jsonl, and goes on from there when asked again.

    Args:
        config: prompts, rewards and data. scorers: name -> scorer, held-out ones among them. batch: images of one sampler call.
    """

    def __init__(
        self,
        config: Config,
        scorers: dict[str, Any],
        out: Path,
        batch: int = 64,
        tell: Callable[[str], None] = print,
        setting: str = "",
    ):
        self.config, self.scorers, self.out, self.batch, self.tell, self.setting = (
            config,
            scorers,
            out,
            batch,
            tell,
            setting,
        )
        self.indices, self.prompts = heldout_prompts(config)
        self.compare = Comparison(config)
        self.measured = {m.key: m for m in read(out)}

    def measure(
        self,
        drawers: Iterable[Callable[[], Drawer]],
        names: Sequence[tuple[str, str, str]],
        steps: Sequence[int],
        seeds: Sequence[int],
        guidance: float | None = None,
    ) -> list[Measured]:
        """Every (drawer, step count, seed); ``names`` are each drawer's (label, model, sampler). Counts that a sampler cannot take
        are told and left out."""
        for make, name in zip(drawers, names):
            wanted = [(n, seed) for n in steps for seed in seeds if (*name, n, seed, self.setting) not in self.measured]
            drawer, cold = make() if wanted else None, True
            for n, seed in wanted:
                try:
                    self._one(drawer, name, n, seed, guidance, cold)
                    cold = False
                except ValueError as error:
                    self.tell(f"{name[0]}, {n} steps: left out: {' '.join(str(error).split())}")
        return list(self.measured.values())

    def _one(
        self, drawer: Drawer, name: tuple[str, str, str], steps: int, seed: int, guidance: float | None, cold: bool
    ) -> None:
        samples = self.config.evaluate.samples
        images, seconds = [], 0.0
        groups = max(1, self.batch // samples)
        for i in range(0, len(self.prompts), groups):
            part = slice(i, i + groups)
            request = SampleRequest(
                "heldout",
                seed,
                tuple(self.prompts[part]),
                tuple(self.indices[part]),
                samples,
                num_steps=steps,
                guidance_scale=guidance,
            )
            if cold and not images:
                drawer.draw(request, self.config.run.seed)  # the first call pays for what later ones find ready
            begun = time.perf_counter()
            images.append(drawer.draw(request, self.config.run.seed))
            seconds += time.perf_counter() - begun
        drawn = np.concatenate(images)
        rows = [prompt for prompt in self.prompts for _ in range(samples)]
        found = {kind: mean_and_error(scorer.score(drawn, rows), samples) for kind, scorer in self.scorers.items()}
        seen = self.compare(drawn)
        measured = Measured(
            *name,
            steps,
            seed,
            {kind: f["mean"] for kind, f in found.items()},
            {kind: f["sem"] for kind, f in found.items()},
            seen.get("diversity"),
            seen.get("distance", {}).get("total"),
            seconds / len(drawn),
            self.setting,
        )
        self.measured[measured.key] = measured
        if seed == 0:
            picture(
                drawn[::samples], self.out / IMAGES / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name[0])}-{steps:03d}.png"
            )
        append(self.out, measured)
        judge = judge_of(self.config)
        far = f", distance {measured.distance:.3f}" if measured.distance is not None else ""
        self.tell(
            f"{name[0]:<24} {steps:>3} steps, seed {seed}: {judge} {_number(measured.reward[judge])}{far}, "
            f"{1000 * measured.seconds:.1f} ms an image"
        )


def read(out: Path) -> list[Measured]:
    """The measurements that a folder holds; a line cut short by a kill is none."""
    file, found = out / LINES, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(Measured(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def append(out: Path, measured: Measured) -> None:
    """One line; one that a kill left without its end gets that first."""
    file = out / LINES
    torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("\n" * torn + json.dumps(asdict(measured)) + "\n")


# -- what is told of them -----------------------------------------------------------------


def rows(measured: Iterable[Measured]) -> list[FrontierRow]:
    """One for each label and number of steps, in the order of the labels' first measurement."""
    groups: dict[tuple[str, int], list[Measured]] = {}
    order: dict[str, int] = {}
    for m in measured:
        order.setdefault(m.label, len(order))
        groups.setdefault((m.label, m.steps), []).append(m)
    return [
        FrontierRow(label, steps, len(group), _figures(group))
        for (label, steps), group in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


def _figures(group: list[Measured]) -> dict[str, tuple[float, float]]:
    names = list(dict.fromkeys(name for m in group for name in m.reward))
    found = {name: interval([m.reward.get(name) for m in group], group[0].error.get(name)) for name in names}
    for name in ("diversity", "distance", "seconds"):
        found[name] = interval([getattr(m, name) for m in group])
    return found


def interval(values: Sequence[float | None], error: float | None = None) -> tuple[float, float]:
    """(mean, half-width of the 95 % interval) of independent values, by Student's t; of a single one 1.96 times ``error``."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    if len(known) == 1:
        return known[0], math.nan if error is None else 1.96 * error
    t = _T[len(known) - 2] if len(known) - 2 < len(_T) else 1.96
    return float(np.mean(known)), t * float(np.std(known, ddof=1)) / math.sqrt(len(known))


def reached(found: Sequence[FrontierRow], figure: str, level: float) -> dict[str, int | None]:
    """label -> the smallest number of steps at which ``figure`` is at or above ``level``; None: at none."""
    labels = dict.fromkeys(row.label for row in found)
    return {
        label: min((row.steps for row in found if row.label == label and row.figures[figure][0] >= level), default=None)
        for label in labels
    }


def table(found: Sequence[FrontierRow], figures: Sequence[str]) -> str:
    """Markdown: a line for each row, a column for each figure."""
    head = ["model", "steps", "n", *(f"{name}, ms" if name == "seconds" else name for name in figures)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in found:
        cells = [_cell(*row.figures[name], 1000 if name == "seconds" else 1) for name in figures]
        lines.append(f"| {' | '.join([row.label, str(row.steps), str(row.count), *cells])} |")
    return "\n".join(lines)


def _cell(mean: float, half: float, scale: float = 1) -> str:
    if math.isnan(mean):
        return "-"
    digits = 1 if scale > 1 else 3
    return f"{scale * mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {scale * half:.{digits}f}")


def _number(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3f}"


def write_csv(found: Sequence[FrontierRow], figures: Sequence[str], file: Path) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["model", "steps", "measurements", *(f"{name}{end}" for name in figures for end in ("", "_interval95"))]
        )
        for row in found:
            writer.writerow([row.label, row.steps, row.count, *(x for name in figures for x in row.figures[name])])


def plot(found: Sequence[FrontierRow], figures: Sequence[str], levels: dict[str, float] = {}) -> Figure:
    """Each figure against the number of steps, with its intervals. levels: figure -> a line to compare with.

    ``X`` and ``X + what was done to it`` have one colour, the latter dashed. Labels stand a little beside each other, so that
    their intervals can be told apart.
    """
    labels = list(dict.fromkeys(row.label for row in found))
    base = {label: re.sub(r" \+ [^,]*", "", label) for label in labels}
    families = list(dict.fromkeys(base.values()))
    figure = Figure(figsize=(5 * len(figures) + 2.4, 4.2), layout="constrained")
    ticks = sorted({row.steps for row in found})
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, name in zip(panels, figures):
        for place, label in enumerate(labels):
            points = [(row.steps, *row.figures[name]) for row in found if row.label == label]
            xs, ys, halves = (np.array(column, float) for column in zip(*points))
            family, tuned = families.index(base[label]), label != base[label]
            axes.errorbar(
                xs * 1.012 ** (place - (len(labels) - 1) / 2),
                ys,
                yerr=np.nan_to_num(halves),
                color=f"C{family % 10}",
                label=label,
                marker="osD^v<>P*X"[family % 10],
                linestyle="--" if tuned else "-",
                markerfacecolor="white" if tuned else None,
                markersize=4,
                capsize=2,
                elinewidth=0.8,
                linewidth=1.2,
            )
        if name in levels:
            axes.axhline(levels[name], color="gray", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="sampling steps", title=name, xticks=ticks)
        least = min(row.figures[name][0] for row in found)
        if (
            name == "distance" and least > 0
        ):  # few steps of a bad sampler are a hundred times as far as many of a good one
            axes.set(yscale="log", ylim=(least / 1.5, None))  # an interval may reach 0, which is nowhere on it
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def picture(images: np.ndarray, file: Path, prompts: int = 12) -> None:
    """A row of the first prompts' images, unpicked."""
    from .images import grid, save_png

    save_png(grid(images[:prompts], prompts, 3 if images.shape[1] < 128 else 1), file)


# -- the command --------------------------------------------------------------------------


def command(
    models: Sequence[str],
    steps: Sequence[int],
    samplers: Sequence[str],
    config: str | None,
    seeds: int,
    out: Path,
    prompts: int | None,
    samples: int | None,
    guidance: float | None,
    batch: int,
    device: str | None,
    precision: str,
    reach: str | None,
) -> int:
    """What ``rlproxi eval`` does; returns 0. Raises ValueError and the like for what the user can mend."""
    from ..rewards import build

    opened = [open_model(model, sampler, device, precision) for model in models for sampler in samplers or [""]]
    settled = settings(config, models)
    more = {key: value for key, value in (("prompts", prompts), ("samples", samples)) if value is not None}
    settled = settled.model_copy(update={"evaluate": settled.evaluate.model_copy(update=more)})
    out.mkdir(parents=True, exist_ok=True)
    scorers = {
        reward.name: build(reward.kind, reward.params) for reward in [*settled.rewards.heldout, *settled.rewards.train]
    }
    e, judges = (
        settled.evaluate,
        ", ".join(f"{r.name} {r.params}" for r in [*settled.rewards.heldout, *settled.rewards.train]),
    )
    setting = (
        f"{e.prompts} prompts x {e.samples}, run seed {settled.run.seed}, guidance {guidance}, {precision}, {judges}"
    )
    frontier = Frontier(settled, scorers, out, batch, lambda line: print(line, flush=True), setting)
    measured = frontier.measure(
        [make for _, make in opened], [name for name, _ in opened], steps, range(seeds), guidance
    )
    asked = list(dict.fromkeys(name for name, _ in opened))
    found = rows(
        m
        for name in asked
        for m in measured
        if (m.label, m.model, m.sampler) == name and m.setting == setting and m.steps in steps and m.seed < seeds
    )
    figures = [*scorers, "diversity", "distance", "seconds"]
    told, levels = table(found, figures), {}
    if reach:
        label, _, count = reach.rpartition("@")
        level = next(
            (row.figures[judge_of(settled)][0] for row in found if row.label == label and str(row.steps) == count), None
        )
        if level is None:
            raise ValueError(
                f"--reach {reach}: nothing was measured there; it is LABEL@STEPS, with labels "
                f"{', '.join(dict.fromkeys(row.label for row in found))}"
            )
        levels[judge_of(settled)] = level
        told += f"\n\nSteps until {judge_of(settled)} reaches the {level:.3f} of {label} at {count}:\n\n" + "\n".join(
            f"- {name}: {'not reached' if at is None else at}"
            for name, at in reached(found, judge_of(settled), level).items()
        )
    print(f"\n{told}\n")
    if frontier.compare.note:
        print(frontier.compare.note)
    (out / TABLE).write_text(told + "\n", encoding="utf-8")
    write_csv(found, figures, out / CSV)
    shown = [judge_of(settled), *(["distance"] if any(math.isfinite(r.figures["distance"][0]) for r in found) else [])]
    plot(found, shown, levels).savefig(out / PLOT, dpi=110)
    print("\n".join(str(out / name) for name in (TABLE, CSV, PLOT, IMAGES)))
    return 0
