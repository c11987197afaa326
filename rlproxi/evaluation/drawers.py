"""Where ``rlproxi eval`` gets images from: our models with any sampler, and diffusers pipelines unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from ..algorithms.requests import SampleRequest
from ..models.folders import ModelFolder
from ..models.pipeline import TextToImage, to_uint8
from ..models.precision import autocast, compute_dtype
from ..models.text import operator
from ..proximal.samplers import KINDS
from ..proximal.schedule import VPSchedule
from ..seeds import NamedNoise, seed_of

#: Name -> what it changes in the model's section ``sampler``.
OWN: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "eta": 0.0} for name in KINDS},
    **{kind.full_noise_name: {"name": name, "eta": 1.0} for name, kind in KINDS.items() if kind.full_noise_name},
}
#: Name -> diffusers' scheduler class and its arguments, of solvers that use earlier steps.
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
}
#: A diffusers folder with its own pipeline and scheduler.
PIPELINE = "pipeline"
NAMES = (*OWN, *SOLVERS, PIPELINE)


class Drawer(Protocol):
    """A model with a sampler, which draws the images of a request."""

    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        """Return uint8 [P * G, H, W, 3], prompt-major. Raises ValueError for a number of steps it cannot take."""
        ...


def split_name(model: str) -> tuple[str, str, str | None, str]:
    """Split ``[LABEL=]PATH[+LORA][@SAMPLER]`` into (label, path, LoRA or None, sampler or "").

    A path that exists is not split.
    """
    label, path = "", model
    first, sign, rest = model.partition("=")
    if sign and "/" not in first and not Path(model).exists():
        label, path = first, rest
    sampler = ""
    lora: str | None = None
    if not Path(path).exists() and path.rpartition("@")[2] in NAMES:
        path, _, sampler = path.rpartition("@")
    if not Path(path).exists() and "+" in path:
        path, _, lora = path.rpartition("+")
    return label or Path(path).resolve().name, path, lora, sampler


def open_model(
    model: str, sampler: str, device: str | None, precision: str
) -> tuple[tuple[str, str, str], Callable[[], Drawer]]:
    """Return (label, path, sampler) of a model, and a function that loads it.

    ``sampler`` "" takes the one in the name, else the model's own. Raises FileNotFoundError for a path that does not
    exist and ValueError for parts that do not go together. Nothing is loaded yet.
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
            f"{model}: +LORA goes with a diffusers folder and its own pipeline; "
            "a run's adapters are in its model folder"
        )
    if ours and chosen == PIPELINE:
        raise ValueError(f"{model}: a model folder of ours has no scheduler of diffusers; choose another sampler")
    if lora and not Path(lora).exists():
        raise FileNotFoundError(f"{lora} does not exist: expected a LoRA in diffusers' format, a file or a folder")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shown = f"{label} {sampler}" if sampler else label

    def load() -> Drawer:
        if chosen == PIPELINE:
            return Pipeline(folder, lora, device, precision)
        loaded = TextToImage.from_pretrained(folder, precision).to(device)
        return Solver(loaded, chosen) if chosen in SOLVERS else Own(loaded, OWN.get(chosen, {}))

    return (shown, path, chosen), load


class Own:
    """One of our models, or the warm start of a diffusers folder, with one of our samplers."""

    def __init__(self, model: TextToImage, changes: dict[str, Any]):
        model.sampler = model.sampler.model_copy(update=changes)
        self.model = model

    @torch.inference_mode()
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        """Draw the images of a request, as ``Drawer.draw``."""
        text = self.model.text.groups(request.prompts, request.group_size)
        run = self.model.run(text, NamedNoise(request.names(seed)), request.num_steps, request.guidance_scale)
        return self.model.images(run.x)


class Solver:
    """The same network as an eps-model, with one of diffusers' schedulers.

    The prox at t = 0 with lam = sigma^2/alpha^2 is the clean prediction x^ (see ``proximal.samplers``), and eps = (x -
    alpha x^)/sigma. The scheduler's noise levels are the model's at 1000 times in (0, 1], up to its start time.
    """

    def __init__(self, model: TextToImage, name: str):
        import diffusers

        kind, options = SOLVERS[name]
        self.model = model
        betas = trained_betas(model.schedule.build(), model.sampler.start_time)
        self.scheduler = getattr(diffusers, kind)(num_train_timesteps=len(betas), trained_betas=betas, **options)

    @torch.inference_mode()
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        """Draw the images of a request, as ``Drawer.draw``."""
        model, scheduler = self.model, self.scheduler
        device, shape = cast(torch.device, model.denoiser.device), cast("tuple[int, ...]", model.denoiser.sample_shape)
        guidance = model.sampler.guidance_scale if request.guidance_scale is None else request.guidance_scale
        text = model.text.groups(request.prompts, request.group_size)
        prox = operator(model.denoiser, model.text, guidance)
        scheduler.set_timesteps(request.num_steps or model.sampler.num_inference_steps, device=device)
        x = NamedNoise(request.names(seed)).start(shape, device)
        with autocast(compute_dtype(model.precision, device), device):
            for t in scheduler.timesteps:
                signal = float(scheduler.alphas_cumprod[int(t)])
                alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
                clean = prox(x / alpha, 0.0, (sigma / alpha) ** 2, text)
                x = scheduler.step((x - alpha * clean) / sigma, t, x).prev_sample
        return model.images(x)


def trained_betas(schedule: VPSchedule, start_time: float, count: int = 1000) -> np.ndarray:
    """Return float64 betas of diffusers' discrete schedule with alphas_cumprod[i] = alpha_bar((i + 1)/count).

    They reach up to ``start_time``.
    """
    times = [i / count for i in range(round(start_time * count) + 1)]
    return np.array([-math.expm1(-schedule.integral(a, b)) for a, b in pairwise(times)])


class Pipeline:
    """A diffusers folder with its own pipeline and scheduler, and a LoRA where one is named."""

    def __init__(self, folder: Path, lora: str | None, device: str, precision: str):
        from diffusers import DiffusionPipeline

        self.pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=compute_dtype(precision, device)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if lora:
            self.pipe.load_lora_weights(lora)

    @torch.inference_mode()
    def draw(self, request: SampleRequest, seed: int) -> np.ndarray:
        """Draw the images of a request, as ``Drawer.draw``."""
        guidance = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        steps = {} if request.num_steps is None else {"num_inference_steps": request.num_steps}
        generators = [torch.Generator().manual_seed(seed_of(*name)) for name in request.names(seed)]
        images = self.pipe(
            prompt=list(request.rows), generator=generators, output_type="pt", **steps, **guidance
        ).images
        return to_uint8(images.float() * 2 - 1)
