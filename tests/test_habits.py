"""What CONTRIBUTING.md asks for and a machine can check: line length, docstrings, class names, paths in texts."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = [file for folder in ("rlproxi", "actors") for file in sorted((ROOT / folder).rglob("*.py"))]
TEXTS = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_line_is_longer_than_120_characters():
    files = [*OURS, *sorted((ROOT / "tests").rglob("*.py"))]
    long = [
        f"{name(file)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, node) of every public class, function and method; what is defined within a function is private."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name.startswith("_"):
                continue
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from definitions(child, prefix)


@pytest.mark.parametrize("file", OURS, ids=name)
def test_everything_public_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has none"
    found = list(definitions(tree))
    documented = {dotted for dotted, node in found if ast.get_docstring(node)}  # a setter needs none beside its getter
    assert [f"{dotted} (line {node.lineno})" for dotted, node in found if dotted not in documented] == []


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for file in OURS:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name(file))
    assert {each: files for each, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("text", TEXTS, ids=name)
def test_links_and_paths_in_texts_lead_somewhere(text):
    content = text.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", content) if "://" not in link}
    lost = {link for link in links if not (text.parent / link).exists()}
    paths = set(re.findall(r"(?<![\w./-])((?:rlproxi|actors|tests|configs|cluster|docs)/[\w/.-]*\w)", content))
    paths = {path for path in paths if "NAME" not in path}
    lost |= {path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()}
    assert lost == set()
