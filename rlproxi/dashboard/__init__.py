"""The files of the live page: plain JavaScript that needs no build and fetches nothing from other hosts."""

from pathlib import Path

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: File name -> media type of every file that is served.
ASSETS = {file.name: _TYPES[file.suffix] for file in Path(__file__).parent.iterdir() if file.suffix in _TYPES}
#: File name -> path of the documents that are served: those that explain the page. Empty where docs/ is not installed.
DOCUMENTS = {
    name: path
    for name in ("dashboard.md", "glossary.md", "guards.md", "method.md", "my-reward-does-not-rise.md")
    if (path := Path(__file__).parents[2] / "docs" / name).is_file()
}


def asset(name: str) -> bytes:
    """The bytes of one of ``ASSETS``."""
    return (Path(__file__).parent / name).read_bytes()
