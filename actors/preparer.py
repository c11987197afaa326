"""The stage ``prepare`` as Ray tasks: text encoder, reward classifier and judge, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from rlproxi.algorithms.prepare import train_classifier, train_text_encoder
from rlproxi.config import Config


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
    return train_classifier(config, purpose, Path(file),
                            _report(scribe, purpose, config.prepare.classifier_steps))


def prepare(config: Config, run_dir: Path, scribe: Any) -> dict[str, float]:
    """Makes models/text, models/reward.safetensors and models/judge.safetensors; returns the classifiers' accuracies. Blocks."""
    models = run_dir / "models"
    text = _text.remote(config, str(models / "text"), scribe)
    classifiers = {purpose: _classifier.remote(config, purpose, str(models / f"{purpose}.safetensors"), scribe)
                   for purpose in ("reward", "judge")}
    ray.get(text)
    return {purpose: ray.get(ref) for purpose, ref in classifiers.items()}
