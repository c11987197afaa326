"""The pages' figures: matplotlib drawn to SVG text in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

#: Colours that are readable on white and on black. Text and axes take the page's colour, see ``svg``.
BEFORE, AFTER, TRAIN, HELDOUT = "#8b949e", "#2f81f7", "#2f81f7", "#e8833a"
_ROLES = ("#2f81f7", "#e8833a", "#3fa66b", "#a371d6")
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
        axes.legend()


def reward_curve(train: Curves, heldout: Curves) -> str:
    """Draw the training reward and the held-out evaluations over RL steps, each on an axis of its own."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, bool(train) + bool(heldout), squeeze=False)[0]
        if train:
            lines(axes[0], train, (TRAIN, *_ROLES[2:], BEFORE), "RL step", "training reward")
        if heldout:
            colours = (HELDOUT, *_ROLES[2:], BEFORE)
            lines(axes[-1], heldout, colours, "RL step", "held-out, never optimised", markers=True)

    return svg(draw, "reward", "Reward over RL steps", (8.0, 3.2))


def panels(curves: dict[str, tuple[list[int], list[float]]], name: str, label: str) -> str:
    """Draw each curve on a small axis of its own, side by side."""

    def draw(figure: Figure) -> None:
        for axes, (title, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            lines(axes, {title: curve}, (AFTER,), "RL step", title)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))

    return svg(draw, name, label, (2.9 * len(curves) + 0.6, 2.6))


def against_steps(curves: Curves, ylabel: str, far: Curves, level: float | None) -> str:
    """Draw reward against sampling steps, beside it the distances ``far`` and, dashed, real images' ``level``."""

    def draw(figure: Figure) -> None:
        left, *right = figure.subplots(1, 2 if far else 1, squeeze=False)[0]
        lines(left, curves, (BEFORE, AFTER), "number of proximal steps N", ylabel, markers=True)
        _step_ticks(left, curves)
        for axes in right:
            lines(axes, far, (BEFORE, AFTER), "number of proximal steps N", "distance to data", markers=True)
            _step_ticks(axes, far)
            axes.set_yscale("log")  # few steps have many times the distance of many steps
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            if level:
                axes.axhline(level, color=HELDOUT, linestyle="--", linewidth=1.2, label="real images")
                axes.legend()

    beside = " and distance to data" if far else ""
    return svg(draw, "frontier", f"{ylabel}{beside} against the number of steps", (8.0, 3.2) if far else (6.4, 3.2))


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

    return svg(draw, name, xlabel, (6.4, 0.8 + 0.42 * len(keys)))


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

    return svg(draw, "loss", "Pre-training loss")


def roles(seconds: dict[str, tuple[list[int], list[float]]]) -> str:
    """Draw the seconds of each role over RL steps."""

    def draw(figure: Figure) -> None:
        lines(figure.subplots(), dict(seconds), (*_ROLES, BEFORE), "RL step", "seconds")

    return svg(draw, "roles", "Seconds of each role over RL steps")
