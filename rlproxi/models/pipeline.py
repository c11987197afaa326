"""Prompt in, image out: a trained model as one diffusers-shaped folder.

::

    model_index.json         class names, as diffusers writes them
    unet/                    ProximalUNet: config.json, safetensors
    text_encoder/ tokenizer/ a transformers pair
    sampler.json             {"schedule": {...}, "sampler": {...}}, the config's sections of these names
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from pydantic import ValidationError

from .. import __version__
from ..schema import Sampler, Schedule
from ..proximal.operator import Denoiser, ProximalOperator
from ..proximal.samplers import Step, Trajectory, plan, sample
from ..seeds import NamedNoise
from .precision import autocast, compute_dtype
from .text import TextEncoder, TextStates
from .unet import ProximalUNet

PARTS = ("unet", "text_encoder", "tokenizer")
INDEX, SETTINGS = "model_index.json", "sampler.json"
_EXPECTED = (f"expected a model folder ({'/, '.join(PARTS)}/ and {SETTINGS}) "
             "or a run directory that holds one as models/final or models/pretrained")


def find_model(path: str | os.PathLike) -> Path:
    """The model folder that ``path`` is, or that the run directory ``path`` holds: models/final, else pretrained.

    Raises FileNotFoundError that names the folder and says what was expected there.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: {_EXPECTED}")
    for folder in (path, path / "models" / "final", path / "models" / "pretrained"):
        if (folder / "unet").is_dir():
            return folder
    raise FileNotFoundError(f"{path} holds no model: {_EXPECTED}")


def check_weights(folder: str | os.PathLike) -> None:
    """Looks at the headers of ``folder``'s safetensors files.

    Raises FileNotFoundError where there are none, ValueError naming a file that is damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file, the only kind of weights that is loaded")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}): copy or save the model again") from None


def load_unet(folder: str | os.PathLike) -> ProximalUNet:
    """The ProximalUNet of a model folder or run directory, in float32, for inference (``eval``).

    Raises FileNotFoundError for a folder without one, ValueError for damaged files, or weights that do not
    fit their config.json.
    """
    folder = find_model(folder) / "unet"
    check_weights(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing: {_EXPECTED}")
    try:
        unet, info = ProximalUNet.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False,
                                                  output_loading_info=True, local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: the weights do not fit config.json ({error})") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit config.json; missing or unexpected: "
                         f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}")
    return unet.eval()


class TextToImage:
    """Samples images from prompts by proximal diffusion.

    Args:
        unet: the denoiser. text: its text encoder. schedule, sampler: the config's sections; they give the
            defaults of a call.
        precision: the network's arithmetic, as in the config: auto, float32 or bfloat16. The default draws the same
            image on every chip, to rounding.
    """

    def __init__(self, unet: ProximalUNet, text: TextEncoder, schedule: Schedule, sampler: Sampler,
                 precision: str = "float32"):
        self.unet = unet.eval()
        self.text = text
        self.schedule = schedule
        self.sampler = sampler
        self.precision = precision

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, precision: str = "float32") -> "TextToImage":
        """Loads a model folder, or a run directory's models/final, else its models/pretrained.

        Raises FileNotFoundError naming what is missing where, ValueError naming a file that is damaged.
        """
        folder = find_model(folder)
        for part in (*PARTS, SETTINGS):
            if not (folder / part).exists():
                raise FileNotFoundError(f"{folder / part} is missing: {_EXPECTED}")
        try:
            values = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            schedule = Schedule.model_validate(values["schedule"])
            sampler = Sampler.model_validate(values["sampler"])
        except (KeyError, TypeError, ValidationError, ValueError) as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(f"{folder / SETTINGS} is not readable: {reason}") from None
        check_weights(folder / "text_encoder")
        return cls(load_unet(folder), TextEncoder.from_pretrained(folder), schedule, sampler, precision)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes the model folder, atomically: a reader sees the old model or the new one, never a half.

        Raises FileExistsError rather than replace a folder that holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / INDEX).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not a model folder; choose another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Siblings, so that the rename stays on one file system; the process id keeps two writers apart.
        fresh, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("new", "old"))
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            self.unet.save_pretrained(fresh / "unet")
            self.text.save_pretrained(fresh)
            settings = {"schedule": self.schedule.model_dump(), "sampler": self.sampler.model_dump()}
            _write_json(fresh / SETTINGS, settings)
            _write_json(fresh / INDEX, {
                "_class_name": type(self).__name__, "_rlproxi_version": __version__,
                **{part: [type(x).__module__, type(x).__name__]
                   for part, x in zip(PARTS, (self.unet, self.text.model, self.text.tokenizer))}})
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def to(self, device: str | torch.device) -> "TextToImage":
        """Moves both networks."""
        self.unet.to(device)
        self.text.model.to(device)
        return self

    def unknown_words(self, prompt: str) -> list[str]:
        """The words the tokenizer has no token for: the model cannot tell them from each other."""
        unknown = self.text.tokenizer.unk_token
        return [word for word in re.findall(r"\w+", prompt) if unknown in self.text.tokenizer.tokenize(word)]

    def __call__(self, prompts: str | Sequence[str], num_inference_steps: int | None = None,
                 guidance_scale: float | None = None, seeds: Sequence[int] | None = None,
                 batch_size: int = 64) -> np.ndarray:
        """Prompts -> images, uint8 [B, H, W, 3].

        An image's noise depends on its own seed alone, not on its neighbours or their number; rounding in
        the network may still move a pixel by 1 between batch sizes.

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
        parts = [self._images(prompts[i : i + batch_size], seeds[i : i + batch_size], num_inference_steps, guidance_scale)
                 for i in range(0, len(prompts), batch_size)]
        return np.concatenate(parts)

    @torch.no_grad()
    def _images(self, prompts: list[str], seeds: list[int], count: int | None, guidance: float | None) -> np.ndarray:
        return to_uint8(self.run(self.text.encode(prompts), NamedNoise([(seed,) for seed in seeds]), count, guidance).x)

    def steps(self, num_inference_steps: int | None = None) -> list[Step]:
        """The sampler's plan; None takes the model's own number of steps. Raises ValueError for one it cannot take."""
        s = self.sampler
        count = s.num_inference_steps if num_inference_steps is None else num_inference_steps
        return plan(self.schedule.build(), s.name, count, s.start_time, s.grid)

    def run(self, text: TextStates, noise: NamedNoise, num_inference_steps: int | None = None,
            guidance_scale: float | None = None, keep_chain: bool = False) -> Trajectory:
        """One sampler call from named noise: the one forward path of rollout, evaluation and ``rlproxi sample``.

        ``text`` and ``noise`` have a row for each sample; see ``__call__`` for the rest.
        """
        config, device = self.unet.config, self.unet.device
        x = noise.start((config.in_channels, config.sample_size, config.sample_size), device)
        guidance = self.sampler.guidance_scale if guidance_scale is None else guidance_scale
        with autocast(compute_dtype(self.precision, device), device):
            return sample(operator(self.unet, self.text, guidance), self.steps(num_inference_steps), x, text, noise,
                          keep_chain)


def operator(denoiser: Denoiser, text: TextEncoder, guidance_scale: float) -> ProximalOperator:
    """The prox of a text-conditional denoiser, with the empty caption for guidance; the learner's as the sampler's."""
    return ProximalOperator(denoiser, guidance_scale, text.null_like, TextStates.join)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[B, C, H, W] in about [-1, 1] -> uint8 [B, H, W, C]. Raises ValueError for NaN or Inf: no image is that."""
    if not torch.isfinite(x).all():
        raise ValueError("the sampler returned NaN or infinite pixels: the weights are unusable, or guidance_scale is "
                         "far too high")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
