"""The trained model as a diffusers pipeline: its components, its loading and saving, its call.

diffusers looks for a pipeline's class among its own names and imports no other module. Importing this module puts
``ProxT2IPipeline`` among them. After that ``DiffusionPipeline.from_pretrained`` loads every model folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

from ..seeds import NamedNoise
from . import lora, transformer, unet
from .autoencoder import Autoencoder
from .backbone import LAM, CheckpointNoise, ProximalBackbone, ProximalNetwork
from .folders import ModelFolder, Settings
from .pipeline import TextToImage, to_uint8
from .preconditioning import Preconditioned
from .text import TextEncoder
from .text_stacks import ENDS, KINDS, CheckpointText, TextSettings
from .text_stacks import SETTINGS as TEXT_SETTINGS

TEXT_PARTS = tuple(part + end for end in ENDS for part in ("tokenizer", "text_encoder"))
COMPONENTS = ("unet", "transformer", LAM, "vae", *TEXT_PARTS, "scheduler", "sampler")
OUTPUTS = ("pil", "np", "pt", "latent")


class ProximalSampler(SchedulerMixin):
    """What is not a network in a model folder. diffusers gives ``from_pretrained`` the model folder itself.

    Args:
        settings: those of sampler.json.
        text: the settings of a published checkpoint's text encoders; None for the built-in encoder.
        folder: the model folder; None for a model that was never saved.
        adapters: whether the network still lacks the folder's adapters.
    """

    def __init__(self, settings: Settings, text: TextSettings | None, folder: Path | None, adapters: bool = False):
        self.settings, self.text, self.folder, self.adapters = settings, text, folder, adapters

    # diffusers' schedulers have more arguments, which a component without a subfolder has no use for.
    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> ProximalSampler:  # type: ignore[override]
        """Reads a model folder's sampler.json and text.json. Raises ValueError or FileNotFoundError naming the file."""
        found = ModelFolder.at(folder)
        text = found.text if (found.path / TEXT_SETTINGS).is_file() else None
        return cls(found.settings, text, found.path, found.has_adapters)


class ProxT2IPipeline(DiffusionPipeline):
    """Text to image by proximal diffusion.

    Components, None where a model has none: ``unet`` or ``transformer`` (our network, or a published one), its
    ``lam_embedding``, ``vae`` (none: the model's samples are pixels), ``text_encoder`` and ``tokenizer`` with their
    ``_2`` and ``_3``, ``scheduler`` (the published network's noise levels) and ``sampler`` (the proximal one).

    The components are assembled to a ``TextToImage``, which samples. In float32 it draws the same, bit for bit.
    """

    _optional_components = list(COMPONENTS)  # noqa: RUF012  # no ClassVar in diffusers
    _assembled: TextToImage | None = None
    _assembled_from: tuple[int, ...] = ()

    # No component has a default, so that diffusers lets a caller of from_pretrained replace it; and none has an
    # annotation, because diffusers would compare the component with it.
    def __init__(
        self,
        unet,
        transformer,
        lam_embedding,
        vae,
        tokenizer,
        text_encoder,
        tokenizer_2,
        text_encoder_2,
        tokenizer_3,
        text_encoder_3,
        scheduler,
        sampler,
    ):
        super().__init__()
        if sampler is None:
            raise ValueError("this model_index.json names no sampler: use ProxT2IPipeline.from_pretrained(folder)")
        given = locals()
        self.register_modules(**{name: given[name] for name in COMPONENTS})
        self.precision = "float32"
        if sampler.adapters:
            lora.load(unet if unet is not None else transformer, sampler.folder)
            sampler.adapters = False
        self._loaded = self._identities()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> ProxT2IPipeline:
        """Loads what ``ModelFolder.find`` finds; ``options`` are diffusers'; a plain diffusers folder takes none.

        Raises FileNotFoundError or ValueError naming what is missing or damaged.
        """
        folder = ModelFolder.find(pretrained_model_name_or_path)
        if "sampler" in folder.index:
            return super().from_pretrained(folder.path, **options)
        if options:
            given = ", ".join(options)
            raise ValueError(f"{folder.path} is a plain diffusers folder, loaded without options; given: {given}")
        return cls.from_model(TextToImage.from_pretrained(folder))

    @classmethod
    def from_model(cls, model: TextToImage) -> ProxT2IPipeline:
        """A pipeline around the networks of ``model``, which it shares."""
        denoiser = model.denoiser
        parts: dict[str, Any] = dict.fromkeys(COMPONENTS)
        parts.update(model.text.components())
        parts[denoiser.part] = denoiser.net if isinstance(denoiser, ProximalBackbone) else denoiser
        if isinstance(denoiser, ProximalBackbone):
            denoiser.net.lora = denoiser.lora
            parts[LAM], parts["scheduler"] = denoiser.lam_embedding, _scheduler(model.origin)
        parts["vae"] = model.vae.vae if model.vae is not None else None
        parts["sampler"] = ProximalSampler(model.settings, getattr(model.text, "settings", None), model.origin)
        pipeline = cls(**parts)
        pipeline.precision = model.precision
        return pipeline

    # diffusers' further options, of shards and uploads, have no meaning for a model folder.
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, safe_serialization: bool = True
    ) -> None:
        """Writes a model folder; what was not trained is linked from the folder this pipeline came from.

        Raises ValueError where components were replaced since loading, FileExistsError as ``TextToImage``.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: a model folder holds safetensors alone")
        if self._identities() != self._loaded:
            raise ValueError("components were replaced since loading: save the new one with its own save_pretrained")
        self.model.save_pretrained(save_directory)

    def to(self, *args: Any, **kwargs: Any) -> ProxT2IPipeline:
        """Moves the networks; a dtype (float32 or bfloat16) sets the network's arithmetic and leaves the weights alone.

        Raises ValueError for another dtype.
        """
        dtype = kwargs.pop("dtype", None) or next((x for x in args if isinstance(x, torch.dtype)), None)
        if dtype is not None:
            self.precision = _precision(dtype)
        args = tuple(x for x in args if not isinstance(x, torch.dtype))
        return super().to(*args, **kwargs) if args or kwargs else self

    @property
    def model(self) -> TextToImage:
        """The components put together; again where one was replaced."""
        if self._assembled is None or self._assembled_from != self._identities():
            self._assembled, self._assembled_from = self._assemble(), self._identities()
        self._assembled.precision = self._arithmetic(self._assembled.denoiser)
        return self._assembled

    def _identities(self) -> tuple[int, ...]:
        return tuple(id(getattr(self, name)) for name in COMPONENTS)

    def _assemble(self) -> TextToImage:
        s, settings = self.sampler, self.sampler.settings
        vae = Autoencoder(self.vae) if self.vae is not None else None
        text: TextEncoder | CheckpointText
        if s.text is None:
            text = TextEncoder(self.tokenizer, self.text_encoder, min(self.tokenizer.model_max_length, 512))
        else:
            stack = KINDS[s.text.kind]
            text = stack({name: getattr(self, name) for name in TEXT_PARTS[: 2 * len(stack.ENCODERS)]}, s.text)
        network = self.unet if self.unet is not None else self.transformer
        if not isinstance(network, Preconditioned):
            size = settings.size // (vae.factor if vae is not None else 1) if settings.size else None
            adapters = getattr(network, "lora", None)
            noise = CheckpointNoise(json.loads(self.scheduler.to_json_string()))
            network = ProximalBackbone(network, self.lam_embedding, noise, settings.schedule.build(), size)
            network.lora = adapters
        return TextToImage(network, text, settings.schedule, settings.sampler, vae=vae, origin=s.folder)

    def _arithmetic(self, denoiser: ProximalNetwork) -> str:
        """The network's arithmetic; its own dtype where it was loaded in another than float32."""
        dtype = next(lora.network_of(denoiser).parameters()).dtype
        if dtype is torch.float32:
            return self.precision
        if isinstance(denoiser, Preconditioned):  # its closed form is exact in float32 only
            raise ValueError(f"this network was loaded in {dtype}: load it without dtype, then use to(torch.bfloat16)")
        return _precision(dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 64,
    ) -> ImagePipelineOutput | tuple:
        """Prompts -> images, ``num_images_per_prompt`` for each prompt, side by side.

        Args:
            num_inference_steps, guidance_scale: None takes the model's own.
            generator: names the noise. A fresh ``torch.Generator().manual_seed(s)`` gives image j of every prompt the
                seed s + j, as ``rlproxi sample --seed s``; one that has drawn already gives new seeds. A list has one
                for each image. None takes seeds from torch's global generator.
            output_type: pil; np, float32 [B, H, W, 3] in [0, 1]; pt, float32 [B, 3, H, W] in [0, 1]; latent, what the
                sampler returns, float32 [B, C, h, w].
            height, width: nothing but the model's own size.
            batch_size: images in one forward; bounds the memory only.

        Raises ValueError for an argument that cannot be, naming it.
        """
        model = self.model
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError("prompt: give a string or a list of at least one string")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}: give at least 1")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type {output_type!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        if {height, width} - {None, model.size}:
            raise ValueError(f"height={height}, width={width}: this model draws {model.size} pixels, no other size")
        steps = len(model.steps(num_inference_steps))
        seeds = seeds_of(generator, len(prompts), num_images_per_prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        parts = []
        with self.progress_bar(total=steps * -(-len(prompts) // batch_size)) as bar:

            def count(*_) -> None:  # a hook that returned something would replace the network's output
                bar.update()

            hook = model.denoiser.register_forward_hook(count)  # a step is one forward, with guidance too
            try:
                for i in range(0, len(prompts), batch_size):
                    rows = slice(i, i + batch_size)
                    noise = NamedNoise([(seed,) for seed in seeds[rows]])
                    x = model.run(model.text.encode(prompts[rows]), noise, num_inference_steps, guidance_scale).x
                    parts.append(x if output_type == "latent" else model.pixels(x))
            finally:
                hook.remove()
        images: Any = _as(output_type, torch.cat(parts))
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, prompts: int, each: int) -> list[int]:
    """A seed for each of prompts * each images. Raises ValueError for a list of another length.

    The noise is drawn on the CPU from the seed, so an image is the same on every device. Each generator is advanced.
    """
    if generator is None:
        return torch.randint(2**31, (prompts * each,)).tolist()
    if isinstance(generator, torch.Generator):
        first = generator.initial_seed()
        if not _draw(generator):
            return [first + j for j in range(each)] * prompts
        return torch.randint(2**31, (prompts * each,), generator=generator, device=generator.device).tolist()
    if len(generator) != prompts * each:
        raise ValueError(f"{len(generator)} generators for {prompts * each} images: give one for each, or a single one")
    return [seed for one in generator for seed in seeds_of(one, 1, 1)]


def _draw(generator: torch.Generator) -> bool:
    """Draws a number; whether any had been drawn before."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    used = not torch.equal(fresh.get_state(), generator.get_state())
    torch.rand(1, generator=generator, device=generator.device)
    return used


def _as(output_type: str, images: Tensor) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "latent":
        return images
    whole = to_uint8(images)  # it refuses NaN
    if output_type == "pil":
        return [Image.fromarray(image) for image in whole]
    images = ((images + 1) / 2).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _precision(dtype: torch.dtype) -> str:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if dtype not in names:
        raise ValueError(f"{dtype} is not an arithmetic of this model: load it without dtype, then to(torch.bfloat16)")
    return names[dtype]


def _scheduler(folder: Path | None) -> Any:
    """The scheduler of the folder that a published network came from."""
    if folder is None:
        raise ValueError("this network has no model folder yet, and its scheduler is read from there: save it first")
    name = ModelFolder.at(folder).json("scheduler/scheduler_config.json")["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder / "scheduler")


def _register() -> None:
    # model_index.json names the class; folders of the first version call it TextToImage.
    for name in ("ProxT2IPipeline", "TextToImage"):
        setattr(diffusers, name, ProxT2IPipeline)
    # In the module that model_index.json names for a component diffusers also looks for the component's base class.
    for module in (unet, transformer):
        setattr(module, ModelMixin.__name__, ModelMixin)


_register()
