"""The blocks of our pages: plain HTML that fetches nothing, for large and small screens, light and dark."""

from __future__ import annotations

import csv
import io
import math
import re
import time
from collections.abc import Iterable, Sequence
from html import escape
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --line: #d0d7de; --card: #f6f8fa; --paper: #fff;
  --link: #0969da; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9aa4af; --line: #30363d; --card: #161b22; --paper: #0d1117; --link: #58a6ff;
    --warn: #d29922; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 2.5vw, 2rem) 3rem; max-width: 78rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
section { scroll-margin-top: .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } h2, h3 { line-height: 1.3; }
p { margin: .4rem 0; max-width: 60rem; } .faint, figcaption { color: var(--faint); font-size: .875rem; }
a { color: var(--link); } summary { cursor: pointer; padding: .2rem 0; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: .2rem; }
.contents { margin: .8rem 0; padding: .5rem .9rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); font-size: .9rem; } .contents ul { display: flex; flex-wrap: wrap; gap: 0 1.1rem;
  margin: 0; padding: 0; list-style: none; } .contents a { display: inline-block; padding: .15rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .6rem;
  margin: .8rem 0; }
.card { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card);
  min-width: 0; }
.card b { display: block; font-size: 1.2rem; } .scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
@media (max-width: 30rem) { table { font-size: .8rem; } td, th { padding-right: .4rem; } }
figure { margin: .8rem 0; max-width: 32rem; min-width: 0; } svg { display: block; width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .4rem 1.6rem;
  align-items: start; } .plots > figure, .plots > .steady { margin: .5rem 0; }
.csv { white-space: nowrap; font-size: .875rem; }
.steady { border-left: 3px solid var(--line); padding-left: .6rem; }
.missing { color: var(--faint); border-left: 3px solid var(--line); padding-left: .6rem; font-style: italic; }
.problem { border-left: 3px solid var(--warn); padding-left: .6rem; }
pre { background: var(--card); padding: .8rem; font-size: .8rem; white-space: pre-wrap; }
"""


def page(
    name: str,
    kind: str,
    sections: Sequence[tuple[str, str]],
    style: str = "",
    top: str = "",
    contents: bool = False,
    bottom: str = "",
) -> str:
    """Return a whole page on the run or folder ``name``.

    Args:
        kind: what the page is, behind the name: "report" gives the title "<name> - rlproxi report".
        sections: (title, HTML). style: CSS after ``STYLE``. top: HTML before the sections. bottom: HTML after them.
        contents: whether a table of contents stands before the sections.
    """
    body = "\n".join(
        f'<section id="{slug(title)}"><h2>{escape(title)}</h2>\n{content}</section>' for title, content in sections
    )
    items = "".join(f'<li><a href="#{slug(title)}">{escape(title)}</a></li>' for title, _ in sections)
    listing = f'<nav class="contents" aria-label="Contents"><ul>{items}</ul></nav>\n' if contents else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} - rlproxi {kind}</title>\n<style>{STYLE}{style}</style></head><body>\n"
        f'<h1>{escape(name)}</h1><p class="faint">rlproxi {kind}, written {time.strftime("%Y-%m-%d %H:%M")}</p>\n'
        f"{top}\n{listing}<main>\n{body}\n</main>\n{bottom}</body></html>\n"
    )


def slug(title: str) -> str:
    """Return a title as an id: lower-case words with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def missing(sentence: str) -> str:
    """Return a sentence about what the page lacks."""
    return f'<p class="missing">{escape(sentence)}</p>\n'


def problem(sentence: str) -> str:
    """Return a sentence about what went wrong in the run, or has no value there."""
    return f'<p class="problem">{escape(sentence)}</p>\n'


def figure(svg: str, caption: str, link: str = "") -> str:
    """Return a figure as wide as its place, with its caption and a ``link`` (HTML) behind it."""
    return f"<figure>{svg}<figcaption>{escape(caption)} {link}</figcaption></figure>\n"


def csv_link(name: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a link that saves a table as ``<name>.csv``. The link holds the file, so it works without a server.

    A value that is None or not finite becomes an empty cell.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(["" if v is None or (isinstance(v, float) and not math.isfinite(v)) else v for v in row])
    address = f"data:text/csv;charset=utf-8,{quote(buffer.getvalue(), safe=',.')}"
    label = escape(f"Download {name} as CSV")
    return f'<a class="csv" download="{slug(name)}.csv" href="{address}" aria-label="{label}">Download CSV</a>'


def card(label: str, value: str, note: str = "") -> str:
    """Return a card with one large value."""
    return f'<div class="card">{escape(label)}<b>{escape(value)}</b><span class="faint">{escape(note)}</span></div>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table, which scrolls where it is too wide; all columns but the first hold numbers."""

    def row(cells: list[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        inside = (f"<{tag}{scope}{' class=number' if i else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr>{''.join(inside)}</tr>"

    label, body = escape(", ".join(head)), "".join(row(r, "td") for r in rows)
    place = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    return f"{place}<table>{row(head, 'th')}{body}</table></div>\n"
