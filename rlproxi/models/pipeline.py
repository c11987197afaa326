"""Prompt in, image out: a trained model as one diffusers-shaped folder.

::

    model_index.json         class names, as diffusers writes them
    unet/ or transformer/    the network: config.json, safetensors
    lam_embedding/ lora/     a published network's lam branch and adapters, where there are any
    text_encoder/ tokenizer/ transformers pairs, as many as the checkpoint has
    vae/ scheduler/          autoencoder and noise levels of a published checkpoint
    sampler.json             {"schedule": {...}, "sampler": {...}, "size": pixels}
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..config.sections import Sampler, Schedule
from ..files import folder_draft, link
from ..proximal.samplers import Step, Trajectory, sample
from ..seeds import NamedNoise
from . import lora
from .autoencoder import Autoencoder
from .backbone import LAM, ProximalBackbone, ProximalNetwork
from .folders import INDEX, SETTINGS, ModelFolder, Settings
from .loading import load_autoencoder, load_denoiser, load_encoder, save_denoiser
from .precision import autocast, compute_dtype
from .text import TextEncoder, TextStates, operator
from .text_stacks import CheckpointText

#: Beginnings of the names of the frozen parts of a model folder.
FROZEN = ("text_encoder", "tokenizer", "text.json", "vae", "scheduler")
#: What model_index.json calls this model; ``diffusers_pipeline`` makes diffusers know it.
PIPELINE = "ProxT2IPipeline"


@dataclass(eq=False, repr=False)
class TextToImage:
    """Samples images from prompts by proximal diffusion.

    Args:
        denoiser: the network. text: its text encoder.
        schedule, sampler: the config's sections; they give the defaults of a call.
        precision: the network's arithmetic, as in the config: auto, float32 or bfloat16. The default draws the same
            image on every chip, to rounding.
        vae: decodes latents; None: samples are pixels.
        origin: the model folder it came from; what was not trained is linked from there, not written again.
    """

    denoiser: ProximalNetwork
    text: TextEncoder | CheckpointText
    schedule: Schedule
    sampler: Sampler
    precision: str = "float32"
    vae: Autoencoder | None = None
    origin: Path | None = None

    def __post_init__(self) -> None:
        self.denoiser.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        precision: str = "float32",
        size: int | None = None,
        schedule: Schedule | None = None,
        sampler: Sampler | None = None,
    ) -> TextToImage:
        """Loads a model folder, a run directory's models/final, else its models/pretrained, or a diffusers folder.

        ``size`` (pixels), ``schedule`` and ``sampler``: None takes the folder's own, else the defaults.

        Raises FileNotFoundError naming what is missing where, ValueError naming a file that is damaged.
        """
        found = ModelFolder.find(folder)
        schedule, sampler = schedule or found.settings.schedule, sampler or found.settings.sampler
        denoiser, path = load_denoiser(found, schedule.build(), size), found.path
        return cls(denoiser, load_encoder(path), schedule, sampler, precision, load_autoencoder(path), path)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes the model folder, atomically. Raises FileExistsError where ``folder`` holds something else."""
        folder = Path(folder)
        if folder.exists() and not (folder / INDEX).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not a model folder; choose another name")
        with folder_draft(folder) as fresh:
            self._write(fresh)
        return folder

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        save_denoiser(self.denoiser, folder, self.origin)
        index: dict[str, Any] = {}
        if self.origin is None:
            self.text.save_pretrained(folder)
            parts = self.text.components()
            if self.vae is not None:
                self.vae.save_pretrained(folder)
                parts = {**parts, "vae": self.vae.vae}
            index = {name: _class(x) for name, x in parts.items()}
        else:
            index = ModelFolder.at(self.origin).index
            for source in sorted(self.origin.iterdir()):
                # Frozen parts are linked, not written again.
                if source.name.startswith(FROZEN) and not (folder / source.name).exists():
                    link(source, folder / source.name)
            if isinstance(self.text, CheckpointText):
                self.text.save_settings(folder)  # the origin's may follow from its pipeline's class, which changes
        kept = {name: entry for name, entry in index.items() if not name.startswith("_") and (folder / name).is_dir()}
        index = {"_class_name": PIPELINE, "_rlproxi_version": __version__, **kept, **_denoiser_classes(self.denoiser)}
        index["sampler"] = ["rlproxi.models.diffusers_pipeline", "ProximalSampler"]
        for name, values in ((SETTINGS, self.settings.model_dump()), (INDEX, index)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def merged(self) -> TextToImage:
        """This model with its adapters added to the base, in float32; itself where it has none."""
        if self.denoiser.lora is not None:
            lora.merge(self.denoiser)
        return self

    @property
    def settings(self) -> Settings:
        """What sampler.json holds."""
        return Settings(schedule=self.schedule, sampler=self.sampler, size=self.size)

    @property
    def size(self) -> int:
        """H = W of the images in pixels."""
        return self.denoiser.sample_shape[-1] * (1 if self.vae is None else self.vae.factor)

    def to(self, device: str | torch.device) -> TextToImage:
        """Moves all networks."""
        parts: list[Any] = [self.denoiser, self.text, self.vae]
        for part in filter(None, parts):
            part.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Prompts -> images, uint8 [B, H, W, 3].

        An image's noise depends on its own seed alone. Rounding in the network may move a pixel by 1 between batch
        sizes.

        Args:
            num_inference_steps, guidance_scale: None takes the model's own.
            seeds: one non-negative integer for each prompt; None draws them from torch's global generator.
            batch_size: images in one forward; bounds the memory only.

        Raises ValueError for no prompts, a wrong number of seeds, or a number of steps that the sampler cannot take.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompts: give at least one (an empty string samples without text)")
        if seeds is None:
            seeds = torch.randint(2**31, (len(prompts),)).tolist()
        seeds = [int(seed) for seed in seeds]
        if len(seeds) != len(prompts) or min(seeds) < 0:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one non-negative integer for each")
        self.steps(num_inference_steps)
        parts = []
        for rows in (slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)):
            noise = NamedNoise([(seed,) for seed in seeds[rows]])
            x = self.run(self.text.encode(prompts[rows]), noise, num_inference_steps, guidance_scale).x
            parts.append(self.images(x))
        return np.concatenate(parts)

    def images(self, x: torch.Tensor) -> np.ndarray:
        """Samples [B, C, H, W] -> images, uint8 [B, H, W, 3]. Raises ValueError for NaN or Inf."""
        return to_uint8(self.pixels(x))

    def pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Samples [B, C, H, W] -> pixels [B, 3, H, W] in about [-1, 1]."""
        return x if self.vae is None else self.vae.decode(x)

    def steps(self, num_inference_steps: int | None = None) -> list[Step]:
        """The sampler's plan; None takes the model's own number of steps. Raises ValueError for one it cannot take."""
        return self.sampler.plan(self.schedule.build(), num_inference_steps)

    def run(
        self,
        text: TextStates,
        noise: NamedNoise,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        keep_chain: bool = False,
    ) -> Trajectory:
        """One sampler call, the same in rollout and evaluation; ``text`` and ``noise`` have a row for each sample."""
        device = self.denoiser.device
        x = noise.start(self.denoiser.sample_shape, device)
        guidance = self.sampler.guidance_scale if guidance_scale is None else guidance_scale
        prox = operator(self.denoiser, self.text, guidance)
        with autocast(compute_dtype(self.precision, device), device):
            return sample(prox, self.steps(num_inference_steps), x, text, noise, keep_chain)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[B, C, H, W] in about [-1, 1] -> uint8 [B, H, W, C]. Raises ValueError for NaN or Inf."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "the sampler returned NaN or infinite pixels: the weights are unusable, or guidance_scale is far too high"
        )
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _denoiser_classes(denoiser: ProximalNetwork) -> dict[str, list[str]]:
    if isinstance(denoiser, ProximalBackbone):
        return {denoiser.part: _class(denoiser.net), LAM: _class(denoiser.lam_embedding)}
    return {denoiser.part: _class(denoiser)}


def _class(part: object) -> list[str]:
    """[library, class] as diffusers' model_index.json names a part."""
    module = type(part).__module__
    return [module if module.startswith("rlproxi") else module.split(".")[0], type(part).__name__]
