"""The live page: its files, as they are served. Plain JavaScript, nothing to build, nothing fetched."""

from pathlib import Path

#: What is served, and as what.
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
    """The bytes of a file of the page. Raises KeyError for a name that is not in ``ASSETS``."""
    if name not in ASSETS:
        raise KeyError(name)
    return (Path(__file__).parent / name).read_bytes()
