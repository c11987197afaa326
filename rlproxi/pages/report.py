"""``report.html``: one page on a run, from its directory alone, which fetches nothing and names what is missing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from ..config.algorithms import ALGORITHMS, AlgorithmClass, configured, section_name
from ..data.faces import parse_caption
from ..evaluation.images import data_uri, score_colour
from ..files import write_text
from ..telemetry import runlog
from ..telemetry.catalogue import lookup
from ..telemetry.run_reader import RunReader, Samples
from ..telemetry.values import dig, number
from . import figures
from .html import card, figure, missing, page, table

#: The gallery shows the first prompts of the held-out list, unselected.
GALLERY_PROMPTS, GALLERY_SAMPLES = 12, 4
_TAGS = ("before", "after")


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write a run's report as far as the run went; return its path. Raises FileNotFoundError for no run directory."""
    run = RunReader(run_dir)
    write_text(run.files.report, render(run))
    return run.files.report


def render(run: RunReader) -> str:
    """Return the page as HTML."""
    sections = [
        ("Headline", _headline(run)),
        ("The same prompts and seeds, before and after", _gallery(run)),
        ("Reward over RL steps", _reward(run)),
        ("Is the policy update sound?", _policy(run)),
        ("Reward against number of steps", _frontier(run)),
        ("Accuracy by attribute", _attributes(run)),
        ("Pre-training", _pretraining(run)),
        ("Where the time goes", _roles(run)),
        ("What happened on the way", _events(run)),
        ("Config as resolved", _config(run)),
    ]
    gaps = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.missing)
    top = f'<div class="missing">Not in this run directory:<ul>{gaps}</ul></div>' if gaps else ""
    return page(run.path.resolve().name, "report", sections, top=top)


def _number(value, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _headline(run: RunReader) -> str:
    def heldout(tag: str) -> str:
        recorded = number(dig(run.summary, "heldout", tag))
        mean, error = run.score(tag, run.judge) or (recorded, 0.0)
        return "missing" if mean is None else f"{mean:.3f}" + (f" ± {error:.3f}" if error else "")

    note = "before → after (± standard error over prompts); never optimised, fixed prompts and seeds"
    title = f"Held-out {run.judge or 'reward'}, {run.headline_steps or '?'} steps"
    cards = [card(title, " → ".join(map(heldout, _TAGS)), note)]
    _, rewards = runlog.series(run.records, "rl", "reward/mean")
    first, last = (dig(run.summary, "reward", key) for key in ("first", "last"))
    if first is None and rewards:
        first, last = rewards[0], rewards[-1]
    change = f"{_number(first)} → {_number(last)}" if first is not None else "missing"
    cards.append(card("Training reward", change, "first → last RL step"))
    cards += _looks(run)
    speed = run.summary.get("images_per_second")
    if speed is not None:
        cards.append(card("Throughput", f"{_number(speed)} images/s", "sampled, scored and trained on"))
    seconds = dig(run.summary, "seconds") or runlog.stage_seconds(run.records)
    if seconds:
        total = seconds.get("total") or sum(seconds.values())
        cards.append(card("Wall clock", _duration(total), "all stages together"))
    out = f'<div class="cards">{"".join(cards)}</div>\n'
    stages = [[name, _duration(value)] for name, value in seconds.items() if name != "total"]
    out += table(["stage", "time"], stages) if stages else missing("No stage has finished yet.")
    facts = [f"seed {dig(run.config, 'run', 'seed')}"] if run.config else []
    if run.summary.get("git"):
        facts.append(f"git {run.summary['git']}")
    facts += [f"{name} {version}" for name, version in (dig(run.summary, "versions") or {}).items()]
    return out + (f'<p class="faint">{escape(", ".join(facts))}</p>\n' if facts else "")


#: Figures of an evaluation beside scores: title -> (place in the evaluation's entry, how to read it).
_LOOKS = {
    "Distance to data": (("distance", "total"), "colours, composition and texture; lower is closer"),
    "Diversity": (("diversity",), "between samples of one prompt; 0: always the same picture"),
}


def _looks(run: RunReader) -> list[str]:
    """Return cards of distance and diversity, before and after; none where neither evaluation has them."""

    def change(*key: str) -> str:
        return " → ".join(_number(dig(run.entry(tag), *key)) for tag in _TAGS)

    cards = []
    for title, (key, note) in _LOOKS.items():
        if change(*key) == "- → -":
            continue
        if key[0] == "distance":
            note += f"; layout {change('distance', 'layout')}, texture {change('distance', 'texture')}"
        level = _real(run, *key)
        note += f"; real images {_number(level)}" if level is not None else ""
        cards.append(card(f"{title}, {run.headline_steps} steps", change(*key), note))
    return cards


def _real(run: RunReader, *key: str) -> float | None:
    """Return a figure of as many real images as were evaluated."""
    return next((v for tag in _TAGS if (v := dig(run.evaluations, tag, "data", *key)) is not None), None)


def _gallery(run: RunReader) -> str:
    tags = [tag for tag in _TAGS if tag in run.evaluations]
    samples = {tag: found for tag in tags if (found := run.samples(tag)) is not None}
    if not samples:
        return missing("No sample images: the evaluations 'before' and 'after' have not stored any.")
    evaluation = run.evaluations[next(iter(samples))]
    prompts, count = evaluation.get("prompts") or [], int(evaluation.get("samples") or 1)
    wrong = ", ✗ what the judge found wrong" if any(s.correct is not None for s in samples.values()) else ""
    shown = f"The first {min(len(prompts), GALLERY_PROMPTS)} of {len(prompts)} held-out prompts, not chosen"
    how = f"{run.headline_steps} proximal steps. The number is the held-out score{wrong}"
    out = f'<p class="faint">{shown}; {how}.</p>\n'
    for p, prompt in enumerate(prompts[:GALLERY_PROMPTS]):
        sides = "".join(
            f'<div class="side"><div class="faint">{tag}</div>{_strip(found, prompt, p, count)}</div>'
            for tag, found in samples.items()
        )
        out += f'<div class="prompt"><p>{escape(prompt) or "(no caption)"}</p><div class="pair">{sides}</div></div>\n'
    lost = [tag for tag in _TAGS if tag not in samples]
    return out + (missing(f"No images of evaluation '{lost[0]}'.") if lost else "")


def _strip(samples: Samples, prompt: str, p: int, count: int) -> str:
    shots = []
    for i in range(p * count, min(p * count + min(count, GALLERY_SAMPLES), len(samples.images))):
        score = float(samples.heldout[i])
        colour = "#{:02x}{:02x}{:02x}".format(*score_colour(score))
        text = f"{score:.2f}" if math.isfinite(score) else "no score"
        wrong = _wrong(samples, i, prompt)
        mark = f' <span class="wrong">✗ {escape(", ".join(wrong))}</span>' if wrong else ""
        shots.append(
            f'<div class="shot"><img alt="{escape(prompt)}" src="{data_uri(samples.images[i])}">'
            f'<span style="color:{colour}">■</span> {text}{mark}</div>'
        )
    return f'<div class="strip">{"".join(shots)}</div>'


def _wrong(samples: Samples, index: int, prompt: str) -> list[str]:
    """Return the attributes judged wrong, with the caption's word: 'hat (red)'."""
    if samples.correct is None:
        return []
    claims = parse_caption(prompt)
    return [
        name.replace("_", " ") + (f" ({claims[name]})" if name in claims else "")
        for name, value in zip(samples.attributes, samples.correct[index], strict=True)
        if value < 0.5
    ]


def _reward(run: RunReader) -> str:
    parts = [k for k in runlog.keys(run.records, "rl", "reward/") if k not in ("reward/mean", "reward/std")]
    names = ["reward/mean", *(parts if len(parts) > 1 else [])]
    train = {name.removeprefix("reward/"): found for name, found in _curves(run, names).items()}
    heldout = {run.judge: points} if run.judge and (points := run.heldout_curve(run.judge))[0] else {}
    if not train and not heldout:
        return missing("No RL step and no evaluation has been logged yet.")
    reading = "If the training reward and the held-out reward both rise, the policy is improving. "
    reading += "A training reward that rises while the held-out one falls is reward hacking."
    out = figure(figures.reward_curve(train, heldout), reading)
    return out if train else out + missing("No RL step has been logged yet.")


def _policy(run: RunReader) -> str:
    names, section, tolerance = _of_algorithm(run)
    curves = _curves(run, names)
    if curves:
        reading = " ".join(f"{k}: {metric.reading}" for k in curves if (metric := lookup(k)))
        out = figure(figures.panels(curves, "policy", ", ".join(curves)), reading)
    else:
        out = missing(f"None of {', '.join(names)} has been logged yet.")
    if tolerance is None:
        return out
    _, deviations = runlog.series(run.records, "rl", "ratio/first_max_deviation")
    finite = [d for d in deviations if math.isfinite(d)]
    if not finite:
        return out + missing("No ratio check (ratio/first_max_deviation) has been logged.")
    bound = dig(run.config, section, tolerance)
    limit = f" (tolerance {_number(bound)})" if bound is not None else ""
    checks = "one check" if len(finite) == 1 else f"{len(finite)} checks"
    most = f"the ratio was off 1 by at most <b>{_number(max(finite))}</b> in {checks}{limit}"
    return out + f"<p>Ratio check: on fresh samples, before any update, {most}.</p>\n"


def _curves(run: RunReader, names: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the RL metrics of ``names`` that were logged: name -> (steps, values)."""
    return {name: found for name in names if (found := runlog.series(run.records, "rl", name))[0]}


def _of_algorithm(run: RunReader) -> tuple[tuple[str, ...], str, str | None]:
    """The metrics to draw, the algorithm's section, and its key that bounds the first ratio, if it has ratios."""
    try:
        name = str(dig(run.config, "run", "algorithm") or ALGORITHMS.default)
        kind = configured(name)
    except ValueError:  # an algorithm that is not known here
        name, kind = "", AlgorithmClass
    return kind.charts, section_name(name), kind.ratio_tolerance


def _frontier(run: RunReader) -> str:
    judge = run.judge
    curves: figures.Curves = {}
    distances: figures.Curves = {}
    for tag in _TAGS if judge else ():
        counts = sorted(int(n) for n in dig(run.evaluations, tag, "by_steps") or {})
        points = [(n, *score) for n in counts if (score := run.score(tag, judge, n)) is not None]
        if points:
            curves[tag] = tuple(zip(*points, strict=True))
        far = [(n, dig(run.entry(tag, n), "distance", "total")) for n, *_ in points]
        if known := [pair for pair in far if pair[1] is not None]:
            distances[tag] = tuple(zip(*known, strict=True))
    if not curves:
        return missing("No evaluation at any number of steps yet.")
    level = _real(run, "distance", "total")
    caption = "Bars are standard errors over prompts." + (" Dashed: as many real images." if level else "")
    out = figure(figures.against_steps(curves, f"held-out {judge}", distances, level), caption)
    counts = sorted({n for curve in curves.values() for n in curve[0]})
    entries = [run.entry(tag, n) for tag in curves for n in counts]
    looks = [key for key, _ in _LOOKS.values() if any(dig(found, *key) is not None for found in entries)]
    rows = []
    for n in counts:
        scores = [run.score(tag, judge, n) for tag in _TAGS]
        cells = [f"{s[0]:.3f} ± {s[1]:.3f}" if s else "-" for s in scores]
        cells += [_number(dig(run.entry(tag, n), *key)) for key in looks for tag in _TAGS]
        rows.append([str(n), *cells])
    if level is not None:
        rows.append(["real images", "-", "-", *(_number(_real(run, *key)) for key in looks for _ in range(2))])
    head = [f"{name} {tag}" for name in ("held-out", *(key[0] for key in looks)) for tag in _TAGS]
    return out + table(["steps", *head], rows)


def _attributes(run: RunReader) -> str:
    shares = [dig(run.entry(tag), "details", run.judge) or {} for tag in _TAGS]
    before, after = ({key: share for key, share in found.items() if share is not None} for found in shares)
    if not before and not after:
        return missing("No judge has scored single attributes yet.")
    bars = figures.paired_bars(before, after, f"share judged right by {run.judge}", "attributes")
    return figure(bars, "Only images whose caption claims the attribute count.")


def _pretraining(run: RunReader) -> str:
    steps, values = runlog.series(run.records, "pretrain", "loss")
    if not steps:
        return missing("No pre-training loss in the log: the run started from a model, or has not got there yet.")
    return figure(figures.loss_curve(steps, values), "Proximal matching.")


def _roles(run: RunReader) -> str:
    names = [f"seconds/{role}" for role in ("rollout", "reward", "train", "sync", "step")]
    curves = {name.removeprefix("seconds/"): found for name, found in _curves(run, names).items()}
    if not curves:
        return missing("No times of roles have been logged yet.")
    rows = []
    for role, (_, values) in curves.items():
        finite = [v for v in values if math.isfinite(v)] or [math.nan]
        rows.append([role, _number(sum(finite) / len(finite)), _number(max(finite)), f"{sum(finite):.0f}"])
    note = "'step' is an iteration's wall clock; roles that overlap add up to more."
    return figure(figures.roles(curves), note) + table(["role", "mean, s", "longest, s", "sum, s"], rows)


def _events(run: RunReader) -> str:
    lines, begun = [], set()
    for record in run.records:
        if record["event"] in ("alarm", "warning", "note"):
            lines.append((record, f"{record['event']}: {record.get('message', '')}"))
        elif record["event"] == "metrics":
            begun.add(record.get("stage"))
        elif record["event"] == "resume" and (record.get("stage") in begun or record.get("step")):
            # A stage that starts logs a resume too, with step 0 and nothing before it. That is no restart.
            lines.append((record, f"resume: {record.get('stage')} went on from step {record.get('step')}"))
    if not lines:
        return "<p>No warnings, no restarts.</p>\n"
    shown = "".join(
        f"<li>{time.strftime('%H:%M:%S', time.localtime(record.get('time', 0)))} {escape(text)}</li>"
        for record, text in lines[-50:]
    )
    return f"<p>{len(lines)} in all{', the last 50' if len(lines) > 50 else ''}:</p><ul>{shown}</ul>\n"


def _config(run: RunReader) -> str:
    if not run.config:
        return missing("config.yaml is missing or not readable.")
    text = yaml.safe_dump(run.config, sort_keys=False)
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>\n"
