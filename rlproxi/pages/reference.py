"""docs/configuration.md, from schema and scorers: ``python -m rlproxi.pages.reference > docs/configuration.md``.

With ``--algorithm package.module:Class`` the section `custom` has that class's keys; ``--scorer`` adds your scorers.
"""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Sequence

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..config.algorithms import ALGORITHMS, configured
from ..config.loading import model_of, schema
from ..config.section import Section
from ..rewards import TorchScorer, facts, is_differentiable, registry
from ..rewards.base import parameter_schema

_HEAD = """\
# Configuration

Generated from `rlproxi/` by `python -m rlproxi.pages.reference > docs/configuration.md`; do not edit.

A config is a YAML file of the sections below. Every key has a default, so a file holds only what differs, and every key
can be given on the command line: `python -m rlproxi.run configs/quickstart.yaml rl.lr=1e-5 run.seed=3`. Unknown keys
and combinations that cannot be run are refused before anything starts. The config as resolved, every key, is written to
`config.yaml` in the run directory.
"""

_SCORERS = """\
## Scorers

What `scorer` of a reward may name (without it, `name` does), and the `params` of each. Beside the built-in ones it may
be a class of your own, `package.module:Class` ([docs/rewards/](rewards/README.md)). A differentiable scorer can train
R0 and DIDR by its gradients.
"""


def describe(algorithm: str | None = None, scorers: Sequence[str] = ()) -> str:
    """The page in Markdown, with a newline at its end; ``custom`` is as ``algorithm`` defines it.

    ``scorers`` are ``package.module:Class`` of your own, listed behind the registered ones.
    """
    parts = [_HEAD]
    for name, section in schema(algorithm).items():
        parts += _sections(name, section, f"`{name}`", f"{name}.", 2)
        if name == "rl":
            parts += [_other_defaults(algorithm)]
    return "\n".join([*parts, _SCORERS, *_scorers([*registry.names(), *scorers])]) + "\n"


def _scorers(names: Sequence[str]) -> list[str]:
    """A table of scorers, one line for all names of a class."""
    by_class: dict[type, list[str]] = {}
    for name in names:
        by_class.setdefault(registry.get(name), []).append(name)
    shared = parameter_schema(TorchScorer).model_fields
    lines = ["| scorer | params | gradients | score |", "|---|---|---|---|"]
    for kind, (name, *aliases) in by_class.items():
        known, params = facts(name), []
        for key, field in parameter_schema(kind).model_fields.items():
            if key in shared and field.default == shared[key].default:
                continue
            note = ", a file" if key in known.file_parameters else ""
            default = "the stage `prepare` makes it" if note and known.prepared_as else _default(field)
            params.append(_escape(f"`{key}`: {_type(field)}{note}; {default}"))
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")
        gradients = "yes" if is_differentiable(name) else "no"
        cells = (", ".join(f"`{n}`" for n in (name, *aliases)), "<br>".join(params), gradients, _escape(meaning))
        lines.append("| " + " | ".join(cells) + " |")
    options = "; ".join(f"`{key}`: {_type(field)}; {_default(field)}" for key, field in shared.items())
    return [*lines, "", f"Networks also take the following, unless the table has another default: {options}."]


def _other_defaults(algorithm: str | None) -> str:
    """The keys of ``rl`` whose default depends on ``run.algorithm``."""
    names = sorted({*ALGORITHMS.names(), *([algorithm] if algorithm else [])})
    lines = [
        f"- `{name}`: " + ", ".join(f"`rl.{key}` {value:g}" for key, value in found.items())
        for name in names
        if (found := configured(name).defaults)
    ]
    return "\n".join(["Other defaults by `run.algorithm`:", "", *lines, ""])


def _sections(path: str, section: type[Section], title: str, prefix: str, level: int) -> list[str]:
    """A section's table, and those of the sections inside it."""
    parts = [_section(title, section, prefix, level)]
    inside: dict[type[Section], list[str]] = {}
    for name, field in section.model_fields.items():
        inner = model_of(field.annotation)
        if inner:
            inside.setdefault(inner, []).append(name)
    for inner, names in inside.items():
        keys = " and ".join(f"`{path}.{name}`" for name in names)
        field = section.model_fields[names[0]]
        if typing.get_origin(field.annotation) is list:
            parts += _sections("", inner, f"Each entry of {keys}", "", level + 1)
        else:
            optional = ", where it is not null" if _nullable(field) else ""
            parts += _sections(f"{path}.{names[0]}", inner, f"{keys}{optional}", f"{path}.{names[0]}.", level + 1)
    return parts


def _section(title: str, section: type[Section], prefix: str, level: int = 2) -> str:
    lines = [f"{'#' * level} {title}", ""]
    # A section without a docstring inherits none of ours; pydantic's own must not appear here.
    own = section.__dict__.get("__doc__")
    if own:
        lines += [" ".join(own.split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = (f"`{prefix}{name}`", _type(field), _default(field), field.description or "")
        lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _escape(cell: str) -> str:
    """Markdown eats <words> as tags, outside of `code`, and ends a cell at a bar."""
    pieces = cell.replace("|", "\\|").split("`")
    return "`".join(p if i % 2 else p.replace("<", "&lt;") for i, p in enumerate(pieces))


def _type(field: FieldInfo) -> str:
    """The annotation in words, with its bounds: 'int, >= 1', '`hybrid`, `backward` or `ode`', 'list of int or null'."""
    parts = [a for a in typing.get_args(field.annotation) if a is not type(None)] if _nullable(field) else []
    text = _words(parts[0] if parts else field.annotation) + _bounds(field)
    return f"{text}, or null" if parts else text


def _bounds(field: FieldInfo) -> str:
    """', >= 1, <= 9'; '' without any."""
    return "".join(
        f", {sign} {getattr(item, bound)}"
        for bound, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        for item in field.metadata
        if hasattr(item, bound)
    )


def _nullable(field: FieldInfo) -> bool:
    return type(None) in typing.get_args(field.annotation)


def _words(annotation: typing.Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _words(arguments[0]) + _bounds(arguments[1])
    if origin is typing.Literal:
        options = [f"`{option}`" for option in arguments]
        return options[0] if len(options) == 1 else ", ".join(options[:-1]) + f" or {options[-1]}"
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} x {_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "sections" if annotation.model_fields.get("name") else "a section"
    return {str: "text", bool: "true or false"}.get(annotation, annotation.__name__)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, list) and value and isinstance(value[0], Section):
        value = [entry.model_dump(exclude_defaults=True) for entry in value]
    # JSON is YAML, so a default can be pasted into a config as it stands.
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m rlproxi.pages.reference", description=__doc__)
    parser.add_argument("--algorithm", help="an algorithm of your own, package.module:Class")
    parser.add_argument("--scorer", action="append", default=[], help="a scorer of your own, package.module:Class")
    given = parser.parse_args()
    print(describe(given.algorithm, given.scorer), end="")
