"""The import graph of rlproxi/ and actors/: who may know whom (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlproxi", "actors")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of ours that a module imports, at its top or within a function."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known or source in known:
                    yield inner if inner in known else source


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    known = modules()
    return {name: set(imports(name, file, known)) - {name} for name, file in known.items()}


def folder(name: str) -> str:
    """The folder that holds a module; a file at the top of a package is a place of its own."""
    file = modules()[name]
    parent = file.parent.relative_to(ROOT)
    return name if len(parent.parts) == 1 and file.name != "__init__.py" else ".".join(parent.parts)


def by_folder() -> dict[str, set[str]]:
    """Folder -> folders that its modules import."""
    found: dict[str, set[str]] = {}
    for name, needed in graph().items():
        found.setdefault(folder(name), set()).update(folder(n) for n in needed if folder(n) != folder(name))
    return found


@pytest.mark.parametrize("of", [graph, by_folder])
def test_nothing_imports_itself_in_a_circle(of):
    try:
        list(TopologicalSorter(of()).static_order())
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_proximal_imports_nothing_else_of_ours():
    outside = {
        name: {n for n in needed if not n.startswith("rlproxi.proximal")}
        for name, needed in graph().items()
        if name.startswith("rlproxi.proximal")
    }
    assert not {name: needed for name, needed in outside.items() if needed}


def test_only_the_command_line_and_the_api_import_actors():
    upward = {
        name
        for name, needed in graph().items()
        if name.startswith("rlproxi") and any(n.startswith("actors") for n in needed)
    }
    assert {name for name in upward if not name.startswith("rlproxi.cli.") and name != "rlproxi.api"} == set()


def test_the_library_imports_no_ray():
    for name, file in modules().items():
        if name.startswith("rlproxi") and not name.startswith("rlproxi.cli"):
            for node in ast.walk(ast.parse(file.read_text())):
                named = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if (isinstance(node, ast.ImportFrom) and not node.level)
                    else []
                )
                assert not any(n.split(".")[0] == "ray" for n in named), name
