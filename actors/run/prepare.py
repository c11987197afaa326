"""The stage ``prepare`` as Ray tasks, and the models that the later stages start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from rlproxi.algorithms.preparation import train_classifier, train_text_encoder
from rlproxi.config.loading import Config
from rlproxi.errors import ConfigError
from rlproxi.models.folders import ModelFolder
from rlproxi.rewards import facts
from rlproxi.run_directory import RunDirectory
from rlproxi.seeds import Collection


def _report(log: Any, name: str, total: int) -> Callable[[int, float], None]:
    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == total:
            log.append.remote("metrics", {"stage": f"prepare/{name}", "step": step, "loss": loss})

    return progress


@ray.remote(num_cpus=1)
def _text(config: Config, folder: str, log: Any) -> None:
    import torch

    torch.set_num_threads(1)
    train_text_encoder(config, _report(log, "text", config.prepare.text_steps)).save_pretrained(folder)


@ray.remote(num_cpus=1)
def _classifier(config: Config, purpose: str, file: str, log: Any) -> float:
    import torch

    torch.set_num_threads(1)
    return train_classifier(config, purpose, Path(file), _report(log, purpose, config.prepare.classifier_steps))


def needs(config: Config) -> list[str]:
    """Which of text, reward and judge the stage trains: what the config's network and scorers lack."""
    used = {facts(r.kind).prepared_as for r in config.rewards.all}
    wanted = [member.name.lower() for member in Collection if member.name.lower() in used]
    return wanted if config.model.init or config.model.encoders else ["text", *wanted]


def prepare(config: Config, run_dir: Path, log: Any) -> dict[str, float]:
    """Trains what ``needs`` names, side by side; returns the accuracy of each classifier. Blocks.

    Writes models/text, models/reward.safetensors and models/judge.safetensors.
    """
    files = RunDirectory(run_dir)
    wanted = needs(config)
    text = [_text.remote(config, str(files.text), log)] if "text" in wanted else []
    classifiers = {
        purpose: _classifier.remote(config, purpose, str(files.scorer(purpose)), log)
        for purpose in wanted
        if purpose != "text"
    }
    ray.get(text)
    return {purpose: ray.get(ref) for purpose, ref in classifiers.items()}


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
    TextToImage(denoiser, load_encoder(parts), config.schedule, config.sampler, vae=vae, origin=parts).save_pretrained(
        folder
    )


def pretrain_start(config: Config, run_dir: Path, cache: str | None) -> Path:
    """The model folder that pre-training starts from: ``model.init``, else models/start, a new network made once.

    ``cache``: the folder of the encoded shards, None for the embedded portraits. Blocks while it makes the network.
    """
    if config.model.init:
        return _without_adapters(_model_folder(config.model.init), config, run_dir)
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
    if own.is_dir():
        return _without_adapters(own, config, run_dir)
    if config.model.init:
        return _without_adapters(_model_folder(config.model.init), config, run_dir)
    raise ConfigError(
        f"no starting policy: {own} does not exist and model.init is not set; add 'pretrain' to "
        "run.stages or name a model folder with model.init"
    )


def _without_adapters(folder: Path, config: Config, run_dir: Path) -> Path:
    """``folder``; where it holds adapters and new ones are to be trained, a merged copy that is their base."""
    if config.model.lora is None or not ModelFolder.at(folder).has_adapters:
        return folder
    merged = RunDirectory(run_dir).merged(folder.name)
    if not merged.is_dir():
        from rlproxi.models.pipeline import TextToImage

        TextToImage.from_pretrained(folder).merged().save_pretrained(merged)
    return merged


def _model_folder(path: str) -> Path:
    try:
        return ModelFolder.find(path).path
    except FileNotFoundError as error:
        raise ConfigError(f"model.init: {error}") from None
