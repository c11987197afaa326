"""The small CLIPs of clip_fixtures, written to disk in the formats in which the real ones are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import clip_fixtures as fixtures


def weights(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(fixtures.tensor(name, tuple(shape)))) for name, shape in shapes.items()}


def save_open_clip(file: Path, config: dict = fixtures.TINY) -> Path:
    """As HPSv2's authors save: {"state_dict": weights in open_clip's names}."""
    torch.save({"state_dict": weights(fixtures.open_clip_layout(config))}, file)
    return file


def save_tokenizer(folder: Path) -> Path:
    from transformers import CLIPTokenizer

    CLIPTokenizer(vocab=fixtures.transformers_vocabulary(), merges=fixtures.merges(),
                  model_max_length=77).save_pretrained(folder)
    return folder


def save_transformers(folder: Path) -> Path:
    """A folder as PickScore's and OpenAI's on the hub, with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**fixtures.TINY_TRANSFORMERS))
    model.load_state_dict(weights({name: value.shape for name, value in model.state_dict().items()}))
    model.save_pretrained(folder)
    return save_tokenizer(folder)


def save_aesthetic(folder: Path) -> tuple[Path, Path]:
    """(the predictor's file, the folder of a CLIP with 768 features)."""
    from rlproxi.rewards.open_clip import clip_model, open_clip_to_transformers

    weights_l = weights(fixtures.open_clip_layout(fixtures.TINY_L))
    clip_model(*open_clip_to_transformers(weights_l, fixtures.TINY_L), "tiny").save_pretrained(folder / "clip")
    torch.save({name: torch.from_numpy(value) for name, value in fixtures.aesthetic_weights().items()},
               folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder / "sac+logos+ava1-l14-linearMSE.pth", folder / "clip"
