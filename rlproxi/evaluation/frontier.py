"""``rlproxi eval``: the rewards that models and samplers reach at each number of steps, and their cost.

Models are run directories, model folders, or diffusers folders with or without a LoRA. All of them draw images for the
same held-out prompts, and the same rewards score them. The results are a table, a CSV, a plot, rows of images, and a
line of JSON for each measurement. Noise is named by (seed, prompt, sample), so two models get the same noise, today and
tomorrow.
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
from ..files import append_line
from ..planning.preflight import with_paths
from ..run_directory import RunDirectory
from .drawers import Drawer, open_model, split_name
from .heldout import mean_and_error
from .images import grid, save_png
from .reference import Comparison

LINES, CSV, TABLE, PLOT, IMAGES = "frontier.jsonl", "frontier.csv", "frontier.md", "frontier.png", "images"
_POINTS = (
    "12.71 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 "
    "2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042"
)
#: Two-sided 95 % points of Student's t for 1 .. 30 degrees of freedom; 1.96 beyond.
STUDENT_95 = tuple(map(float, _POINTS.split()))


@dataclass(frozen=True)
class Measurement:
    """The figures of one model with one sampler at one number of steps, for one seed of the noise.

    Attributes:
        reward: name -> mean over the samples. error: name -> standard error over prompts.
        diversity, distance: see ``reference``; None where there are no real images to compare with.
        seconds: of an image, its share of the sampler call and the decoding.
        setting: prompts, samples, guidance, arithmetic and judges. Measurements of other settings are kept apart.
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
    setting: str = ""

    @property
    def key(self) -> tuple:
        """What tells it from other measurements."""
        return self.label, self.model, self.sampler, self.steps, self.seed, self.setting


@dataclass(frozen=True)
class FrontierRow:
    """A label's line at a number of steps: figure -> (mean, half-width of its 95 % interval over runs and seeds).

    With a single measurement the interval of a reward is that over prompts, and other figures have none (NaN).
    """

    label: str
    steps: int
    count: int
    figures: dict[str, tuple[float, float]]


def judge_of(config: Config) -> str:
    """Return the name of the reward to compare: the first held-out one, else the first training reward."""
    return (config.rewards.heldout or config.rewards.train)[0].name


def settings(path: str | None, models: Sequence[str]) -> Config:
    """Load the config that names prompts, rewards and data: ``path``, else that of the first run directory in
    ``models``.

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
    """Takes measurements and keeps each in ``out``/frontier.jsonl. A later call goes on from there.

    Args:
        config: prompts, rewards and data.
        scorers: name -> scorer, held-out ones included.
        batch: images of one sampler call.
        tell: gets a line for each measurement.
        setting: of all measurements, see ``Measurement``.
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
        self.config, self.scorers, self.out = config, scorers, out
        self.batch, self.tell, self.setting = batch, tell, setting
        self.indices, self.prompts = heldout_prompts(config)
        self.compare = Comparison(config)
        self.measurements = {m.key: m for m in read(out)}

    def measure(
        self,
        drawers: Sequence[tuple[tuple[str, str, str], Callable[[], Drawer]]],
        steps: Sequence[int],
        seeds: Sequence[int],
        guidance: float | None = None,
    ) -> list[Measurement]:
        """Measure every (drawer, number of steps, seed) that is missing, and return all measurements.

        ``drawers`` are pairs as of ``open_model``. A number of steps that a sampler cannot take is left out with a
        message.
        """
        for name, load in drawers:
            done = self.measurements
            wanted = [(n, seed) for n in steps for seed in seeds if (*name, n, seed, self.setting) not in done]
            if not wanted:
                continue
            drawer, cold = load(), True
            for n, seed in wanted:
                try:
                    self._one(drawer, name, n, seed, guidance, cold)
                    cold = False
                except ValueError as error:
                    self.tell(f"{name[0]}, {n} steps: left out: {' '.join(str(error).split())}")
        return list(self.measurements.values())

    def _one(
        self, drawer: Drawer, name: tuple[str, str, str], steps: int, seed: int, guidance: float | None, cold: bool
    ) -> None:
        samples = self.config.evaluate.samples
        images: list[np.ndarray] = []
        seconds = 0.0
        groups = max(1, self.batch // samples)
        for i in range(0, len(self.prompts), groups):
            prompts, indices = tuple(self.prompts[i : i + groups]), tuple(self.indices[i : i + groups])
            request = SampleRequest("heldout", seed, prompts, indices, samples, (), steps, guidance)
            if cold and not images:
                drawer.draw(request, self.config.run.seed)  # the first call is slower, by what later ones find ready
            begun = time.perf_counter()
            images.append(drawer.draw(request, self.config.run.seed))
            seconds += time.perf_counter() - begun
        drawn = np.concatenate(images)
        rows = [prompt for prompt in self.prompts for _ in range(samples)]
        found = {kind: mean_and_error(scorer.score(drawn, rows), samples) for kind, scorer in self.scorers.items()}
        seen = self.compare(drawn)
        measured = Measurement(
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
        self.measurements[measured.key] = measured
        if seed == 0:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name[0])
            columns, scale = 12, 3 if drawn.shape[1] < 128 else 1
            save_png(grid(drawn[::samples][:columns], columns, scale), self.out / IMAGES / f"{stem}-{steps:03d}.png")
        append_line(self.out / LINES, json.dumps(asdict(measured)))
        judge = judge_of(self.config)
        far = f", distance {measured.distance:.3f}" if measured.distance is not None else ""
        self.tell(
            f"{name[0]:<24} {steps:>3} steps, seed {seed}: {judge} {_number(measured.reward[judge])}{far}, "
            f"{1000 * measured.seconds:.1f} ms an image"
        )


def read(out: Path) -> list[Measurement]:
    """Return the measurements that a folder holds, without a line that a killed process left cut short."""
    file = out / LINES
    found: list[Measurement] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(Measurement(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def rows(measured: Iterable[Measurement]) -> list[FrontierRow]:
    """Return a row for each label and number of steps, in the order of the labels' first measurement."""
    groups: dict[tuple[str, int], list[Measurement]] = {}
    order: dict[str, int] = {}
    for m in measured:
        order.setdefault(m.label, len(order))
        groups.setdefault((m.label, m.steps), []).append(m)
    return [
        FrontierRow(label, steps, len(group), _figures(group))
        for (label, steps), group in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


def _figures(group: list[Measurement]) -> dict[str, tuple[float, float]]:
    names = list(dict.fromkeys(name for m in group for name in m.reward))
    found = {name: interval([m.reward.get(name) for m in group], group[0].error.get(name)) for name in names}
    for name in ("diversity", "distance", "seconds"):
        found[name] = interval([getattr(m, name) for m in group])
    return found


def interval(values: Sequence[float | None], error: float | None = None) -> tuple[float, float]:
    """Return (mean, half-width of the 95 % interval) of independent values, by Student's t.

    The half-width of a single value is 1.96 times ``error``, or NaN.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    if len(known) == 1:
        return known[0], math.nan if error is None else 1.96 * error
    t = STUDENT_95[len(known) - 2] if len(known) - 2 < len(STUDENT_95) else 1.96
    return float(np.mean(known)), t * float(np.std(known, ddof=1)) / math.sqrt(len(known))


def reached(found: Sequence[FrontierRow], figure: str, level: float) -> dict[str, int | None]:
    """Return label -> the smallest number of steps at which ``figure`` is at or above ``level``; None: at none."""
    labels = dict.fromkeys(row.label for row in found)
    return {
        label: min((row.steps for row in found if row.label == label and row.figures[figure][0] >= level), default=None)
        for label in labels
    }


def table(found: Sequence[FrontierRow], figures: Sequence[str]) -> str:
    """Return a Markdown table with a line for each row and a column for each figure."""
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
    """Write a line for each row: label, steps, number of measurements, and each figure with its interval."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        columns = [f"{name}{end}" for name in figures for end in ("", "_interval95")]
        writer.writerow(["model", "steps", "measurements", *columns])
        for row in found:
            writer.writerow([row.label, row.steps, row.count, *(x for name in figures for x in row.figures[name])])


def plot(found: Sequence[FrontierRow], figures: Sequence[str], levels: dict[str, float] | None = None) -> Figure:
    """Plot each figure against the number of steps, with its intervals. ``levels``: figure -> a line to compare with.

    ``X`` and ``X + a change`` have one colour, the latter dashed. Labels are shifted a little, so that their intervals
    do not overlap.
    """
    levels = levels or {}
    labels = list(dict.fromkeys(row.label for row in found))
    base = {label: re.sub(r" \+ [^,]*", "", label) for label in labels}
    families = list(dict.fromkeys(base.values()))
    figure = Figure(figsize=(5 * len(figures) + 2.4, 4.2), layout="constrained")
    ticks = sorted({row.steps for row in found})
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, name in zip(panels, figures, strict=True):
        for place, label in enumerate(labels):
            points = [(row.steps, *row.figures[name]) for row in found if row.label == label]
            xs, ys, halves = (np.array(column, float) for column in zip(*points, strict=True))
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
        # Few steps of a bad sampler have a hundred times the distance of many steps of a good one.
        if name == "distance" and least > 0:
            axes.set(yscale="log", ylim=(least / 1.5, None))  # an interval may reach 0, which has no logarithm
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


@dataclass(frozen=True)
class Options:
    """The arguments of ``rlproxi eval``.

    Attributes:
        models: as ``drawers.split_name`` reads them. samplers: for each model; none takes the models' own.
        config: a run directory or a YAML file; None takes the first model's. seeds: of the noise, counted from 0.
        prompts, samples: None takes the config's. guidance: None takes each model's.
        batch: images of one sampler call. device: None takes a GPU where there is one.
        reach: LABEL@STEPS, whose reward the others are compared with.
    """

    models: Sequence[str]
    steps: Sequence[int]
    out: Path
    samplers: Sequence[str] = ()
    config: str | None = None
    seeds: int = 1
    prompts: int | None = None
    samples: int | None = None
    guidance: float | None = None
    batch: int = 64
    device: str | None = None
    precision: str = "float32"
    reach: str | None = None


def command(options: Options) -> int:
    """Run ``rlproxi eval`` and return 0. Raises ValueError, FileNotFoundError or ConfigError for wrong options."""
    from ..rewards import build

    o, out = options, options.out
    opened = [open_model(model, name, o.device, o.precision) for model in o.models for name in o.samplers or [""]]
    config = settings(o.config, o.models)
    more = {key: value for key, value in (("prompts", o.prompts), ("samples", o.samples)) if value is not None}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=more)})
    out.mkdir(parents=True, exist_ok=True)
    rewards = [*config.rewards.heldout, *config.rewards.train]
    scorers = {reward.name: build(reward.kind, reward.params) for reward in rewards}
    e, judges = config.evaluate, ", ".join(f"{r.name} {r.params}" for r in rewards)
    drawn = f"{e.prompts} prompts x {e.samples}, run seed {config.run.seed}, guidance {o.guidance}"
    setting = f"{drawn}, {o.precision}, {judges}"
    frontier = Frontier(config, scorers, out, o.batch, lambda line: print(line, flush=True), setting)
    measured = frontier.measure(opened, o.steps, range(o.seeds), o.guidance)
    found = rows(
        m
        for asked in dict.fromkeys(name for name, _ in opened)
        for m in measured
        if (m.label, m.model, m.sampler) == asked and m.setting == setting and m.steps in o.steps and m.seed < o.seeds
    )
    figures, judge = [*scorers, "diversity", "distance", "seconds"], judge_of(config)
    text = table(found, figures)
    levels: dict[str, float] = {}
    if o.reach:
        label, _, count = o.reach.rpartition("@")
        level = next((r.figures[judge][0] for r in found if r.label == label and str(r.steps) == count), None)
        if level is None:
            raise ValueError(
                f"--reach {o.reach}: nothing was measured there; it is LABEL@STEPS, with labels "
                f"{', '.join(dict.fromkeys(row.label for row in found))}"
            )
        levels[judge] = level
        text += f"\n\nSteps until {judge} reaches the {level:.3f} of {label} at {count}:\n\n" + "\n".join(
            f"- {name}: {'not reached' if at is None else at}" for name, at in reached(found, judge, level).items()
        )
    print(f"\n{text}\n")
    if frontier.compare.note:
        print(frontier.compare.note)
    (out / TABLE).write_text(text + "\n", encoding="utf-8")
    write_csv(found, figures, out / CSV)
    shown = [judge, *(["distance"] if any(math.isfinite(r.figures["distance"][0]) for r in found) else [])]
    plot(found, shown, levels).savefig(out / PLOT, dpi=110)
    print("\n".join(str(out / name) for name in (TABLE, CSV, PLOT, IMAGES)))
    return 0
