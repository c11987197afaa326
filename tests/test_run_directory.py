"""The layout of a run directory, and that no other module spells it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlproxi.run_directory import INSIDE, RunDirectory

ROOT = Path(__file__).parents[1]
#: Spellings that mean nothing but a path in a run directory.
UNIQUE = r"metrics\.jsonl|timeline\.jsonl|summary\.json|report\.html|ray_train|-N$"
#: Words with other meanings, which are paths where they stand in a path.
WORDS = r"config\.yaml|models|checkpoints|samples|evaluation|cache|curated|tensorboard"


def test_the_layout_never_changes():
    """Runs of earlier versions are resumed, reported and compared."""
    run = RunDirectory("runs/x")
    paths = {name: str(path.relative_to("runs/x")) for name, path in vars(run).items() if name != "path"}
    assert paths == {
        "config": "config.yaml",
        "log": "metrics.jsonl",
        "timeline": "timeline.jsonl",
        "summary": "summary.json",
        "report": "report.html",
        "models": "models",
        "start": "models/start",
        "pretrained": "models/pretrained",
        "best": "models/best",
        "final": "models/final",
        "text": "models/text",
        "evaluations": "evaluation",
        "samples": "samples",
        "cache": "cache",
        "curated": "curated",
        "ray_train": "ray_train",
        "tensorboard": "tensorboard",
    }
    assert run.name == "x" and run.path == Path("runs/x")
    assert str(INSIDE.model("best")) == "models/best" and str(INSIDE.merged("final")) == "models/final-merged"
    assert str(INSIDE.scorer("judge")) == "models/judge.safetensors"
    assert str(INSIDE.checkpoints("rl")) == "checkpoints/rl"
    assert str(INSIDE.evaluation("step-4")) == "evaluation/step-4.json"
    assert str(INSIDE.evaluation_samples("before", 3)) == "samples/before-N3.npz"
    assert str(INSIDE.gallery(7)) == "samples/000007.json"
    assert str(INSIDE.gallery_picture(7, 2)) == "samples/000007-2.png"


def test_the_layout_is_light_to_import():
    code = "import sys, rlproxi.run_directory; assert not {'torch', 'numpy', 'ray', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def spelt(tree: ast.AST) -> list[str]:
    """The strings of a module that spell a path inside a run directory.

    A string of several words, or one that stands alone as a statement, speaks to people: a docstring, a message. Of the
    others, one that holds a spelling of UNIQUE counts wherever it stands. One of WORDS counts where it is joined to a
    path: on the right of ``/``, as an argument of Path, joinpath, with_name, glob, rglob or relative_to.
    """
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    joined: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            parts = list(node.args) if name in ("Path", "joinpath", "with_name", "glob", "rglob", "relative_to") else []
        for part in parts:
            inside = [n for n in ast.walk(part) if isinstance(n, ast.Subscript)]
            keys = {id(key) for n in inside for key in ast.walk(n)}  # values["samples"] is no path
            joined |= {id(n) for n in ast.walk(part)} - keys
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docs:
            continue
        text = node.value
        if " " in text:
            continue
        if re.search(rf"(^|[/.])({UNIQUE})", text) or (id(node) in joined and re.search(rf"(^|/)({WORDS})(/|$)", text)):
            found.append(f"line {node.lineno}: {text!r}")
    return found


@pytest.mark.parametrize(
    "code, count",
    [
        ('run / "models" / "final"', 1),
        ('Path(run, "checkpoints")', 1),
        ('run / f"samples/{step}.json"', 1),
        ('f"{tag}-N{steps}.npz"', 1),
        ('open("metrics.jsonl")', 1),
        ('raise ValueError("see metrics.jsonl and models/best")', 0),
        ('"""samples/<tag>-N<steps>.npz"""', 0),
        ('log.append("evaluation", samples=values["samples"])', 0),
        ('summary["kept"] / summary["samples"]', 0),
    ],
)
def test_the_rule_tells_paths_from_words(code, count):
    assert len(spelt(ast.parse(code))) == count


def test_no_other_module_spells_a_path_inside_a_run_directory():
    own = ROOT / "rlproxi" / "run_directory.py"
    files = [f for folder in ("rlproxi", "actors") for f in sorted((ROOT / folder).rglob("*.py")) if f != own]
    found = {str(f.relative_to(ROOT)): spelt(ast.parse(f.read_text(encoding="utf-8"))) for f in files}
    assert len(files) > 100
    assert {f: lines for f, lines in found.items() if lines} == {}
