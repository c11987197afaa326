"""The stage ``prepare`` as Ray tasks, and the models that the later stages start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ray

from rlproxi.algorithms.preparation import train_scorer, train_text_encoder
from rlproxi.config.loading import Config
from rlproxi.errors import ConfigError
from rlproxi.files import folder_draft
from rlproxi.models.folders import ModelFolder, is_builtin
from rlproxi.rewards import facts
from rlproxi.run_directory import RunDirectory
from rlproxi.seeds import Collection


@ray.remote(num_cpus=1)
def _train(config: Config, name: str, steps: int, path: str, log: Any) -> str | None:
    """Trains the text encoder or a scorer's network, and saves it at ``path``; returns how good a scorer is."""
    import torch

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            log.append.remote("metrics", {"stage": f"prepare/{name}", "step": step, "loss": loss})

    torch.set_num_threads(1)
    if name != "text":
        return train_scorer(config, name, Path(path), progress)
    train_text_encoder(config, progress).save_pretrained(path)
    return None


def needs(config: Config) -> dict[str, int]:
    """Which parts the stage trains -> steps: the text encoder and scorers that the config lacks."""
    used = {facts(r.kind).prepared_as for r in config.rewards.all}
    names = [member.name.lower() for member in Collection]
    scorers = {name: config.prepare.classifier_steps for name in names if name in used}
    own_text = not (config.model.init or config.model.encoders)
    return {**({"text": config.prepare.text_steps} if own_text else {}), **scorers}


def prepare(config: Config, run_dir: Path, log: Any) -> dict[str, str]:
    """Trains what ``needs`` names, side by side; returns in words how good each scorer is. Blocks.

    Writes models/text, and models/<name>.safetensors for reward, judge, preference and quality.
    """
    files = RunDirectory(run_dir)
    tasks = {}
    for name, steps in needs(config).items():
        path = files.text if name == "text" else files.scorer(name)
        tasks[name] = _train.remote(config, name, steps, str(path), log)
    words = {name: ray.get(task) for name, task in tasks.items()}
    return {name: said for name, said in words.items() if said is not None}


@ray.remote(num_cpus=1)
def _start_model(config: Config, folder: str, text_folder: str, cache: str | None) -> None:
    import torch

    from rlproxi.algorithms.pretrain import first_samples, start_denoiser
    from rlproxi.models.loading import load_autoencoder, load_encoder
    from rlproxi.models.pipeline import TextToImage

    torch.set_num_threads(1)
    parts = Path(text_folder)
    vae = load_autoencoder(parts)
    denoiser = start_denoiser(config, first_samples(config, vae, cache))
    model = TextToImage(denoiser, load_encoder(parts), config.schedule, config.sampler, vae=vae, origin=parts)
    model.save_pretrained(folder)


def pretrain_start(config: Config, run_dir: Path, cache: str | None) -> Path:
    """The model folder that pre-training starts from: ``model.init``, else models/start, a new network made once.

    ``cache``: the folder of the encoded shards, None for the embedded portraits. Blocks while it makes the network.
    """
    if config.model.init:
        return _without_adapters(config.model.init, config, run_dir)
    folder = RunDirectory(run_dir).start
    if not folder.is_dir():
        text = config.model.encoders or str(RunDirectory(run_dir).text)
        ray.get(_start_model.remote(config, str(folder), text, cache))
    return folder


def rl_start(config: Config, run_dir: Path) -> Path:
    """The model folder that RL starts from: this run's pre-training, else ``model.init``.

    Raises ConfigError where there is neither.
    """
    own = RunDirectory(run_dir).pretrained
    start = own if own.is_dir() else config.model.init
    if start:
        return _without_adapters(start, config, run_dir)
    raise ConfigError(
        f"no starting policy: {own} does not exist and model.init is not set; add 'pretrain' to run.stages or set it"
    )


def _without_adapters(path: Path | str, config: Config, run_dir: Path) -> Path:
    """The model folder at ``path``; where it has adapters and new ones are to be trained, a merged copy as their base.

    Raises ConfigError where there is none.
    """
    try:
        folder = ModelFolder.find(path)
    except FileNotFoundError as error:
        raise ConfigError(f"no starting model: {error}") from None
    if is_builtin(path):  # into the run directory, which other nodes see under the same path
        own = RunDirectory(run_dir).start
        if not own.is_dir():
            with folder_draft(own) as fresh:
                shutil.copytree(folder.path, fresh)
        folder = ModelFolder.at(own)
    if config.model.lora is None or not folder.has_adapters:
        return folder.path
    merged = RunDirectory(run_dir).merged(folder.path.name)
    if not merged.is_dir():
        from rlproxi.models.pipeline import TextToImage

        TextToImage.from_pretrained(folder.path).merged().save_pretrained(merged)
    return merged
