"""The blocks of our pages: plain HTML that fetches nothing, for large and small screens, light and dark."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --line: #d0d7de; --card: #f6f8fa; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #8d96a0; --line: #30363d; --card: #161b22; --paper: #0d1117; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; } .faint, figcaption { color: var(--faint); font-size: .875rem; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: .8rem 0; }
.card { flex: 1 1 10rem; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); }
.card b { display: block; font-size: 1.35rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; } td.number, th.number { text-align: right; }
figure { margin: .8rem 0; } svg { display: block; width: 100%; min-width: 30rem; height: auto; }
.missing { color: var(--faint); border-left: 3px solid var(--line); padding-left: .6rem; font-style: italic; }
.prompt { margin: 1rem 0; padding-top: .6rem; border-top: 1px solid var(--line); }
.pair { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; } .side { flex: 1 1 18rem; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; } .shot { width: 5.2rem; font-size: .75rem; line-height: 1.25; }
.shot img { display: block; width: 100%; image-rendering: pixelated; border-radius: .25rem; }
.wrong { color: var(--faint); } pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def page(name: str, kind: str, sections: Sequence[tuple[str, str]], style: str = "", top: str = "") -> str:
    """Return a whole page on the run or folder ``name``.

    Args:
        kind: what the page is, behind the name: "report" gives the title "<name> - rlproxi report".
        sections: (title, HTML). style: CSS after ``STYLE``. top: HTML before the sections.
    """
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} - rlproxi {kind}</title>\n<style>{STYLE}{style}</style></head><body>\n"
        f'<h1>{escape(name)}</h1><p class="faint">rlproxi {kind}, written {time.strftime("%Y-%m-%d %H:%M")}</p>\n'
        f"{top}\n{body}\n</body></html>\n"
    )


def missing(sentence: str) -> str:
    """Return a sentence about what the page lacks."""
    return f'<p class="missing">{escape(sentence)}</p>\n'


def figure(svg: str, caption: str) -> str:
    """Return a figure, which scrolls where it is too wide, with its caption."""
    return f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>\n'


def card(label: str, value: str, note: str = "") -> str:
    """Return a card with one large value."""
    return f'<div class="card">{escape(label)}<b>{escape(value)}</b><span class="faint">{escape(note)}</span></div>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table, which scrolls where it is too wide; all columns but the first hold numbers."""

    def row(cells: list[str], tag: str) -> str:
        inside = (f"<{tag}{' class=number' if i else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr>{''.join(inside)}</tr>"

    return f'<div class="scroll"><table>{row(head, "th")}{"".join(row(r, "td") for r in rows)}</table></div>\n'
