"""Where ``rlproxi eval`` gets images from: models of ours by any sampler, and diffusers pipelines as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..algorithms.requests import SampleRequest
from ..models.folders import ModelFolder
from ..models.pipeline import TextToImage, to_uint8
from ..models.precision import autocast, compute_dtype
from ..models.text import operator
from ..proximal.samplers import SAMPLERS
from ..proximal.schedule import VPSchedule
from ..seeds import NamedNoise, seed_of

#: Name -> what it changes of the model's section ``sampler``.
OWN: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "eta": 0.0} for name in SAMPLERS},
    "ddim-ancestral": {"name": "ddim", "eta": 1.0},
    "euler-maruyama": {"name": "euler", "eta": 1.0},
}
#: Name -> diffusers' scheduler class, with its arguments: solvers that remember earlier steps.
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
}
#: A diffusers folder by its own pipeline and scheduler.
PIPELINE = "pipeline"
NAMES = (*OWN, *SOLVERS, PIPELINE)


class Drawer(Protocol):
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        """uint8 [P * G, H, W, 3], prompt-major. Raises ValueError for a number of steps it cannot take."""
        ...


def split_name(model: str) -> tuple[str, str, str | None, str]:
    """(label, path, LoRA or None, sampler or "") of ``[LABEL=]PATH[+LORA][@SAMPLER]``. A path that exists is taken as it is."""
    label, path = "", model
    first, sign, rest = model.partition("=")
    if sign and "/" not in first and not Path(model).exists():
        label, path = first, rest
    sampler, lora = "", None
    if not Path(path).exists() and path.rpartition("@")[2] in NAMES:
        path, _, sampler = path.rpartition("@")
    if not Path(path).exists() and "+" in path:
        path, _, lora = path.rpartition("+")
    return label or Path(path).resolve().name, path, lora, sampler


def open_model(
    model: str, sampler: str, device: str | None, precision: str
) -> tuple[tuple[str, str, str], Callable[[], Drawer]]:
    """((label, path, sampler), a function that loads it). ``sampler`` "": the one that the name says, else the model's own.

    Raises FileNotFoundError or ValueError for what is not there or does not go together; nothing is loaded yet.
    """
    label, path, lora, named = split_name(model)
    chosen = sampler or named
    if chosen and chosen not in NAMES:
        raise ValueError(f"sampler {chosen!r} is unknown; choose one of {', '.join(NAMES)}")
    found = ModelFolder.find(path)
    folder, ours = found.path, found.has_settings
    if not chosen and not ours:
        chosen = PIPELINE
    if lora and chosen != PIPELINE:
        raise ValueError(
            f"{model}: +LORA goes with a diffusers folder and its own pipeline; a run's adapters are in its model folder"
        )
    if ours and chosen == PIPELINE:
        raise ValueError(f"{model}: a model folder of ours has no scheduler of diffusers; choose another sampler")
    if lora and not Path(lora).exists():
        raise FileNotFoundError(f"{lora} does not exist: expected a LoRA in diffusers' format, a file or a folder")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    told = f"{label} {sampler}" if sampler else label

    def load() -> Drawer:
        if chosen == PIPELINE:
            return Pipeline(folder, lora, device, precision)
        loaded = TextToImage.from_pretrained(folder, precision).to(device)
        return Solver(loaded, chosen) if chosen in SOLVERS else Own(loaded, OWN.get(chosen, {}))

    return (told, path, chosen), load


class Own:
    """A model of ours, or a diffusers folder as the warm start makes it, by one of our samplers."""

    def __init__(self, model: TextToImage, changes: dict[str, Any]):
        model.sampler = model.sampler.model_copy(update=changes)
        self.model = model

    @torch.inference_mode()
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        text = self.model.text.groups(request.prompts, request.group_size)
        run = self.model.run(text, NamedNoise(request.names(seed)), request.num_steps, request.guidance_scale)
        return self.model.images(run.x)


class Solver:
    """The same network as an eps-model, by one of diffusers' schedulers.

    The prox at t = 0 with lam = sigma^2/alpha^2 is the clean prediction (see ``proximal.samplers``), and eps = (x - alpha x^)/sigma.
    The scheduler's noise levels are the model's at 1000 times in (0, 1], as far as its start time.
    """

    def __init__(self, model: TextToImage, name: str):
        import diffusers

        kind, options = SOLVERS[name]
        self.model = model
        betas = trained_betas(model.schedule.build(), model.sampler.start_time)
        self.scheduler = getattr(diffusers, kind)(num_train_timesteps=len(betas), trained_betas=betas, **options)

    @torch.inference_mode()
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        model, scheduler = self.model, self.scheduler
        device = model.denoiser.device
        guidance = model.sampler.guidance_scale if request.guidance_scale is None else request.guidance_scale
        text = model.text.groups(request.prompts, request.group_size)
        prox = operator(model.denoiser, model.text, guidance)
        scheduler.set_timesteps(request.num_steps or model.sampler.num_inference_steps, device=device)
        x = NamedNoise(request.names(seed)).start(model.denoiser.sample_shape, device)
        with autocast(compute_dtype(model.precision, device), device):
            for t in scheduler.timesteps:
                signal = float(scheduler.alphas_cumprod[int(t)])
                alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
                clean = prox(x / alpha, 0.0, (sigma / alpha) ** 2, text)
                x = scheduler.step((x - alpha * clean) / sigma, t, x).prev_sample
        return model.images(x)


def trained_betas(schedule: VPSchedule, start_time: float, count: int = 1000) -> np.ndarray:
    """float64 betas of diffusers' discrete schedule whose alphas_cumprod[i] is alpha_bar((i + 1)/count), up to ``start_time``."""
    times = [i / count for i in range(round(start_time * count) + 1)]
    return np.array([-math.expm1(-schedule.integral(a, b)) for a, b in zip(times, times[1:])])


class Pipeline:
    """A diffusers folder by its own pipeline, with its own scheduler, perhaps with a LoRA."""

    def __init__(self, folder: Path, lora: str | None, device: str, precision: str):
        from diffusers import DiffusionPipeline

        self.pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=compute_dtype(precision, device)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if lora:
            self.pipe.load_lora_weights(lora)

    @torch.inference_mode()
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        guidance = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        steps = {} if request.num_steps is None else {"num_inference_steps": request.num_steps}
        generators = [torch.Generator().manual_seed(seed_of(*name)) for name in request.names(seed)]
        images = self.pipe(
            prompt=list(request.rows), generator=generators, output_type="pt", **steps, **guidance
        ).images
        return to_uint8(images.float() * 2 - 1)
