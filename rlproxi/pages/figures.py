"""The pages' figures: matplotlib drawn to SVG text in the page's own colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

#: Colours that are readable on white and on black. Text and axes take the page's colour, see ``svg``.
#: Each has a contrast of 3 or more with both.
BEFORE, AFTER, TRAIN, HELDOUT, LEVEL = "#848d97", "#2f81f7", "#2f81f7", "#d9711f", "#2e9a5c"
_ROLES = ("#2f81f7", "#d9711f", "#2e9a5c", "#a371d6")
#: Inches of a plot: its text stays readable where two or three stand side by side, and on a phone.
SIZE = (4.4, 2.8)
_INK = "#010203"  # stands for the page's text colour, replaced in the SVG

_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(_INKED, _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"},
    **{"axes.grid": True, "grid.alpha": 0.2, "lines.linewidth": 1.8},
}

#: label -> (xs, ys), or (xs, ys, errors).
Curves = dict[str, tuple]


def svg(draw: Callable[[Figure], None], name: str, label: str, size: tuple[float, float] = (6.4, 3.2)) -> str:
    """Return what ``draw`` draws on an empty figure as one scalable <svg>, without ids that clash on the page.

    ``name`` seeds the ids, and ``label`` is the text for a screen reader. ``size`` is in inches.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        # A Figure without pyplot needs no display and has no global state.
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unnamed)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(label)}">{rest}'


def lines(axes, curves: Curves, colours: Sequence[str], xlabel: str, ylabel: str, markers: bool = False) -> None:
    """Draw curves, with error bars where they have three parts, and a legend where there is more than one."""
    for (label, curve), colour in zip(curves.items(), colours, strict=False):
        xs, ys, errors = (*curve, None)[:3]
        marker = "o" if markers or len(xs) == 1 else None
        if errors is None:
            axes.plot(xs, ys, color=colour, label=label, marker=marker, markersize=4)
        else:
            axes.errorbar(xs, ys, yerr=errors, color=colour, label=label, marker="o", markersize=4, capsize=3)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(curves) > 1:
        _legend(axes)


def _legend(axes) -> None:
    """Put the legend above the axes, where it hides no curve."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9, borderaxespad=0.2, columnspacing=1.2)


def plot(
    curves: Curves,
    name: str,
    label: str,
    axes: tuple[str, str],
    colours: Sequence[str] = (AFTER,),
    markers: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Draw curves on one pair of axes.

    Args:
        name: seeds the figure's ids. label: the text for a screen reader. axes: the labels of x and y.
        markers: whether each point has a dot.
        level: (label, value) of a dashed line that the curves are compared with.
    """

    def draw(figure: Figure) -> None:
        only = figure.subplots()
        lines(only, curves, (*colours, *_ROLES, BEFORE), *axes, markers=markers)
        if level is not None:
            only.axhline(level[1], color=LEVEL, linestyle="--", linewidth=1.2, label=level[0])
            _legend(only)
        only.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        if all(type(x) is int for curve in curves.values() for x in curve[0]):
            only.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))

    return svg(draw, name, label, SIZE)


def unchanging(values: Sequence[float]) -> bool:
    """Return whether the finite ones of ``values`` are all the same, to the precision of float32."""
    finite = [v for v in values if math.isfinite(v)]
    return not finite or max(finite) - min(finite) <= 1e-6 * max(map(abs, finite))


def against_steps(curves: Curves, ylabel: str, level: float | None = None, log: bool = False) -> str:
    """Draw a figure against the number of sampling steps and, dashed, real images' ``level``."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lines(axes, curves, (BEFORE, AFTER), "number of proximal steps N", ylabel, markers=True)
        _step_ticks(axes, curves)
        if log:
            axes.set_yscale("log")  # few steps have many times the distance of many steps
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        if level:
            axes.axhline(level, color=LEVEL, linestyle="--", linewidth=1.2, label="real images")
            _legend(axes)

    return svg(draw, f"frontier {ylabel}", f"{ylabel} against the number of steps", SIZE)


def _step_ticks(axes, curves: Curves) -> None:
    ticks = sorted({x for curve in curves.values() for x in curve[0]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def paired_bars(before: dict[str, float], after: dict[str, float], xlabel: str, name: str) -> str:
    """Draw a pair of horizontal bars for each key, shares in [0, 1]; a side without a value has no bar."""
    keys = list(dict.fromkeys([*before, *after]))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at = np.arange(len(keys))[::-1]
        for values, colour, label, shift in ((before, BEFORE, "before", 0.2), (after, AFTER, "after", -0.2)):
            if values:
                axes.barh(at + shift, [values.get(k, np.nan) for k in keys], 0.38, color=colour, label=label)
        axes.set_yticks(at, keys)
        axes.set_xlim(0, 1)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return svg(draw, name, xlabel, (4.8, 0.8 + 0.36 * len(keys)))


def loss_curve(steps: list[int], values: list[float]) -> str:
    """Draw a loss over optimizer steps, with its moving average where it has 40 records or more."""
    curves: Curves = {"each record": (steps, values)}
    width = len(values) // 20
    if width > 1:
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        curves[f"mean of {width} records"] = (steps[width - 1 :], smooth)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lines(axes, curves, (BEFORE, AFTER) if width > 1 else (AFTER,), "step", "loss")
        axes.lines[0].set_linewidth(1.0)

    return svg(draw, "loss", "Pre-training loss", SIZE)
