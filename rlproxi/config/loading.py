"""The one typed config, made of the sections of ``sections`` and of the algorithms; unknown keys are refused.

``load_config`` reads a YAML file, applies ``key=value`` overrides, validates everything that
can be known before a cluster is asked for anything, and raises ``ConfigError`` with the key, the
value and the remedy.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from ..errors import ConfigError
from ..files import write_text
from .algorithms import ALGORITHMS, RL, algorithm_sections, configured, section_name
from .curation import Curate
from .guards import Guards
from .plain_yaml import read_yaml
from .section import Section
from .sections import (
    Data,
    Evaluate,
    Faults,
    Learner,
    Model,
    Prepare,
    Pretrain,
    Resources,
    Rewards,
    Run,
    Sampler,
    Schedule,
    Telemetry,
)

S = TypeVar("S", bound=Section)


class Config(Section):
    """The whole run. Beside these sections it has those of the registered algorithms, such as ``config.grpo``."""

    model_config = ConfigDict(extra="allow")

    run: Run = Field(default_factory=Run)
    data: Data = Data()
    curate: Curate = Curate()
    model: Model = Model()
    schedule: Schedule = Schedule()
    sampler: Sampler = Sampler()
    rewards: Rewards = Rewards()
    prepare: Prepare = Prepare()
    pretrain: Pretrain = Pretrain()
    rl: RL = RL()
    learner: Learner = Learner()
    guards: Guards = Guards()
    resources: Resources = Resources()
    evaluate: Evaluate = Evaluate()
    faults: Faults = Faults()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="wrap")
    @classmethod
    def _with_algorithms(cls, values: Any, handler: ModelWrapValidatorHandler[Config]) -> Config:
        """Validate the algorithms' sections, and fill in the defaults that ``run.algorithm`` has for ``rl``."""
        if not isinstance(values, dict):
            return handler(values)
        algorithm = _algorithm_of(values)
        sections = algorithm_sections(algorithm)
        fixed = {key: value for key, value in values.items() if key not in sections}
        if isinstance(fixed.setdefault("rl", {}), dict):
            fixed["rl"] = {**configured(algorithm).defaults, **fixed["rl"]}
        problems = [
            InitErrorDetails(type="extra_forbidden", loc=(key,), input=fixed.pop(key))
            for key in list(fixed)
            if isinstance(key, str) and key not in cls.model_fields
        ]
        made = {}
        for name, kind in sections.items():
            try:
                made[name] = kind.model_validate(values.get(name, {}))
            except ValidationError as error:
                problems += _details(error, name)
        try:
            config = handler({**fixed, **made})
        except ValidationError as error:
            problems += _details(error)
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return config

    @model_validator(mode="after")
    def _across(self) -> Config:
        self.sampler.plan(self.schedule.build())
        self.check_counts("pretrain.candidates", self.pretrain.candidates)
        self.check_counts("evaluate.steps", self.evaluate.steps)
        if "rl" in self.run.stages:
            configured(self.run.algorithm).check_config(self)
        workers = self.resources.learner_workers
        self._share_prompts(workers)
        share, left = divmod(self.pretrain.batch_size, workers)
        micro = self.pretrain.micro_batch_size or share
        if "pretrain" in self.run.stages and (left or share % micro):
            raise ValueError(
                f"pretrain.batch_size {self.pretrain.batch_size} is not a multiple of learner_workers "
                f"{workers} x micro_batch_size {micro}: change one of them"
            )
        m = self.model
        if m.init is None and m.encoders is None:
            levels = m.patch * (2 ** (len(m.channels) - 1) if m.kind == "unet" else 1)
            if self.data.size % levels or self.data.size % 8:
                raise ValueError(
                    f"data.size {self.data.size} must be a multiple of {math.lcm(levels, 8)} "
                    "(model.patch x 2^(levels - 1), and 8 for the classifier)"
                )
        self._check_rewards()
        return self

    @property
    def section(self) -> str:
        """The name of the algorithm's own section: ``run.algorithm``, or ``custom`` for package.module:Class."""
        return section_name(self.run.algorithm)

    @property
    def algorithm_parts(self) -> tuple[str, ...]:
        """The names of the sections that the algorithm reads: ``rl``, its own, and those it shares."""
        return ("rl", self.section, *configured(self.run.algorithm).shared)

    def part(self, name: str, kind: type[S]) -> S:
        """The section of this name, which is of this class."""
        found = getattr(self, name)
        if not isinstance(found, kind):
            raise TypeError(f"section {name} is a {type(found).__name__}, not a {kind.__name__}")
        return found

    def with_rl(self, **values: Any) -> Config:
        """The same run with other settings in ``rl``."""
        return self.with_section("rl", **values)

    def with_section(self, name: str, **values: Any) -> Config:
        """The same run with other settings in one section. They are not validated."""
        return self.model_copy(update={name: self.part(name, Section).model_copy(update=values)})

    def check_counts(self, key: str, counts: list[int] | None) -> None:
        """Raise ValueError, naming ``key``, for a number of steps that the sampler cannot take."""
        schedule = self.schedule.build()
        for count in counts or ():
            try:
                self.sampler.plan(schedule, count)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None

    def _share_prompts(self, workers: int) -> None:
        """Fill in ``rl.groups_per_micro_batch``, and check that ranks and updates get equal shares."""
        g = self.rl
        if g.groups_per_micro_batch is None:
            groups = groups_that_fit(g, workers, max(1, 32 // g.group_size)) or 1
            self.rl = g = g.model_copy(update={"groups_per_micro_batch": groups})
        if g.prompts_per_step % g.groups:
            raise ValueError(
                f"rl.prompts_per_step {g.prompts_per_step} is not a multiple of groups_per_micro_batch "
                f"{g.groups_per_micro_batch}: make it one, so that micro-batches hold whole groups"
            )
        if g.micro_batches % (workers * g.updates_per_step):
            raise ValueError(
                f"rl: {g.micro_batches} micro-batches (prompts_per_step {g.prompts_per_step} / "
                f"groups_per_micro_batch {g.groups_per_micro_batch}) cannot be shared by resources.learner_workers "
                f"{workers} x rl.updates_per_step {g.updates_per_step}: make prompts_per_step a multiple of "
                f"{g.groups * workers * g.updates_per_step}"
            )

    def _check_rewards(self) -> None:
        train, heldout = self.rewards.train, self.rewards.heldout
        both = [r.name for r in heldout if any((r.kind, r.params) == (t.kind, t.params) for t in train)]
        if both:
            raise ValueError(
                f"rewards.heldout {both} are also optimised; a held-out judge must not be a training reward"
            )
        names = [r.name for r in [*train, *heldout]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"rewards: {', '.join(twice)} appears twice; give each a name of its own and set scorer: {twice[0]}"
            )
        for r in self.rewards.all:
            replicas = self.rewards.replicas_of(r)
            if replicas.most < replicas.least:
                raise ValueError(
                    f"rewards: {r.name} has max_replicas {replicas.most} below its {replicas.least} replicas; raise it"
                )


def groups_that_fit(settings: RL, workers: int, most: int) -> int | None:
    """The largest number of groups in a micro-batch, up to ``most``, with equal shares for ranks and updates."""
    for groups in range(min(most, settings.prompts_per_step), 0, -1):
        count, left = divmod(settings.prompts_per_step, groups)
        if left == 0 and count % (workers * settings.updates_per_step) == 0:
            return groups
    return None


def smaller_micro_batch(config: Config, stage: str) -> Config | None:
    """The same run with about half the images in a forward of ``pretrain`` or ``rl``; None where it cannot be smaller.

    Training gives the same weights up to rounding, because the global batch stays as it is.
    """
    workers = config.resources.learner_workers
    if stage == "rl":
        groups = groups_that_fit(config.rl, workers, config.rl.groups // 2)
        return config.with_rl(groups_per_micro_batch=groups) if groups else None
    p = config.pretrain
    share = p.batch_size // workers
    now = p.micro_batch_size or share
    fitting = [size for size in range(1, now // 2 + 1) if share % size == 0]
    return config.with_section("pretrain", micro_batch_size=fitting[-1]) if fitting else None


def schema(algorithm: str | None = None) -> dict[str, type[Section]]:
    """The sections of a config by name; ``custom`` is as ``algorithm`` defines it. None: the default algorithm.

    Raises ValueError where ``algorithm`` is an unknown name.
    """
    found: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        found[name] = model_of(field.annotation) or Section
        if name == "rl":
            found |= algorithm_sections(algorithm or ALGORITHMS.default)
    return found


def model_of(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation (also inside list[...]), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        found = model_of(argument)
        if found:
            return found
    return None


def _algorithm_of(values: Any) -> str:
    """``run.algorithm`` of unchecked values; the default where it is missing, or will be refused by section ``run``."""
    run = values.get("run") if isinstance(values, dict) else None
    name = run.get("algorithm") if isinstance(run, dict) else getattr(run, "algorithm", None)
    try:
        if isinstance(name, str):
            configured(name)
            return name
    except ValueError:
        pass
    return ALGORITHMS.default


def _details(error: ValidationError, *before: str) -> list[InitErrorDetails]:
    """The mistakes of an error, to be raised with others; ``before`` is put before each location."""
    return [
        InitErrorDetails(type=e["type"], loc=(*before, *e["loc"]), input=e["input"], ctx=e.get("ctx", {}))
        for e in error.errors()
    ]


def _suggest(path: tuple, sections: dict[str, type[Section]]) -> str:
    """'did you mean' for an unknown key at ``path``, from the schema. It also tells where a key has moved."""
    before, key = path[:-1], str(path[-1])
    here = _keys(before, sections) if before else list(sections)
    prefix = ".".join(map(str, before))
    known = {name: f"{prefix}.{name}" if before else name for name in here}
    if before:
        own = {*ALGORITHMS.names(), "custom"}
        if prefix in own:  # perhaps it is a key that algorithms share, as lr in rl, or fake_lr, which is lr in fake
            for shared in [name for name in sections if name == "rl" or name not in {*Config.model_fields, *own}]:
                for name in sections[shared].model_fields:
                    known.setdefault(name, f"{shared}.{name}")
                    known.setdefault(f"{shared}_{name}", f"{shared}.{name}")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {known[close[0]]}?"
    homes = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
    return f"did you mean {' or '.join(homes)}?" if homes else f"known keys here: {', '.join(here)}"


def _keys(path: tuple, sections: dict[str, type[Section]]) -> list[str]:
    """The keys of the section at ``path``; [] where there is none."""
    section = sections.get(path[0])
    for part in path[1:]:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = model_of(section.model_fields[part].annotation)
    return list(section.model_fields) if section else []


def _explain(error: ValidationError, source: str, sections: dict[str, type[Section]]) -> ConfigError:
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {path!r}; {_suggest(item['loc'], sections)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], (dict, Section)) else f" = {_shown(item['input'])}"
            # A message of a registry begins with the key itself.
            lines.append(f"{path}{value}: {message}" if path and not message.startswith(path) else message)
    return ConfigError(f"{source}: " + "\n  ".join(lines))


def _shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python prints, or lists too deep in each other
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= 200 else f"{text[:197]}..."


def parse_override(text: str) -> tuple[list[str], Any]:
    """'rl.lr=1e-4' -> (['rl', 'lr'], 0.0001). The value is YAML; 1e-4 is a number here."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {_shown(text)} is not of the form key=value, for example rl.lr=1e-5")
    try:
        parsed = read_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {_shown(text)}: the value is not YAML ({error})") from None
    if isinstance(parsed, str):
        try:
            number = float(parsed)  # YAML 1.1 reads 1e-4 as a string.
            parsed = number if math.isfinite(number) else parsed
        except ValueError:
            pass
    return key.strip().split("."), parsed


def apply_override(values: dict, text: str) -> None:
    """Sets one ``key.of.sections=value`` in a plain dict. Raises ConfigError."""
    path, value = parse_override(text)
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {_shown(text)}: {part!r} is a value, not a section")
    values[path[-1]] = value


def build_config(values: dict, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """A Config from a plain dict and ``key=value`` overrides. Raises ConfigError."""
    values = copy.deepcopy(values)
    for override in overrides:
        apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source, schema(_algorithm_of(values))) from None


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config. Raises ConfigError for a missing or unreadable file and for any bad value."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"config {str(path)!r} does not exist; the ones that come along: "
            f"{', '.join(p.name for p in sorted(config_folder().glob('*.yaml')))}"
        )
    try:
        values = read_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:  # a UnicodeDecodeError is one
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (run:, data:, ...), got a {type(values).__name__}")
    return build_config(values, overrides, str(path))


def config_folder() -> Path:
    """The folder of the shipped configs: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def dump_config(config: Config, path: str | os.PathLike) -> None:
    """Writes the config as resolved, every key."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
