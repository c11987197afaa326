"""The one typed config, made of the sections of ``schema``; unknown keys are refused.

``load_config`` reads a YAML file, applies ``key=value`` overrides, validates everything that
can be known before a cluster is asked for anything, and raises ``ConfigError`` with the key, the
value and the remedy.
"""

from __future__ import annotations

import difflib
import math
import os
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from ..errors import ConfigError
from ..files import write_text
from ..proximal.samplers import AFTER
from .algorithms import DIDR, GRPO, R0, Custom, Training
from .curation import Curate
from .guards import Guards
from .plain_yaml import read_yaml
from .sections import (
    ALGORITHMS,
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
    Section,
    Telemetry,
)


class Config(Section):
    """The whole run."""

    run: Run = Run()
    data: Data = Data()
    curate: Curate = Curate()
    model: Model = Model()
    schedule: Schedule = Schedule()
    sampler: Sampler = Sampler()
    rewards: Rewards = Rewards()
    prepare: Prepare = Prepare()
    pretrain: Pretrain = Pretrain()
    grpo: GRPO = GRPO()
    r0: R0 = R0()
    didr: DIDR = DIDR()
    custom: Custom = Custom()
    learner: Learner = Learner()
    guards: Guards = Guards()
    resources: Resources = Resources()
    evaluate: Evaluate = Evaluate()
    faults: Faults = Faults()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _across(self) -> Config:
        schedule, s = self.schedule.build(), self.sampler
        s.plan(schedule)
        candidates = [
            (f"{name}.{key}", getattr(getattr(self, name), key))
            for name, key in (("r0", "candidates"), ("didr", "candidates"))
        ]
        for key, counts in (
            ("pretrain.candidates", self.pretrain.candidates),
            ("evaluate.steps", self.evaluate.steps),
            *candidates,
        ):
            for n in counts or ():
                try:
                    s.plan(schedule, n)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
        if "rl" in self.run.stages:
            self._check_algorithm()
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
        """The name of the section that holds the settings of the stage rl."""
        return self.run.algorithm if self.run.algorithm in ALGORITHMS else "custom"

    @property
    def rl(self) -> Training:
        """The settings of the stage rl: the section of ``run.algorithm``."""
        return getattr(self, self.section)

    def with_rl(self, **values: Any) -> Config:
        """The same run with other settings of the stage rl."""
        return self.model_copy(update={self.section: self.rl.model_copy(update=values)})

    def _check_algorithm(self) -> None:
        s, g, steps = self.sampler, self.grpo, self.sampler.num_inference_steps
        if self.run.algorithm == "grpo":
            if s.name == "ode" or (s.name in AFTER and not s.eta):
                raise ValueError(
                    f"sampler.name is {s.name!r}, which draws no noise and so has no policy to train; use hybrid or "
                    "backward, or ddim, euler or matched with sampler.eta above 0, or leave 'rl' out of run.stages"
                )
            if steps < 2:
                raise ValueError(
                    "sampler.num_inference_steps is 1: N steps give N - 1 actions, so GRPO needs at least 2"
                )
            if g.trained_steps and g.trained_steps > steps - 1:
                raise ValueError(
                    f"grpo.trained_steps is {g.trained_steps}, but num_inference_steps {steps} gives only "
                    f"{steps - 1} actions; lower it or use null"
                )
        if self.run.algorithm == "didr" and steps != 1:
            raise ValueError(
                f"sampler.num_inference_steps is {steps}, and didr trains a generator of one step: set it to 1"
            )
        if (
            self.run.algorithm == "r0"
            and not self.r0.checkpoint_steps
            and not self.r0.plus
            and self.learner.zero_stage == 3
        ):
            raise ValueError(
                "learner.zero_stage 3 gathers weights for one forward and backward at a time, and "
                "r0.checkpoint_steps=false has several forwards in one graph: set it to true, or use stage 2"
            )
        if self.run.algorithm == "didr" and self.didr.divergence == "score" and self.learner.zero_stage == 3:
            raise ValueError(
                "didr.divergence 'score' differentiates through the fake score's input, which learner.zero_stage 3 "
                "cannot: use stage 2"
            )

        if (
            self.run.algorithm == "didr"
            and self.didr.divergence == "score"
            and self.model.lora
            and self.model.gradient_checkpointing
        ):
            raise ValueError(
                "model.gradient_checkpointing computes the reference again in the backward pass, where model.lora has its "
                "adapters on: with didr.divergence 'score' use one of the two"
            )

    def _share_prompts(self, workers: int) -> None:
        """Fills in ``groups_per_micro_batch`` of the stage rl and sees that ranks and updates get equal shares."""
        name, g = self.section, self.rl
        if g.groups_per_micro_batch is None:
            groups = groups_that_fit(g, workers, max(1, 32 // g.group_size)) or 1
            g = g.model_copy(update={"groups_per_micro_batch": groups})
            setattr(self, name, g)
        if g.prompts_per_step % g.groups_per_micro_batch:
            raise ValueError(
                f"{name}.prompts_per_step {g.prompts_per_step} is not a multiple of groups_per_micro_batch "
                f"{g.groups_per_micro_batch}: make it one, so that micro-batches hold whole groups"
            )
        if g.micro_batches % (workers * g.updates_per_step):
            raise ValueError(
                f"{name}: {g.micro_batches} micro-batches (prompts_per_step {g.prompts_per_step} / "
                f"groups_per_micro_batch {g.groups_per_micro_batch}) cannot be shared by resources.learner_workers "
                f"{workers} x {name}.updates_per_step {g.updates_per_step}: make prompts_per_step a multiple of "
                f"{g.groups_per_micro_batch * workers * g.updates_per_step}"
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


def groups_that_fit(settings: Training, workers: int, most: int) -> int | None:
    """The largest number of groups in a micro-batch, up to ``most``, that leaves every rank and update an equal share."""
    for groups in range(min(most, settings.prompts_per_step), 0, -1):
        count, left = divmod(settings.prompts_per_step, groups)
        if left == 0 and count % (workers * settings.updates_per_step) == 0:
            return groups
    return None


def smaller_micro_batch(config: Config, stage: str) -> Config | None:
    """The same run with about half the images in a forward of ``pretrain`` or ``rl``; None where it cannot be smaller.

    What is learnt stays the same, to rounding: only how many images a forward holds changes.
    """
    workers = config.resources.learner_workers
    if stage == "rl":
        groups = groups_that_fit(config.rl, workers, config.rl.groups_per_micro_batch // 2)
        return groups and config.with_rl(groups_per_micro_batch=groups)
    p = config.pretrain
    share = p.batch_size // workers
    now = p.micro_batch_size or share
    fitting = [size for size in range(1, now // 2 + 1) if share % size == 0]
    return (
        config.model_copy(update={"pretrain": p.model_copy(update={"micro_batch_size": fitting[-1]})})
        if fitting
        else None
    )


def model_of(annotation) -> type[Section] | None:
    """The Section inside an annotation (also inside list[...]), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        found = model_of(argument)
        if found:
            return found
    return None


def _suggest(path: tuple) -> str:
    """'did you mean' for an unknown key at ``path``, from the schema."""
    section: type[Section] | None = Config
    for part in path[:-1]:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = model_of(section.model_fields[part].annotation)
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*(str(p) for p in path[:-1]), close[0]])}?"
    # Perhaps the key exists in another section; what all algorithms have is told of the default one.
    homes = [
        f"{name}.{path[-1]}"
        for name, field in Config.model_fields.items()
        if path[-1] in field.annotation.model_fields
        and (name == "grpo" or not issubclass(field.annotation, Training) or path[-1] not in GRPO.model_fields)
    ]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    return f"known keys here: {', '.join(known)}"


def _explain(error: ValidationError, source: str) -> ConfigError:
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {path!r}; {_suggest(item['loc'])}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], (dict, Section)) else f" = {_shown(item['input'])}"
            lines.append(f"{path}{value}: {message}" if path else message)
    return ConfigError(f"{source}: " + "\n  ".join(lines))


def _shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python prints, or lists too deep in each other
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= 200 else f"{text[:197]}..."


def parse_override(text: str) -> tuple[list[str], Any]:
    """'grpo.lr=1e-4' -> (['grpo', 'lr'], 0.0001). The value is YAML; 1e-4 is a number here."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {_shown(text)} is not of the form key=value, for example grpo.lr=1e-5")
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


def build_config(values: dict, overrides: list[str] = (), source: str = "config") -> Config:
    """A Config from a plain dict and ``key=value`` overrides. Raises ConfigError."""
    import copy

    values = copy.deepcopy(values)
    for override in overrides:
        apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source) from None


def load_config(path: str | os.PathLike, overrides: list[str] = ()) -> Config:
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
    """Where the shipped configs lie: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def dump_config(config: Config, path: str | os.PathLike) -> None:
    """Writes the config as resolved, every key."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
