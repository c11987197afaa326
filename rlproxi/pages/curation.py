"""``curation.html``: which samples were kept, and why the others were not, on one page that fetches nothing."""

from __future__ import annotations

from html import escape

import numpy as np
import yaml
from matplotlib.figure import Figure

from ..data.curation.merge import HANDS, KEPT, Series, Statistics
from ..data.curation.records import stages
from . import figures
from .html import card, figure, missing, page, table

_PICTURES = """
.shots { display: flex; flex-wrap: wrap; gap: .7rem; } .shots div { width: 11rem; font-size: .75rem; line-height: 1.3;
  overflow-wrap: anywhere; } .shots img { display: block; max-width: 100%; border-radius: .25rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
"""

#: A histogram of more values ends at their 99.5th percentile, for one odd image would flatten it.
_CLIPPED = 1000

#: What a stage drops, or a group holds.
_MEANING = {
    "unreadable": "no image, no caption, damaged",
    "size": "too small or too narrow",
    "faces": "no face, too small, too uncertain or too many",
    "duplicates": "copies of a kept picture",
    KEPT: "in the curated shards",
    HANDS: "kept and tagged as hand-focused",
}


def shown(statistics: Statistics) -> list[str]:
    """Return the groups of pictures in the page's order."""
    return [KEPT, HANDS, *stages(statistics.settings)]


def render(statistics: Statistics, found: dict[str, dict[int, str]], name: str) -> str:
    """Return the page as HTML. ``found``: ``pictures.peek`` of each shard."""
    settings = yaml.safe_dump(statistics.settings.model_dump(mode="json"), sort_keys=False)
    sections = [
        ("How many were kept", _cards(statistics)),
        ("What each stage dropped", _funnel(statistics)),
        ("Distributions, kept and dropped", _histograms(statistics)),
        ("Pictures", _pictures(statistics, found)),
        ("Settings", f"<details><summary>curate</summary><pre>{escape(settings)}</pre></details>\n"),
    ]
    return page(name, "curation", sections, _PICTURES)


def _cards(statistics: Statistics) -> str:
    summary = statistics.summary()
    share = f"{summary['kept'] / summary['samples']:.1%} of them" if summary["samples"] else ""
    hands = statistics.tags[HANDS]
    cards = [
        card("Raw samples", f"{summary['samples']:,}", f"in {summary['raw_shards']:,} shards"),
        card("Kept", f"{summary['kept']:,}", share),
        card("Curated shards", f"{summary['shards']:,}", f"of {statistics.settings.samples_per_shard:,} samples"),
    ]
    if statistics.settings.hands:
        part = f"{hands / summary['kept']:.1%} of the kept" if summary["kept"] else ""
        cards.append(card("Tagged 'hands'", f"{hands:,}", part))
    return f'<div class="cards">{"".join(cards)}</div>\n'


def _funnel(statistics: Statistics) -> str:
    stages = statistics.funnel()
    bars = [("raw", statistics.total), *((row["stage"], row["out"]) for row in stages)]

    def draw(figure: Figure) -> None:
        axes, at = figure.subplots(), np.arange(len(bars))[::-1]
        axes.barh(at, [count for _, count in bars], 0.66, color=figures.AFTER)
        for y, (_, count) in zip(at, bars, strict=True):
            axes.annotate(f"{count:,}", (count, y), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(at, [name if name == "raw" else f"after {name}" for name, _ in bars])
        axes.set_xlabel("samples left")
        axes.margins(x=0.12)
        axes.set_axisbelow(True)
        axes.grid(axis="y", visible=False)

    svg = figures.svg(draw, "funnel", "Samples left after each stage", (7.2, 0.8 + 0.34 * len(bars)))
    rows = []
    for row in stages:
        share = f"{row['dropped'] / row['in']:.1%}" if row["in"] else "-"
        rows.append([row["stage"], f"{row['in']:,}", f"{row['dropped']:,}", share, f"{row['out']:,}"])
    out = figure(svg, "manifest.jsonl says where each sample is, or why it was dropped.")
    out += table(["stage", "samples in", "dropped", "share", "left"], rows)
    if statistics.unreadable:
        kinds = sorted(statistics.unreadable.items(), key=lambda kind: (-kind[1], kind[0]))
        out += table(["unreadable, because", "samples"], [[kind, f"{count:,}"] for kind, count in kinds])
    return out


def _histograms(statistics: Statistics) -> str:
    if not statistics.series:
        return missing("No sample could be read.")
    return "".join(_histogram(name, series) for name, series in statistics.series.items())


def _histogram(name: str, series: Series) -> str:
    values, kept = np.frombuffer(series.values, np.float32), np.frombuffer(series.kept, np.int8).astype(bool)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = np.percentile(values, [0, 99.5]) if len(values) > _CLIPPED else (values.min(), values.max())
        edges = np.linspace(low, high if high > low else low + 1, 41)
        inside = np.clip(values, edges[0], edges[-1])
        parts, colours = [inside[kept], inside[~kept]], [figures.AFTER, figures.BEFORE]
        axes.hist(parts, edges.tolist(), stacked=True, color=colours, label=["kept", "dropped"])
        axes.set_axisbelow(True)
        axes.set_xlabel(name)
        axes.set_ylabel("samples")
        axes.legend()

    note = "The last bar holds the 0.5 % beyond it as well." if len(values) > _CLIPPED else ""
    return figure(figures.svg(draw, name, f"Histogram of {name}", (7.2, 2.3)), note)


def _pictures(statistics: Statistics, found: dict[str, dict[int, str]]) -> str:
    out = '<p class="faint">Chosen by a hash of their names. Frames are the faces that were found.</p>\n'
    for group in shown(statistics):
        cells = ""
        for example in statistics.examples(group):
            if picture := found.get(example.shard, {}).get(example.index):
                cells += f'<div><img alt="" src="{picture}">{escape(example.words)}</div>'
        title = group if group in (KEPT, HANDS) else f"dropped: {group}"
        if cells:
            out += f'<h3>{escape(title)}</h3><p class="faint">{_MEANING.get(group, "score out of bounds")}</p>\n'
            out += f'<div class="shots">{cells}</div>\n'
    return out
