"""The files of the live page: plain JavaScript that needs no build and fetches nothing from other hosts."""

from pathlib import Path

#: File name -> media type of every file that is served.
ASSETS = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{
        f"{name}.js": "text/javascript; charset=utf-8"
        for name in ("app", "chart", "config", "dom", "gallery", "sections", "status", "store", "timeline")
    },
}


def asset(name: str) -> bytes:
    """The bytes of a file of the page. Raises KeyError for a name outside ``ASSETS``."""
    if name not in ASSETS:
        raise KeyError(name)
    return (Path(__file__).parent / name).read_bytes()
