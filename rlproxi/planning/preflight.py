"""Checks before a run starts, beyond the config itself: files, folders, scorers and their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..algorithms.base import Algorithm, algorithm_class, build_algorithm
from ..config.loading import Config
from ..config.sections import Reward
from ..data.addresses import list_shards
from ..data.cache import prompts_path
from ..data.curation import job
from ..data.prompts import heldout_prompts, training_prompts
from ..models.folders import ModelFolder, latent_space
from ..models.loading import build_denoiser
from ..rewards import checked_params, facts, is_differentiable, names, parameters
from ..rewards.registry import find
from ..run_directory import INSIDE, RunDirectory
from ..telemetry.exporters import check_packages


def cache_folder(config: Config, run_dir: Path) -> Path | None:
    """Where the encoded shards lie; None for the embedded portraits."""
    return None if config.data.source == "faces" else Path(config.data.cache or RunDirectory(run_dir).cache)


def with_paths(config: Config, run_dir: Path) -> Config:
    """The config with the files that the run makes for itself, where it names no others.

    The embedded scorers read what the stage prepare trained. The prompts are the captions that the stage encode found.
    """

    def resolve(reward: Reward) -> Reward:
        made = facts(reward.kind).prepared_as
        if made is None or "path" in reward.params:
            return reward
        path = str(RunDirectory(run_dir).scorer(made))
        return reward.model_copy(update={"params": {"path": path, **reward.params}})

    resolved = {key: [resolve(r) for r in getattr(config.rewards, key)] for key in ("train", "heldout")}
    rewards = config.rewards.model_copy(update=resolved)
    cache, data = cache_folder(config, run_dir), config.data
    if cache is not None and data.prompts is None:
        data = data.model_copy(update={"prompts": str(prompts_path(config, cache))})
    return config.model_copy(update={"rewards": rewards, "data": data})


@dataclass(frozen=True)
class Problem:
    """A sentence that begins with its key. ``missing``: a file or folder may still come; a plan needs none."""

    text: str
    missing: bool


def problems(config: Config) -> list[Problem]:
    """Everything that would stop the run later; [] when it can start."""
    found = [*_rewards(with_paths(config, Path(config.run.dir)))]
    found += _check("telemetry", lambda: check_packages(config.telemetry))
    algorithm: Algorithm | None = None
    if "rl" in config.run.stages:
        algorithm, wrong = _algorithm(config)
        found += wrong
    if set(config.run.stages) - {"curate", "report"}:
        model = [*_model(config)]
        found += [*model, *_data(config)]
        if algorithm is not None and not model:  # what a micro-batch weighs follows from the model
            found += _check("rl", lambda: _bytes_in_flight(algorithm))
    if "curate" in config.run.stages:
        c = config.curate
        found += _check("curate", lambda: job.check(c, c.out or INSIDE.curated), missing=not c.urls)
    return found


def _check(key: str, check: Callable[[], object], missing: bool = False) -> list[Problem]:
    """[] where ``check`` passes, else its error as a problem of ``key``."""
    try:
        check()
        return []
    except (ValueError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        text = text if text.startswith(key) else f"{key}: {text}"
        return [Problem(text, missing or isinstance(error, FileNotFoundError))]


def _rewards(config: Config) -> Iterator[Problem]:
    """A scorer that does not exist, parameters that it does not take, and files and functions that are not there."""
    for section, rewards in (("train", config.rewards.train), ("heldout", config.rewards.heldout)):
        for i, reward in enumerate(rewards):
            yield from _check(f"rewards.{section}.{i}", partial(_reward, reward))


def _reward(reward: Reward) -> None:
    if reward.runtime_env and ":" in reward.kind:
        return  # the class is a module's of another environment
    params = checked_params(reward.kind, reward.params)
    if reward.tune_micro_batch and "micro_batch" not in parameters(reward.kind):
        raise ValueError(f"reward {reward.name!r} scores without micro-batches; leave tune_micro_batch out")
    if reward.runtime_env:
        return  # its packages and files are those of another environment
    try:
        facts(reward.kind).check(params)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"reward {reward.name!r}: {error}") from None


def _algorithm(config: Config) -> tuple[Algorithm | None, list[Problem]]:
    """The algorithm, if it can be made, and its problems: rewards without the gradients it needs, bounds of no use."""
    problems = _check("run.algorithm", lambda: algorithm_class(config.run.algorithm))
    if problems:
        return None, problems
    try:
        algorithm = build_algorithm(config)
    except Exception as error:  # whatever the user's class raises
        words = f"run.algorithm {config.run.algorithm!r} cannot be set up: {type(error).__name__}: {error}"
        return None, [Problem(words, False)]
    problems = _check("rl", lambda: _staleness(algorithm))
    if not algorithm.needs_gradients:
        return algorithm, problems
    known = ", ".join(filter(is_differentiable, names()))
    remedy = (
        f"needs one from every training reward: use one of {known}, or a scorer of your own that is a TorchScorer "
        "(docs/rewards/)"
    )
    for i, reward in enumerate(config.rewards.train):
        if find(reward.kind) and not is_differentiable(reward.kind):
            fault = f"rewards.train.{i}: reward {reward.name!r} has no gradient, and {algorithm.why_gradients()}"
            problems.append(Problem(f"{fault} {remedy}", False))
    return algorithm, problems


def _staleness(algorithm: Algorithm) -> None:
    """Raise ValueError for a bound that has no effect."""
    rl = algorithm.rl
    if rl.max_staleness and not algorithm.needs_rollouts:
        raise ValueError(
            f"rl.max_staleness is {rl.max_staleness}, but {algorithm.config.run.algorithm} samples on the learner, "
            "with the weights it has, so nothing can be stale: set it to 0"
        )
    if rl.max_staleness >= max(1, rl.steps):
        raise ValueError(
            f"rl.max_staleness is {rl.max_staleness}, but of rl.steps {rl.steps} iterations none can be "
            f"more than {rl.steps - 1} versions behind: set it to at most that"
        )


def _bytes_in_flight(algorithm: Algorithm) -> None:
    """Raise ValueError for a bound on bytes that one iteration passes, or that keeps staleness below its own bound."""
    rl = algorithm.rl
    whole, limit = rl.micro_batches * algorithm.bytes_per_micro_batch(), rl.max_bytes_in_flight
    if whole > limit:
        raise ValueError(
            f"rl.max_bytes_in_flight is {limit}, but one iteration has {whole} bytes of images and chains, "
            f"and is trained on whole: set it to at least {whole}, or lower rl.prompts_per_step, rl.group_size or the "
            "number of trained steps"
        )
    if (rl.max_staleness + 1) * whole > limit:
        raise ValueError(
            f"rl.max_staleness is {rl.max_staleness}, for which {rl.max_staleness + 1} iterations of {whole} "
            f"bytes are in flight, and rl.max_bytes_in_flight {limit} holds {limit // whole}: set it to at "
            f"least {(rl.max_staleness + 1) * whole}, or rl.max_staleness to {limit // whole - 1}"
        )


def _model(config: Config) -> Iterator[Problem]:
    """Folders that are missing or of a kind that is not known, and sizes that do not fit."""
    m = config.model
    if not m.init and "pretrain" not in config.run.stages and {"before", "rl", "after"} & set(config.run.stages):
        yield Problem(
            "model.init is not set and 'pretrain' is not among run.stages, so there is no starting policy: name a "
            "model folder, a run directory or a diffusers folder with model.init, or add the stage",
            False,
        )
    if init := m.init:
        found = _check("model.init", lambda: ModelFolder.find(init).check())
    elif encoders := m.encoders:
        found = _check("model.encoders", lambda: ModelFolder.at(encoders).check(network=False))
    else:
        found = []
    yield from found or _check("model", lambda: latent_space(config))
    if config.data.buckets and (m.init is None or (not found and ModelFolder.find(m.init).is_ours)):
        yield Problem(
            "data.buckets is true, but networks of our own have one size: set it false, or start from a "
            "diffusers folder with model.init",
            False,
        )
    if not found and not m.init:
        yield from _check("model", lambda: _fits(config))


def _fits(config: Config) -> None:
    import torch

    with torch.device("meta"):
        build_denoiser(config)


def _data(config: Config) -> Iterator[Problem]:
    d = config.data
    if d.source == "shards" and set(config.run.stages) & {"encode", "pretrain"}:
        yield from _check("data.urls", lambda: list_shards(d.urls), missing=True)
    known = d.prompts is not None or d.source == "faces"  # else the captions of the data, after they are encoded
    found: list[Problem] = []
    if known and set(config.run.stages) & {"before", "rl", "after"}:
        found = _check("data.heldout_prompts" if d.heldout_prompts else "data.prompts", lambda: heldout_prompts(config))
        if not found:
            prompts = heldout_prompts(config)[1]
            for section, rewards in (("heldout", config.rewards.heldout), ("train", config.rewards.train)):
                for i, reward in enumerate(rewards):
                    found += _check(f"rewards.{section}.{i}", partial(_scores_some, reward, section, prompts))
    if known and "rl" in config.run.stages and not found:
        found = _check("data.prompts", lambda: training_prompts(config, 0))
    yield from found


def _scores_some(reward: Reward, section: str, prompts: Sequence[str]) -> None:
    """Raise ValueError for a scorer that can score none of the prompts."""
    refused: ValueError | None = None
    for prompt in prompts:
        try:
            facts(reward.kind).check_prompt(prompt)
            return
        except ValueError as error:
            refused = refused or error
    if refused is not None:
        remedy = "name another scorer (docs/rewards/README.md)"
        if section == "heldout":
            remedy += ", or set rewards.heldout=[]: the alarms for distance, sameness and grid need no held-out score"
        raise ValueError(f"reward {reward.name!r} can score none of the held-out prompts: {refused}; {remedy}")
