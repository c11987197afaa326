"""The stage ``prepare`` as Ray tasks: text encoder, reward classifier and judge, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from rlproxi.algorithms.preparation import train_classifier, train_text_encoder
from rlproxi.config.loading import Config
from rlproxi.rewards import facts
from rlproxi.run_directory import RunDirectory
from rlproxi.seeds import Collection


def _report(scribe: Any, name: str, total: int):
    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == total:
            scribe.append.remote("metrics", {"stage": f"prepare/{name}", "step": step, "loss": loss})

    return progress


@ray.remote(num_cpus=1)
def _text(config: Config, folder: str, scribe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    train_text_encoder(config, _report(scribe, "text", config.prepare.text_steps)).save_pretrained(folder)


@ray.remote(num_cpus=1)
def _classifier(config: Config, purpose: str, file: str, scribe: Any) -> float:
    import torch

    torch.set_num_threads(1)
    return train_classifier(config, purpose, Path(file), _report(scribe, purpose, config.prepare.classifier_steps))


def needs(config: Config) -> list[str]:
    """What the stage makes for this config, of text, reward and judge: what its network and its scorers lack."""
    used = {facts(r.kind).prepared_as for r in config.rewards.all}
    wanted = [member.name.lower() for member in Collection if member.name.lower() in used]
    return wanted if config.model.init or config.model.encoders else ["text", *wanted]


def prepare(config: Config, run_dir: Path, scribe: Any) -> dict[str, float]:
    """Makes what ``needs`` names: models/text, models/reward.safetensors, models/judge.safetensors; returns the
    classifiers' accuracies. Blocks."""
    files = RunDirectory(run_dir)
    wanted = needs(config)
    text = [_text.remote(config, str(files.text), scribe)] if "text" in wanted else []
    classifiers = {
        purpose: _classifier.remote(config, purpose, str(files.scorer(purpose)), scribe)
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


def start_model(config: Config, run_dir: Path, cache: str | None) -> Path:
    """Makes models/start, a new network with its autoencoder and text encoders as a model folder. Blocks."""
    folder = RunDirectory(run_dir).start
    text = config.model.encoders or str(RunDirectory(run_dir).text)
    ray.get(_start_model.remote(config, str(folder), text, cache))
    return folder
