"""``report.html``: one page on a run, from its directory alone, which fetches nothing and names what is missing."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ..config.algorithms import ALGORITHMS, AlgorithmClass, configured, section_name
from ..data.faces import parse_caption
from ..evaluation.images import data_uri, score_colour
from ..files import write_text
from ..telemetry import runlog
from ..telemetry.catalogue import lookup
from ..telemetry.run_reader import RunReader, Samples
from ..telemetry.values import dig, number, whole
from . import figures
from .html import card, csv_link, figure, missing, page, problem, table

#: The gallery shows the first prompts of the held-out list, unselected; those after ``OPEN_PROMPTS`` are folded away.
GALLERY_PROMPTS, GALLERY_SAMPLES, OPEN_PROMPTS = 12, 4, 6
#: The slider over training shows fewer and smaller images, and at most so many evaluations: all are in the page.
TRAINING_PROMPTS, TRAINING_SAMPLES, TRAINING_MOMENTS, TRAINING_PIXELS = 6, 2, 12, 128
_TAGS = ("before", "after")
_DOCS = Path(__file__).parents[2] / "docs"

_STYLE = """
.prompt { margin: .8rem 0; padding-top: .5rem; border-top: 1px solid var(--line); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .4rem 1.6rem; }
.few { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 0 2.4rem; }
.few .pair { grid-template-columns: 1fr 1fr; gap: .8rem; }
.side > p { margin: 0 0 .2rem; }
.strip { display: grid; grid-template-columns: repeat(var(--count), minmax(0, 10rem)); gap: .5rem; }
.shot { font-size: .8rem; line-height: 1.3; min-width: 0; }
.shot img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  border-radius: .25rem; background: var(--card); } .wrong { color: var(--faint); }
.training { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: .4rem 1.6rem; }
.training .strip { grid-template-columns: repeat(var(--count), minmax(0, 1fr)); }
.frame > p { margin: .3rem 0 .1rem; }
.moment { position: sticky; top: 0; z-index: 1; display: grid; grid-template-columns: minmax(8rem, 30rem) auto;
  justify-content: start; align-items: center; gap: 0 1rem; padding: .5rem 0; background: var(--paper); }
.moment label { grid-column: 1 / -1; font-size: .875rem; } .moment input { width: 100%; min-height: 2rem;
  margin: 0; accent-color: var(--link); } .moment output { font-weight: 600; }
@media (max-width: 30rem) { .moment { grid-template-columns: 1fr; } .strip { gap: .3rem; }
  .shot { font-size: .72rem; } }
@media print { .moment { display: none; } .frame[hidden] { display: block !important; } }
"""

# Without JavaScript each evaluation's images stand below each other, with their names.
_SCRIPT = """<script>
const slider = document.getElementById('moment');
if (slider) {
  const names = JSON.parse(slider.dataset.names), words = document.getElementById('moment-name');
  const show = () => {
    words.textContent = names[slider.value];
    slider.setAttribute('aria-valuetext', names[slider.value]);
    for (const frame of document.querySelectorAll('.frame')) frame.hidden = frame.dataset.moment !== slider.value;
    for (const name of document.querySelectorAll('.frame > p')) name.hidden = true;
  };
  slider.parentElement.hidden = false;
  slider.addEventListener('input', show);
  show();
}
</script>
"""


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write a run's report as far as the run went; return its path. Raises FileNotFoundError for no run directory."""
    run = RunReader(run_dir)
    write_text(run.files.report, render(run))
    return run.files.report


def render(run: RunReader) -> str:
    """Return the page as HTML."""
    sections = [
        ("Before and after", _gallery(run)),
        ("The same prompts over training", _training(run)),
        (_rewards_title(run), _headline(run) + _rewards(run) + _spectrum(run)),
        ("Is the policy update sound?", _policy(run)),
        ("Reward against number of steps", _frontier(run)),
        ("Accuracy by attribute", _attributes(run)),
        ("Pre-training", _pretraining(run)),
        ("Where the time goes", _times(run) + _roles(run)),
        ("What happened on the way", _events(run)),
        ("Config as resolved", _config(run)),
        ("Documents", _documents(run)),
    ]
    gaps = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.missing)
    top = _state(run) + (f'<div class="missing">Not in this run directory:<ul>{gaps}</ul></div>' if gaps else "")
    name = run.path.resolve().name
    return page(name, "report", sections, _STYLE, top, contents=True, bottom=_SCRIPT)


def _state(run: RunReader) -> str:
    """Return a sentence on whether the run has finished; a page that stays as it is never says that a run goes on."""
    if run.finished:
        score = f" Held-out {escape(run.judge)}, before and after RL: <b>{_heldout(run)}</b>." if run.judge else ""
        return f"<p><b>Finished.</b>{score}</p>\n"
    if not run.records:
        return "<p><b>Not finished</b> when this page was written.</p>\n"
    last = run.records[-1].get("time")
    when = f", at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found))}" if (found := number(last)) else ""
    stage = next((r.get("stage") or r.get("name") for r in reversed(run.records) if "stage" in r or "name" in r), None)
    what = f" is of the stage {escape(str(stage))}" if stage else " stands in the log"
    return f"<p><b>Not finished</b> when this page was written. The last record{what}{when}.</p>\n"


def _documents(run: RunReader) -> str:
    """Return links to the documents that explain the page; names alone where the folder docs/ is not here."""
    about = {
        "dashboard.md": "how to read the plots",
        "my-reward-does-not-rise.md": "when a reward does not rise",
        "guards.md": "alarms",
        "method.md": "the method",
        "glossary.md": "terms",
    }
    items = []
    for name, words in about.items():
        target = os.path.relpath(_DOCS / name, run.path.resolve()) if (_DOCS / name).is_file() else None
        title = f'<a href="{escape(quote(target))}">docs/{name}</a>' if target else f"docs/{name}"
        items.append(f"<li>{title}: {escape(words)}</li>")
    return f"<p>In the project's folder:</p><ul>{''.join(items)}</ul>\n"


def _number(value, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _heldout(run: RunReader) -> str:
    """Return the held-out score before and after: "0.50 ± 0.02 → 0.61 ± 0.02"."""

    def value(tag: str) -> str:
        recorded = number(dig(run.summary, "heldout", tag))
        mean, error = run.score(tag, run.judge) or (recorded, 0.0)
        if mean is None:
            return "no score"
        return _with_error(mean, error) if error else f"{mean:.3f}"

    return " → ".join(map(value, _TAGS))


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.3f}"


def _headline(run: RunReader) -> str:
    note = "before → after (± standard error over prompts); never optimised, fixed prompts and seeds"
    title = f"Held-out {run.judge or 'reward'}, {run.headline_steps or '?'} steps"
    cards = [card(title, _heldout(run), note)]
    _, rewards = runlog.series(run.records, "rl", "reward/mean")
    first, last = (dig(run.summary, "reward", key) for key in ("first", "last"))
    if first is None and rewards:
        first, last = rewards[0], rewards[-1]
    change = f"{_number(first)} → {_number(last)}" if first is not None else "no score"
    cards.append(card("Training reward", change, "first → last RL step"))
    cards += _looks(run)
    speed = run.summary.get("images_per_second")
    if speed is not None:
        cards.append(card("Throughput", f"{_number(speed)} images/s", "sampled, scored and trained on"))
    if seconds := _seconds(run):
        total = seconds.get("total") or sum(seconds.values())
        cards.append(card("Wall clock", _duration(total), "all stages together"))
    return f'<div class="cards">{"".join(cards)}</div>\n{"".join(problem(line) for line in _without_score(run))}'


def _seconds(run: RunReader) -> dict[str, float]:
    return dig(run.summary, "seconds") or runlog.stage_seconds(run.records)


def _times(run: RunReader) -> str:
    seconds = _seconds(run)
    stages = [[name, _duration(value)] for name, value in seconds.items() if name != "total"]
    out = table(["stage", "time"], stages) if stages else missing("No stage has finished yet.")
    facts = [f"seed {dig(run.config, 'run', 'seed')}"] if run.config else []
    if run.summary.get("git"):
        facts.append(f"git {run.summary['git']}")
    facts += [f"{name} {version}" for name, version in (dig(run.summary, "versions") or {}).items()]
    return out + (f'<p class="faint">{escape(", ".join(facts))}</p>\n' if facts else "")


#: Figures of an evaluation beside scores: title -> (place in the evaluation's entry, how to read it).
_LOOKS = {
    "Distance to data": (("distance", "total"), "colours, composition and texture; lower is closer"),
    "Diversity": (("diversity",), "between samples of one prompt; 0: always the same picture"),
    "Spectrum, worst period": (("spectrum", "worst"), "power of the images over the data's; 1 is like the data"),
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


def _without_score(run: RunReader) -> list[str]:
    """Return a sentence for each figure that an evaluation or an RL step lacks, with the reason that the run gives."""
    found = []
    distances = any(dig(run.entry(tag), "distance") is not None for _, tag in run.moments)
    for _, tag in run.moments:
        evaluation, entry = f"Evaluation '{tag}'", run.entry(tag)
        why = run.reasons("evaluation", tag)
        if not entry:
            reason = _reason(run.evaluations[tag], why)
            found.append(f"{evaluation} has no scores at {run.headline_steps} steps{reason}.")
        for name, score in {**_scores(entry, "train"), **_scores(entry, "heldout")}.items():
            count = whole(dig(score, "missing"))
            if number(dig(score, "mean")) is None:
                found.append(f"{evaluation} has no score of {name}{_reason(score, why)}.")
            elif count:
                found.append(f"{evaluation}: {count} samples have no score of {name}{_reason(score, why)}.")
        for name, total in (("distance", ("distance", "total")), ("spectrum", ("spectrum", "worst"))):
            told = name in entry or (name == "distance" and distances and bool(entry))
            if told and number(dig(entry, *total)) is None:
                found.append(f"{evaluation} has no {name}{_reason(entry.get(name), why)}.")
    steps, values = runlog.series(run.records, "rl", "reward/mean")
    lost = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if lost:
        why = list(dict.fromkeys(line for step in lost for line in run.reasons("metrics", "rl", step)))
        found.append(f"No training reward at {_listed(lost)}{_reason(None, why)}.")
    return found


def _scores(entry: dict, part: str) -> dict:
    return found if isinstance(found := entry.get(part), dict) else {}


def _reason(found: Any, warnings: Sequence[str] = ()) -> str:
    """Return ": <reason>" of a record without a figure, else of the first warning about it; else ""."""
    for key in ("reason", "skipped", "error"):
        if isinstance(text := dig(found, key), str) and text:
            return f": {text}"
    if isinstance(found, str) and found:
        return f": {found}"
    if not warnings:
        return ""
    more = f" (and {len(warnings) - 1} more warnings)" if len(warnings) > 1 else ""
    return f": {warnings[0].rstrip('.')}{more}"


def _listed(steps: Sequence[int], axis: str = "RL step") -> str:
    """Return "RL step 7", "RL steps 7 and 9", or a count of many."""
    if len(steps) > 5:
        return f"{len(steps)} {_plural(axis)} from {steps[0]} to {steps[-1]}"
    if len(steps) == 1:
        return f"{axis} {steps[0]}"
    return f"{_plural(axis)} {', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def _gallery(run: RunReader) -> str:
    tags = [tag for tag in _TAGS if tag in run.evaluations]
    samples = {tag: found for tag in tags if (found := run.samples(tag)) is not None}
    if not samples:
        return missing("No sample images: the evaluations 'before' and 'after' have not stored any.")
    evaluation = run.evaluations[next(iter(samples))]
    prompts, count = evaluation.get("prompts") or [], int(evaluation.get("samples") or 1)
    wrong = ", ✗ what the judge found wrong" if any(s.correct is not None for s in samples.values()) else ""
    shown = f"The same prompts and seeds. The first {min(len(prompts), GALLERY_PROMPTS)} of {len(prompts)} "
    shown += f"held-out prompts, not chosen; {run.headline_steps} proximal steps. "
    out = f'<p class="faint">{shown}The number is the held-out score{wrong}.</p>\n'
    groups = []
    for p, prompt in enumerate(prompts[:GALLERY_PROMPTS]):
        sides = "".join(
            f'<div class="side"><p class="faint">{tag} RL</p>{_strip(found, tag, prompt, p, count)}</div>'
            for tag, found in samples.items()
        )
        groups.append(f'<div class="prompt"><p>{_quoted(prompt)}</p><div class="pair">{sides}</div></div>\n')
    kind = "few" if min(count, GALLERY_SAMPLES) <= 2 else "many"
    out += f'<div class="{kind}">{"".join(groups[:OPEN_PROMPTS])}</div>\n'
    if more := groups[OPEN_PROMPTS:]:
        summary = f"<summary>{len(more)} more prompt{'s' if len(more) > 1 else ''}</summary>"
        out += f'<details>{summary}<div class="{kind}">{"".join(more)}</div></details>\n'
    lost = [tag for tag in _TAGS if tag not in samples]
    return out + (missing(f"No images of evaluation '{lost[0]}'.") if lost else "")


def _quoted(prompt: str) -> str:
    return escape(prompt) or "(no caption)"


def _strip(
    samples: Samples, tag: str, prompt: str, p: int, count: int, most: int = GALLERY_SAMPLES, pixels: int = 256
) -> str:
    shots, shown = [], min(count, most)
    for i in range(p * count, min(p * count + shown, len(samples.images))):
        score = float(samples.heldout[i])
        colour = "#{:02x}{:02x}{:02x}".format(*score_colour(score))
        text = f"{score:.2f}" if math.isfinite(score) else "no score"
        wrong = _wrong(samples, i, prompt)
        mark = f' <span class="wrong">✗ {escape(", ".join(wrong))}</span>' if wrong else ""
        alt = escape(f"{tag}, sample {i - p * count + 1} of “{prompt or 'no caption'}”, held-out {text}")
        shots.append(
            f'<div class="shot"><img alt="{alt}" src="{data_uri(samples.images[i], pixels)}">'
            f'<span aria-hidden="true" style="color:{colour}">■</span> {text}{mark}</div>'
        )
    return f'<div class="strip" style="--count:{shown}">{"".join(shots)}</div>'


def _training(run: RunReader) -> str:
    """Return the same prompts at each evaluation, under one slider."""
    moments = [
        (step, tag) for step, tag in run.moments if (run.files.evaluation_samples(tag, run.headline_steps)).is_file()
    ]
    at = {step: tag for step, tag in moments}  # the newest of two at one step
    chosen = list(at.items())
    if len(chosen) > TRAINING_MOMENTS:
        places = {round(i * (len(chosen) - 1) / (TRAINING_MOMENTS - 1)) for i in range(TRAINING_MOMENTS)}
        chosen = [chosen[i] for i in sorted(places)]
    found = [(step, tag, samples) for step, tag in chosen if (samples := run.samples(tag)) is not None]
    if len(found) < 2:
        return missing("Fewer than two evaluations have images: evaluate.every sets how often the run makes them.")
    evaluation = run.evaluations[found[-1][1]]
    prompts, count = evaluation.get("prompts") or [], int(evaluation.get("samples") or 1)
    ends = {0: "before RL", found[-1][0]: f"RL step {found[-1][0]}, {found[-1][1]}"}
    names = [ends.get(step, f"RL step {step}") for step, _, _ in found]
    groups = ""
    for p, prompt in enumerate(prompts[:TRAINING_PROMPTS]):
        frames = "".join(
            f'<div class="frame" data-moment="{i}"><p class="faint">{escape(names[i])}</p>'
            f"{_strip(samples, names[i], prompt, p, count, TRAINING_SAMPLES, TRAINING_PIXELS)}</div>"
            for i, (_, _, samples) in enumerate(found)
        )
        groups += f'<div class="prompt"><p>{_quoted(prompt)}</p>{frames}</div>\n'
    omitted = f" {len(found)} of {len(at)} evaluations, evenly chosen." if len(found) < len(at) else ""
    words = f"Move the slider, or focus it and press the arrow keys: each evaluation with the same seeds.{omitted}"
    last = len(found) - 1
    control = (
        f'<div class="moment" hidden><label for="moment">Evaluation</label><input type="range" id="moment" min="0" '
        f'max="{last}" value="{last}" step="1" data-names="{escape(json.dumps(names))}">'
        f'<output id="moment-name" for="moment">{escape(names[-1])}</output></div>'
    )
    return f'<p class="faint">{escape(words)}</p>\n{control}\n<div class="training">{groups}</div>\n'


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


def _plot(
    curves: figures.Curves,
    title: str,
    axes: tuple[str, str],
    caption: str = "",
    colours: Sequence[str] = (figures.AFTER,),
    markers: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Return a plot of ``curves`` with its table as CSV; a sentence where nothing changes or nothing has a value.

    ``title`` names the plot and its file. The other arguments are those of ``figures.plot``.
    """
    known = {label: curve for label, curve in curves.items() if any(map(math.isfinite, curve[1]))}
    link = _csv(curves, title, axes[0])
    axis, only = axes[0], len(curves) == 1
    if all(figures.unchanging(curve[1]) for curve in known.values()):
        parts = [("" if only else f"{escape(label)} ") + escape(_steady(c, axis)) for label, c in curves.items()]
        sentence = f"<b>{escape(title)}</b>{' ' if only else ': '}{'; '.join(parts)}."
        return f'<p class="steady">{sentence} {link}</p>\n'
    gaps = ""
    for label, (steps, values, *_) in curves.items():
        if lost := [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]:
            gaps += f" {'No value' if only else f'{label} has no value'} at {_listed(lost, axis)}."
    return figure(figures.plot(known, title, title, axes, colours, markers, level), f"{caption}{gaps}".strip(), link)


def _steady(curve: Sequence, axis: str) -> str:
    """Return the words on a curve in which nothing changes, behind its name."""
    steps = curve[0]
    known = [(step, value) for step, value in zip(*curve[:2], strict=True) if math.isfinite(value)]
    if not known:
        return f"has no value at {_listed(steps, axis)}"
    if len(known) == 1:
        return f"is {_number(known[0][1])} at {axis} {known[0][0]}, the only value"
    gone = [step for step, value in zip(*curve[:2], strict=True) if not math.isfinite(value)]
    lost = f", and has no value at {_listed(gone, axis)}" if gone else ""
    return f"is {_number(known[0][1])} at {'the other' if gone else 'all'} {len(known)} {_plural(axis)}{lost}"


def _plural(axis: str) -> str:
    return {"number of steps": "numbers of steps", "period, pixels": "periods"}.get(axis, f"{axis}s")


def _csv(curves: figures.Curves, title: str, axis: str) -> str:
    """Return a link to the curves as one table, with a row for each value of x."""
    head, columns = [axis], []
    for label, (xs, *parts) in curves.items():
        for part, suffix in zip(parts, ("", " standard error"), strict=False):
            head.append(f"{label}{suffix}")
            columns.append(dict(zip(xs, part, strict=True)))
    rows = [[x, *(column.get(x) for column in columns)] for x in sorted({x for column in columns for x in column})]
    return csv_link(title, head, rows)


def _rewards_title(run: RunReader) -> str:
    distance, spectrum = run.curve("distance", "total")[0], run.curve("spectrum", "worst")[0]
    if distance and spectrum:
        return "Rewards, distance and spectrum"
    return "Rewards and distance" if distance else "Rewards and spectrum" if spectrum else "Rewards"


def _rewards(run: RunReader) -> str:
    """Return plots over RL steps, side by side: rewards, held-out rewards, distance, spectrum, diversity."""
    step = "RL step"
    parts = [k for k in runlog.keys(run.records, "rl", "reward/") if k not in ("reward/mean", "reward/std")]
    names = ["reward/mean", *(parts if len(parts) > 1 else [])]
    train = {name.removeprefix("reward/"): found for name, found in _curves(run, names).items()}
    heldout = {run.judge: points} if run.judge and (points := run.heldout_curve(run.judge))[0] else {}
    if not train and not heldout:
        return missing("No RL step and no evaluation has been logged yet.")
    plots = [_plot(train, "training reward", (step, "training reward"))] if train else []
    if heldout:
        caption = "Never optimised. Bars are standard errors over prompts."
        title = f"held-out {run.judge}"
        plots.append(_plot(heldout, title, (step, title), caption, (figures.HELDOUT,), True))
    for title, key, level, caption in (
        ("distance to data", ("distance", "total"), _real(run, "distance", "total"), "Lower is closer."),
        ("spectrum, worst period", ("spectrum", "worst"), 1.0, "Power over the data's at the period furthest off."),
        ("diversity", ("diversity",), _real(run, "diversity"), "Between samples of one prompt."),
    ):
        if (values := run.curve(*key))[0]:
            words = "the data" if key[0] == "spectrum" else "real images"
            line = (words, level) if level is not None else None
            plots.append(_plot({title: values}, title, (step, title), caption, markers=True, level=line))
    reading = "If the training reward and the held-out reward both rise, the policy is improving. "
    reading += "A training reward that rises while the held-out one falls is reward hacking. "
    if run.curve("distance", "total")[0]:
        reading += "Rewards that rise with the distance are won by what no data look like. "
    if run.curve("spectrum", "worst")[0]:
        reading += "So are rewards that rise while the spectrum moves away from 1."
    out = f'<p>{escape(reading.strip())}</p>\n<div class="plots">{"".join(plots)}</div>\n'
    return out if train else out + missing("No RL step has been logged yet.")


def _spectrum(run: RunReader) -> str:
    """Return the power of each period over the data's, before and after; "" for a run without spectra."""
    kinds = ("rows", "columns")
    ratios: dict[str, dict[str, dict[int, float]]] = {kind: {} for kind in kinds}
    for kind, tag in itertools.product(kinds, _TAGS):
        found = dig(run.entry(tag), "spectrum", kind)
        pairs = found.items() if isinstance(found, dict) else ()
        known = {int(n): v for n, value in pairs if str(n).isdecimal() and (v := number(value)) is not None}
        if known:
            ratios[kind][tag] = dict(sorted(known.items()))
    if not any(ratios.values()):
        return ""
    colours = {"before": figures.BEFORE, "after": figures.AFTER}
    plots, periods = [], sorted({n for found in ratios.values() for known in found.values() for n in known})
    for kind, found in ratios.items():
        if found:
            curves = {tag: (list(known), list(known.values())) for tag, known in found.items()}
            title, shown = f"spectrum along {kind}", tuple(colours[tag] for tag in found)
            axes = ("period, pixels", f"power over the data's, {kind}")
            plots.append(_plot(curves, title, axes, "", shown, True, ("the data", 1.0)))
    rows = [
        [str(n), *(" → ".join(_number(ratios[kind].get(tag, {}).get(n)) for tag in _TAGS) for kind in kinds)]
        for n in periods
    ]
    note = "Power of the images at each period, over that of real data. 1 is like the data. Above 1 the images have "
    note += "too much of the period, for example a grid; below 1 too little, for example blur."
    numbers = table(["period, pixels", "rows, before → after", "columns, before → after"], rows)
    return f'<h3>Spectrum, before and after</h3><p class="faint">{escape(note)}</p>\n' + (
        f'<div class="plots">{"".join(plots)}<div>{numbers}</div></div>\n'
    )


def _policy(run: RunReader) -> str:
    names, section, tolerance = _of_algorithm(run)
    curves = _curves(run, names)
    if curves:
        plots = ""
        for name, found in curves.items():
            reading = metric.reading if (metric := lookup(name)) else ""
            plots += _plot({name: found}, name, ("RL step", name), reading)
        out = f'<div class="plots">{plots}</div>\n'
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
        pairs = [(n, dig(run.entry(tag, n), "distance", "total")) for n, *_ in points]
        if known := [pair for pair in pairs if pair[1] is not None]:
            distances[tag] = tuple(zip(*known, strict=True))
    if not curves:
        return missing("No evaluation at any number of steps yet.")
    level, title, far = _real(run, "distance", "total"), f"held-out {judge}", "distance to data"
    plots = _against_steps(curves, title, "Bars are standard errors over prompts.")
    if distances:
        caption = "Dashed: as many real images." if level else ""
        plots += _against_steps(distances, far, caption, level, log=True)
    out = f'<div class="plots">{plots}</div>\n'
    counts = sorted({n for curve in curves.values() for n in curve[0]})
    entries = [run.entry(tag, n) for tag in curves for n in counts]
    looks = [key for key, _ in _LOOKS.values() if any(dig(found, *key) is not None for found in entries)]
    rows = []
    for n in counts:
        scores = [run.score(tag, judge, n) for tag in _TAGS]
        cells = [" → ".join(_with_error(*s) if s else "-" for s in scores)]
        cells += [" → ".join(_number(dig(run.entry(tag, n), *key)) for tag in _TAGS) for key in looks]
        rows.append([str(n), *cells])
    if level is not None:
        rows.append(["real images", "-", *(_number(_real(run, *key)) for key in looks)])
    head = ["steps", *(f"{name}, before → after" for name in ("held-out", *(key[0] for key in looks)))]
    return out + table(head, rows)


def _against_steps(
    curves: figures.Curves, title: str, caption: str, level: float | None = None, log: bool = False
) -> str:
    """Return a plot of ``curves`` against the number of denoising steps; a sentence where nothing changes."""
    if all(figures.unchanging(curve[1]) for curve in curves.values()):
        return _plot(curves, title, ("number of steps", title))
    link = _csv(curves, f"{title} by steps", "number of steps")
    return figure(figures.against_steps(curves, title, level, log), caption, link)


def _attributes(run: RunReader) -> str:
    shares = [dig(run.entry(tag), "details", run.judge) or {} for tag in _TAGS]
    before, after = ({key: share for key, share in found.items() if share is not None} for found in shares)
    if not before and not after:
        return missing("No judge has scored single attributes yet.")
    bars = figures.paired_bars(before, after, f"share judged right by {run.judge}", "attributes")
    rows = [[name, before.get(name), after.get(name)] for name in dict.fromkeys([*before, *after])]
    link = csv_link("accuracy by attribute", ["attribute", *_TAGS], rows)
    plot = figure(bars, "Only images whose caption claims the attribute count.", link)
    return f'<div class="plots">{plot}</div>\n'


def _pretraining(run: RunReader) -> str:
    steps, values = runlog.series(run.records, "pretrain", "loss")
    if not steps:
        return missing("No pre-training loss in the log: the run started from a model, or has not got there yet.")
    curves: figures.Curves = {"loss": (steps, values)}
    if figures.unchanging(values):
        return _plot(curves, "pre-training loss", ("step", "loss"))
    link = _csv(curves, "pre-training loss", "step")
    plot = figure(figures.loss_curve(steps, values), "Proximal matching.", link)
    return f'<div class="plots">{plot}</div>\n'


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
    plot = _plot(dict(curves), "seconds of each role", ("RL step", "seconds"), note, ())
    return f'<div class="plots">{plot}</div>\n' + table(["role", "mean, s", "longest, s", "sum, s"], rows)


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
