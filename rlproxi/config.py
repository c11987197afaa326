"""The one typed schema. Every key is documented where it is declared; unknown keys are refused.

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
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .proximal.samplers import SAMPLERS, plan
from .proximal.schedule import GRIDS, VPSchedule
from .rewards.combine import NORMALIZE

STAGES = ("prepare", "pretrain", "before", "rl", "after", "report")
Stage = Literal[STAGES]


class ConfigError(ValueError):
    """A config that cannot be run: the message names the key, the value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Run(Section):
    name: str = Field("quickstart", description="Run directories are <dir>/<name>-<date>-<time>.")
    dir: str = Field("runs", description="Where run directories are made; on a cluster, storage all nodes share.")
    seed: int = Field(0, ge=0, description="Every random number of the run follows from this one.")
    stages: list[Stage] = Field(list(STAGES), description="Which stages run, always in their fixed order.")


class Data(Section):
    source: Literal["faces"] = Field("faces", description="The embedded portraits, drawn anew from a seed.")
    size: int = Field(32, ge=16, description="Image height and width in pixels.")
    hand_fraction: float = Field(0.25, ge=0, le=1, description="Share of the hand-focused subset.")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="Captions replaced by '' in pre-training, for guidance.")


class Model(Section):
    init: str | None = Field(None, description="A model folder (or run directory) to start from instead of a new network.")
    patch: int = Field(4, ge=1, description="Pixel-unshuffle factor of the stem.")
    channels: list[int] = Field([128, 256], description="Width of each level; multiples of 32 are fast.")
    blocks: list[int] = Field([1, 0], description="Residual blocks at each level, down and again up.")
    attention: list[bool] = Field([True, False], description="Text and self-attention at each level.")
    data_std: float = Field(0.55, gt=0, description="Standard deviation of the data where no Gaussian is fitted to it.")
    text_dim: int = Field(64, ge=32, description="Width of the built-in text encoder.")
    text_layers: int = Field(2, ge=1, description="Layers of the built-in text encoder.")
    text_length: int = Field(40, ge=8, description="Tokens of a caption; longer ones are cut.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="The network's arithmetic (float32 masters always). auto: bfloat16 where the chip has it.")

    @model_validator(mode="after")
    def _levels(self) -> "Model":
        if not len(self.channels) == len(self.blocks) == len(self.attention):
            raise ValueError(f"channels {self.channels}, blocks {self.blocks} and attention {self.attention} "
                             "must have one entry for each level")
        bad = [c for c in self.channels if c % 32]
        if bad:
            raise ValueError(f"channels {bad} are not multiples of 32, which attention heads and fast kernels need")
        return self


class Schedule(Section):
    beta_min: float = Field(0.1, gt=0, description="beta(0) of the VP schedule.")
    beta_max: float = Field(20.0, gt=0, description="beta(1) of the VP schedule.")

    def build(self) -> VPSchedule:
        return VPSchedule(self.beta_min, self.beta_max)


class Sampler(Section):
    name: Literal[SAMPLERS] = Field("hybrid", description="Proximal sampler: hybrid, backward or ode.")
    num_inference_steps: int = Field(6, ge=1, description="N, the number of proximal steps.")
    start_time: float = Field(0.8, gt=0, le=1, description="T: sampling starts from N(0, I) at this time.")
    grid: Literal[GRIDS] = Field("uniform", description="Spacing of the times.")
    guidance_scale: float = Field(1.0, ge=0, description="Proximal classifier-free guidance; 1 is none.")


class Reward(Section):
    name: str = Field(description="What logs call it: a registered scorer (docs/rewards/), or any word with `scorer` beside it.")
    scorer: str | None = Field(None, description="The registered scorer; null: `name` is one.")
    weight: float = Field(1.0, allow_inf_nan=False, description="Its weight in the sum; ignored for held-out rewards.")
    params: dict[str, Any] = Field({}, description="What the scorer's constructor takes (docs/rewards/).")
    replicas: int | None = Field(None, ge=1, description="Serve replicas of this scorer; null: rewards.replicas.")
    max_replicas: int | None = Field(None, ge=1, description="Serve adds replicas up to this many under load; null: none.")
    num_cpus: float | None = Field(None, ge=0, description="CPUs of a replica; null: rewards.num_cpus.")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of a replica; null: rewards.num_gpus.")
    runtime_env: dict[str, Any] = Field(
        {}, description="Ray runtime environment of the replicas, for a scorer whose packages conflict.")
    tune_micro_batch: bool = Field(
        False, description="Measure on the first group which params.micro_batch is fastest; scores may then differ in "
        "rounding from run to run.")

    @property
    def kind(self) -> str:
        """The registered scorer's name."""
        return self.scorer or self.name


class Rewards(Section):
    train: list[Reward] = Field([Reward(name="attributes")], min_length=1, description="What is optimised.")
    heldout: list[Reward] = Field([Reward(name="judge")], description="Logged and never optimised.")
    replicas: int = Field(1, ge=1, description="Serve replicas of each scorer.")
    num_cpus: float = Field(0.25, ge=0, description="CPUs of a replica.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of a replica; may be a fraction.")
    timeout_s: float = Field(120.0, gt=0, description="How long one group may take to score.")
    retries: int = Field(2, ge=0, description="How often a failed request is tried again.")
    normalize: Literal[NORMALIZE] = Field(
        "none", description="group: each reward divided by its spread in the group before weighting, so that none drowns "
        "the others.")
    on_failure: Literal["drop_group", "mask_sample", "stop"] = Field(
        "drop_group", description="Where a score is missing: the group teaches nothing (drop_group), only that sample "
        "does not (mask_sample), or the run ends (stop).")
    max_masked_fraction: float = Field(
        0.5, ge=0, le=1, description="The run stops when more than this share of a step's groups is masked.")


class Prepare(Section):
    """Builds what a user of published checkpoints brings along: text encoder, classifier, judge."""

    text_steps: int = Field(200, ge=1, description="Training steps of the built-in text encoder.")
    classifier_steps: int = Field(300, ge=1, description="Training steps of each attribute classifier.")
    samples: int = Field(8192, ge=64, description="Portraits drawn for each classifier.")
    batch_size: int = Field(128, ge=1, description="Batch size of these trainings.")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate of these trainings.")


class Pretrain(Section):
    steps: int = Field(1500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(64, ge=1, description="Global batch, over all learner ranks and micro-batches.")
    micro_batch_size: int | None = Field(None, ge=1, description="Per rank and forward; None: the rank's whole share.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate; warm-up, constant, then cosine to 3 %.")
    warmup_steps: int = Field(50, ge=0, description="Linear warm-up.")
    decay_from: float = Field(0.3, ge=0, le=1, description="Share of the steps after which the cosine begins.")
    candidates: list[int] = Field([4, 6, 8, 16], min_length=1, description="Step counts N that matching draws from.")
    l1_fraction: float = Field(1.0, ge=0, le=1, description="Share of the steps in the L1 phase.")
    zetas: list[float] = Field([2.0, 1.0], description="zeta of the equally long phases after it.")
    lam_power: float = Field(
        0.5, ge=0, description="Loss weight lam^p, scaled to mean 1. 0: ProxDM's; 0.5: the error of the prox itself, "
        "which learns captions sooner, since large lam is where they decide.")
    ema: float = Field(0.995, ge=0, lt=1, description="Decay of the averaged weights that are handed on.")
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm.")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(10, ge=1, description="Steps between metric records.")


class GRPO(Section):
    steps: int = Field(100, ge=1, description="Policy iterations: sample, score, update.")
    prompts_per_step: int = Field(16, ge=1, description="Groups in one iteration.")
    group_size: int = Field(8, description="G, samples of one prompt.")
    groups_per_micro_batch: int = Field(8, ge=1, description="Groups sampled, and replayed, in one forward.")
    updates_per_step: int = Field(1, ge=1, description="Optimizer steps on each iteration's groups.")
    trained_steps: int | None = Field(3, ge=1, description="Window of actions trained, drawn per iteration; None: all.")
    lr: float = Field(2e-5, gt=0, description="Learning rate after warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Linear warm-up, in iterations.")
    decay_from: float = Field(1.0, ge=0, le=1, description="Share of the iterations after which the rate falls to 5 %, "
                              "linearly: the noise of the last updates is averaged away.")
    betas: tuple[float, float] = Field((0.9, 0.99), description="AdamW's betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm.")
    clip_range: float = Field(1e-3, gt=0, description="eps_lo of the ratio's clip.")
    clip_range_high: float | None = Field(None, gt=0, description="eps_hi; None: the same as clip_range.")
    kl_coef: float = Field(0.03, ge=0, description="beta, weight of KL(pi || pi_ref). 0 keeps no reference copy.")
    reduction: Literal["mean", "sum"] = Field("mean", description="Over dimensions, for log-ratio and KL.")
    normalize_ratio: bool = Field(False, description="Log-ratio without its quadratic bias, in units equal for all steps (GRPO-Guard's idea).")
    advantage_std: Literal["group", "global"] = Field("group", description="Which std divides the advantages.")
    same_noise: bool = Field(False, description="One z_N (x_N and the first noise) for all samples of a group.")
    max_staleness: int = Field(0, ge=0, description="Weight versions a group may be behind; 0 is synchronous.")
    max_bytes_in_flight: int = Field(2 * 1024**3, ge=1, description="Bound on sampled but untrained data, in bytes.")
    checkpoint_every: int = Field(20, ge=1, description="Iterations between checkpoints.")
    first_ratio_tolerance: float = Field(1e-6, gt=0, description="How far the first ratio may be from 1.")

    @model_validator(mode="after")
    def _groups(self) -> "GRPO":
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: advantages compare samples of one group, "
                             "so it must be at least 2 (8 to 24 is usual)")
        if self.prompts_per_step % self.groups_per_micro_batch:
            raise ValueError(f"prompts_per_step {self.prompts_per_step} is not a multiple of groups_per_micro_batch "
                             f"{self.groups_per_micro_batch}: make it one, so that micro-batches hold whole groups")
        return self

    @property
    def micro_batches(self) -> int:
        """Micro-batches of whole groups in one iteration, over all ranks."""
        return self.prompts_per_step // self.groups_per_micro_batch


class Learner(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    max_failures: int = Field(2, ge=0, description="Restarts of the worker group before the run gives up.")


class Resources(Section):
    rollout_actors: int = Field(1, ge=1, description="Rollout actors.")
    rollout_cpus: float = Field(0.5, ge=0, description="CPUs that Ray counts for each.")
    rollout_gpus: float = Field(0.0, ge=0, description="GPUs of each; may be a fraction.")
    learner_workers: int = Field(1, ge=1, description="Ranks of the learner and of pre-training.")
    learner_cpus: float = Field(0.5, ge=0, description="CPUs that Ray counts for each.")
    learner_gpus: float = Field(0.0, ge=0, description="GPUs of each; may be a fraction.")
    autoscaling: bool = Field(False, description="The cluster can grow: do not refuse a run that is larger than it is now.")
    threads: int = Field(2, ge=1, description="torch threads of rollout actors and learner ranks; results depend on it.")


class Evaluate(Section):
    prompts: int = Field(64, ge=1, le=512, description="Held-out prompts, the same in every evaluation.")
    samples: int = Field(4, ge=2, description="Samples of each prompt.")
    steps: list[int] = Field([2, 4, 6, 8, 16], description="Step counts of the reward-against-steps curve.")
    every: int = Field(25, ge=0, description="RL iterations between held-out evaluations; 0: only before and after.")
    alarm_sigmas: float = Field(
        2.0, gt=0, description="Over-optimisation alarm: the first held-out reward is so many standard errors below its best.")
    patience: int | None = Field(
        None, ge=1, description="RL ends after so many evaluations in a row that far below the best; null: never.")


class Config(Section):
    """The whole run."""

    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    schedule: Schedule = Schedule()
    sampler: Sampler = Sampler()
    rewards: Rewards = Rewards()
    prepare: Prepare = Prepare()
    pretrain: Pretrain = Pretrain()
    grpo: GRPO = GRPO()
    learner: Learner = Learner()
    resources: Resources = Resources()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _across(self) -> "Config":
        schedule, s = self.schedule.build(), self.sampler
        if "rl" in self.run.stages:
            if s.name == "ode":
                raise ValueError("sampler.name is 'ode', which draws no noise and so has no policy to train; "
                                 "use hybrid or backward, or leave 'rl' out of run.stages")
            if s.num_inference_steps < 2:
                raise ValueError("sampler.num_inference_steps is 1: N steps give N - 1 actions, so RL needs at least 2")
        plan(schedule, s.name, s.num_inference_steps, s.start_time, s.grid)
        for key, counts in (("pretrain.candidates", self.pretrain.candidates), ("evaluate.steps", self.evaluate.steps)):
            for n in counts:
                try:
                    plan(schedule, s.name, n, s.start_time, s.grid)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
        g, workers = self.grpo, self.resources.learner_workers
        if g.micro_batches % (workers * g.updates_per_step):
            raise ValueError(
                f"grpo: {g.micro_batches} micro-batches (prompts_per_step {g.prompts_per_step} / "
                f"groups_per_micro_batch {g.groups_per_micro_batch}) cannot be shared by resources.learner_workers "
                f"{workers} x grpo.updates_per_step {g.updates_per_step}: make prompts_per_step a multiple of "
                f"{g.groups_per_micro_batch * workers * g.updates_per_step}")
        if g.trained_steps and g.trained_steps > s.num_inference_steps - 1 and "rl" in self.run.stages:
            raise ValueError(f"grpo.trained_steps is {g.trained_steps}, but num_inference_steps "
                             f"{s.num_inference_steps} gives only {s.num_inference_steps - 1} actions; lower it or use null")
        share, left = divmod(self.pretrain.batch_size, workers)
        micro = self.pretrain.micro_batch_size or share
        if left or share % micro:
            raise ValueError(f"pretrain.batch_size {self.pretrain.batch_size} is not a multiple of learner_workers "
                             f"{workers} x micro_batch_size {micro}: change one of them")
        levels = 2 ** (len(self.model.channels) - 1) * self.model.patch
        if self.data.size % levels or self.data.size % 8:
            raise ValueError(f"data.size {self.data.size} must be a multiple of {max(levels, 8)} "
                             "(model.patch x 2^(levels - 1), and 8 for the classifier)")
        self._check_rewards()
        return self

    def _check_rewards(self) -> None:
        train, heldout = self.rewards.train, self.rewards.heldout
        both = [r.name for r in heldout if any((r.kind, r.params) == (t.kind, t.params) for t in train)]
        if both:
            raise ValueError(f"rewards.heldout {both} are also optimised; a held-out judge must not be a training reward")
        names = [r.name for r in [*train, *heldout]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rewards: {', '.join(twice)} appears twice; give each a name of its own and set scorer: "
                             f"{twice[0]}")
        for r in [*train, *heldout]:
            low = r.replicas or self.rewards.replicas
            if r.max_replicas is not None and r.max_replicas < low:
                raise ValueError(f"rewards: {r.name} has max_replicas {r.max_replicas} below its {low} replicas; raise it")


def _model_of(annotation) -> type[Section] | None:
    """The Section inside an annotation (also inside list[...]), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_of(argument)
        if found:
            return found
    return None


def _suggest(path: tuple) -> str:
    """'did you mean' for an unknown key at ``path``, from the schema."""
    section: type[Section] | None = Config
    for part in path[:-1]:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = _model_of(section.model_fields[part].annotation)
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*(str(p) for p in path[:-1]), close[0]])}?"
    # Perhaps the key exists in another section.
    homes = [f"{name}.{path[-1]}" for name, field in Config.model_fields.items()
             if path[-1] in field.annotation.model_fields]
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
            value = "" if isinstance(item["input"], (dict, Section)) else f" = {item['input']!r}"
            lines.append(f"{path}{value}: {message}" if path else message)
    return ConfigError(f"{source}: " + "\n  ".join(lines))


def parse_override(text: str) -> tuple[list[str], Any]:
    """'grpo.lr=1e-4' -> (['grpo', 'lr'], 0.0001). The value is YAML; 1e-4 is a number here."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not of the form key=value, for example grpo.lr=1e-5")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML ({error})") from None
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
            raise ConfigError(f"override {text!r}: {part!r} is a value, not a section")
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
        raise ConfigError(f"config {str(path)!r} does not exist; the ones that come along: "
                          f"{', '.join(p.name for p in sorted(config_folder().glob('*.yaml')))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (run:, data:, ...), got a {type(values).__name__}")
    return build_config(values, overrides, str(path))


def config_folder() -> Path:
    """Where the shipped configs lie: inside the installed package, or at the root of a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def dump_config(config: Config, path: str | os.PathLike) -> None:
    """Writes the config as resolved, every key."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
