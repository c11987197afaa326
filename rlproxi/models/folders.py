"""``ModelFolder``: the one reader of the facts in a model folder, before any weights are loaded."""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from ..config.loading import Config
from ..config.sections import LoRA, Sampler, Schedule
from ..run_directory import RunDirectory
from . import lora
from .checkpoint_files import read_json
from .text_stacks import ENDS, KINDS, TextSettings
from .text_stacks import SETTINGS as TEXT_SETTINGS

if TYPE_CHECKING:
    from .backbone import CheckpointNoise, Interface

INDEX, SETTINGS = "model_index.json", "sampler.json"
#: The subfolders that may hold the denoiser's network, in the order of search.
NETWORKS = ("unet", "transformer")
#: The classes of our own networks, and their modules.
OWN = {"ProximalUNet": "unet", "ProximalTransformer": "transformer"}
#: Models that come with the package: builtin:<folder>.
BUILTIN, BUILTIN_FOLDER = "builtin:", Path(__file__).parent / "builtin"
EXPECTED = (
    "expected a model folder (unet/ or transformer/, text_encoder/, tokenizer/, as diffusers lays them out) "
    "or a run directory that holds one as models/final or models/pretrained"
)


class Latents(NamedTuple):
    """An autoencoder's latents: ``channels``, and ``factor``, the pixels of a latent's side."""

    channels: int
    factor: int


class Settings(BaseModel):
    """sampler.json: the proximal schedule, the sampler, and H = W of the images in pixels."""

    schedule: Schedule
    sampler: Sampler
    size: int | None = None


def is_builtin(path: str | os.PathLike) -> bool:
    """Whether ``path`` names a model that comes with the package (``builtin:NAME``)."""
    return str(path).startswith(BUILTIN)


class ModelFolder:
    """One model folder. Each fact is read when it is first asked for, and once; no weights are loaded.

    ``find``, ``at`` and ``of`` give the same object again while the folder's files are unchanged. Every property raises
    FileNotFoundError or ValueError, naming the file, where the folder lacks the fact or the file is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._files: dict[str, dict[str, Any]] = {}

    @classmethod
    def at(cls, path: str | os.PathLike) -> ModelFolder:
        """The folder ``path`` itself, whatever it holds."""
        path = Path(path)
        return _opened(path, _state(path))

    @classmethod
    def find(cls, path: str | os.PathLike) -> ModelFolder:
        """The model folder ``path``, or that of the run directory ``path``: models/final, else models/pretrained.

        ``builtin:NAME`` is a model that comes with the package. Raises FileNotFoundError that names ``path`` and what
        was expected there.
        """
        if is_builtin(path):
            name, known = str(path).removeprefix(BUILTIN), sorted(p.name for p in BUILTIN_FOLDER.iterdir())
            if name not in known:
                raise FileNotFoundError(f"{path} is no model of this package, which has {BUILTIN}{', '.join(known)}")
            return cls.at(BUILTIN_FOLDER / name)
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: {EXPECTED}")
        for folder in (path, RunDirectory(path).final, RunDirectory(path).pretrained):
            if any((folder / part).is_dir() for part in NETWORKS):
                return cls.at(folder)
        raise FileNotFoundError(f"{path} holds no model: {EXPECTED}")

    @classmethod
    def of(cls, config: Config) -> ModelFolder | None:
        """The folder that gives a run its autoencoder and text encoders: ``model.init``, else ``model.encoders``.

        None for a model of pixels with the built-in text encoder. Raises FileNotFoundError as ``find`` for model.init.
        """
        if config.model.init:
            return cls.find(config.model.init)
        return cls.at(config.model.encoders) if config.model.encoders else None

    def __fspath__(self) -> str:
        """The path, so that a ModelFolder is taken wherever a path is."""
        return str(self.path)

    def json(self, name: str) -> dict[str, Any]:
        """A copy of the JSON object in the file ``name``, such as ``unet/config.json``."""
        if name not in self._files:
            self._files[name] = read_json(self.path / name)
        return copy.deepcopy(self._files[name])  # libraries take keys out of what they are given

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json; {} where there is none."""
        return self.json(INDEX) if (self.path / INDEX).is_file() else {}

    @cached_property
    def part(self) -> str:
        """The subfolder of the denoiser's network: 'unet' or 'transformer'."""
        for part in NETWORKS:
            if (self.path / part).is_dir():
                return part
        raise FileNotFoundError(f"{self.path} holds no model: {EXPECTED}")

    @cached_property
    def network(self) -> dict[str, Any]:
        """config.json of the denoiser's network."""
        return self.json(f"{self.part}/config.json")

    @property
    def is_ours(self) -> bool:
        """Whether the network is a class of this project, not a published one."""
        return self.network.get("_class_name") in [*OWN]

    @cached_property
    def interface(self) -> Interface:
        """How a published network is called. Raises ValueError for a class that is not supported."""
        from .backbone import interface_of  # imports diffusers, which takes seconds

        return interface_of(self.network)

    def noise(self) -> CheckpointNoise:
        """A published network's prediction type and noise levels, new at each call: they move between devices."""
        from .backbone import CheckpointNoise

        file = self.path / "scheduler" / "scheduler_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: it says what the network predicts and at which noise levels")
        return CheckpointNoise(self.json("scheduler/scheduler_config.json"), file)

    @property
    def has_settings(self) -> bool:
        """Whether the folder has sampler.json: this project saved it."""
        return (self.path / SETTINGS).is_file()

    @cached_property
    def settings(self) -> Settings:
        """sampler.json; the defaults for a folder that diffusers saved."""
        file = self.path / SETTINGS
        if not self.has_settings:
            if self.is_ours:
                raise FileNotFoundError(f"{file} is missing: {EXPECTED}")
            return Settings(schedule=Schedule(), sampler=Sampler())
        try:
            return Settings.model_validate(self.json(SETTINGS))
        except ValidationError as error:
            raise ValueError(f"{file} is not readable: {' '.join(str(error).split())}") from None

    @property
    def has_adapters(self) -> bool:
        """Whether the folder has LoRA adapters, in ``lora/``."""
        return (self.path / lora.FOLDER).is_dir()

    @cached_property
    def adapters(self) -> LoRA:
        """Rank, alpha and targets of the adapters in ``lora/``."""
        return LoRA.model_validate(self.json(f"{lora.FOLDER}/{lora.SETTINGS}"))

    @property
    def has_vae(self) -> bool:
        """Whether the folder has an autoencoder, in ``vae/``; else its samples are pixels."""
        return (self.path / "vae").is_dir()

    @cached_property
    def latents(self) -> Latents:
        """Channels and factor of the autoencoder. Raises FileNotFoundError without one."""
        values = self.json("vae/config.json")
        if not isinstance(values.get("block_out_channels"), list):
            file = self.path / "vae" / "config.json"
            raise ValueError(f"{file} is not the config of an AutoencoderKL: it has no block_out_channels")
        return Latents(values.get("latent_channels", 4), 2 ** (len(values["block_out_channels"]) - 1))

    @cached_property
    def text_ends(self) -> tuple[str, ...]:
        """The ends of the names of the text encoders' folders: '' for text_encoder/, '_2' for text_encoder_2/."""
        found = tuple(end for end in ENDS if (self.path / f"text_encoder{end}").is_dir())
        if not found:
            raise FileNotFoundError(f"{self.path / 'text_encoder'} is missing: not a diffusers-shaped model folder")
        return found

    @cached_property
    def text_configs(self) -> tuple[dict[str, Any], ...]:
        """config.json of each text encoder, in the order of ``text_ends``."""
        return tuple(self.json(f"text_encoder{end}/config.json") for end in self.text_ends)

    @cached_property
    def text_classes(self) -> dict[str, str]:
        """transformers' class of each text encoder, by the name of its folder."""
        classes = {}
        for end, values in zip(self.text_ends, self.text_configs, strict=True):
            part = f"text_encoder{end}"
            named = (values.get("architectures") or [None])[0] or (self.index.get(part) or [None, None])[1]
            if not isinstance(named, str):
                raise ValueError(f"{self.path / part / 'config.json'} names no class: it has no 'architectures'")
            classes[part] = named
        return classes

    @cached_property
    def text(self) -> TextSettings | None:
        """Settings of a checkpoint's text encoders: text.json, else by the pipeline's class; None: the built-in one."""
        if (self.path / TEXT_SETTINGS).is_file():
            return self._saved_text()
        pipeline = str(self.index.get("_class_name", ""))
        if not pipeline.endswith("Pipeline") or pipeline == "ProxT2IPipeline":
            return None
        kinds = [kind for kind in KINDS if self._has_encoders_of(kind)]
        # Other pipelines too have one T5, but with lengths and captions of their own.
        if not kinds or (kinds == ["pixart"] and not pipeline.startswith("PixArt")):
            raise ValueError(
                f"{self.path} is a {pipeline} with {self._encoder_names()}: its text encoders are not supported; "
                "supported are those of Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3 and PixArt"
            )
        if kinds == ["sd3"]:  # the length is the default of diffusers' pipelines
            # Without a T5, the width is what the denoiser takes.
            has_t5 = "_3" in self.text_ends
            width = self.text_configs[-1]["d_model"] if has_t5 else self.network["joint_attention_dim"]
            return TextSettings("sd3", t5_length=256, t5_width=width)
        if kinds == ["pixart"]:
            return TextSettings("pixart", t5_length=300 if "Sigma" in pipeline else 120)
        zero_null = kinds == ["sdxl"] and self.index.get("force_zeros_for_empty_prompt", True)
        return TextSettings(kinds[0], zero_null=zero_null)

    def _saved_text(self) -> TextSettings:
        values, file = self.json(TEXT_SETTINGS), self.path / TEXT_SETTINGS
        keys = [x.name for x in fields(TextSettings)]
        if set(values) != set(keys) or values["kind"] not in KINDS:
            raise ValueError(
                f"{file} is not of this version: its kind must be one of {', '.join(KINDS)}, "
                f"its other keys {', '.join(keys[1:])}"
            )
        settings = TextSettings(**values)
        if not self._has_encoders_of(settings.kind):
            names = self._encoder_names()
            raise ValueError(f"{self.path} holds {names}, but {TEXT_SETTINGS} says {settings.kind}")
        return settings

    def _has_encoders_of(self, kind: str) -> bool:
        """Whether the encoders are those of a kind of stack. T5 may be left out of Stable Diffusion 3."""
        wanted = KINDS[kind].ENCODERS
        allowed = [wanted, wanted[:-1]] if kind == "sd3" else [wanted]
        return tuple(self.text_classes.values()) in allowed and self.text_ends == ENDS[: len(self.text_ends)]

    def _encoder_names(self) -> str:
        return ", ".join(f"{part} of class {name}" for part, name in self.text_classes.items())

    @cached_property
    def text_shape(self) -> tuple[int, int, int]:
        """(tokens, width of the states, width of the pooled vector) of an encoded caption."""
        configs = self.text_configs
        length = configs[0].get("max_position_embeddings", 0)
        try:
            text = self.text or TextSettings("clip")
            width = [values["hidden_size"] if "hidden_size" in values else values["d_model"] for values in configs]
            if text.kind == "sdxl":
                return length, sum(width), configs[1]["projection_dim"]
            if text.kind == "sd3":  # CLIP's states, then T5's
                pooled = configs[0]["projection_dim"] + configs[1]["projection_dim"]
                return length + text.t5_length, text.t5_width, pooled
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self.path}: a text encoder's config.json lacks {error}") from None
        return (text.t5_length, width[0], 0) if text.kind == "pixart" else (length, width[0], width[0])

    def check(self, network: bool = True) -> None:
        """Reads every config.json that a run needs; without ``network``, those of autoencoder and text encoders alone.

        Raises FileNotFoundError or ValueError for what is missing, damaged or not supported.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a folder")
        if network and not self.is_ours:
            _ = self.interface
            self.noise()
        _ = self.text_shape


def _state(folder: Path) -> tuple[tuple[Any, ...], ...]:
    """What changes when one of the folder's small files is written, added or removed."""
    files = sorted([*folder.glob("*"), *folder.glob("*/*.json")])
    states = ((file, file.stat()) for file in files if file.exists())
    return tuple((str(file), x.st_ino, x.st_size, x.st_mtime_ns) for file, x in states)


@functools.lru_cache(maxsize=8)
def _opened(path: Path, state: tuple[tuple[Any, ...], ...]) -> ModelFolder:
    return ModelFolder(path)


def latent_space(config: Config) -> tuple[int, int]:
    """(channels, H = W) of a sample: the autoencoder's latents, or pixels.

    Raises ValueError where ``data.size`` is not a multiple of the autoencoder's factor, and where a network of ours in
    ``model.init`` has another size; else as ``ModelFolder``.
    """
    folder, size = ModelFolder.of(config), config.data.size
    if folder is None:
        return 3, size
    channels, factor = folder.latents if folder.has_vae else (3, 1)
    if size % factor:
        raise ValueError(f"data.size {size} is not a multiple of {factor}, the factor of {folder.path}/vae")
    if (
        config.model.init
        and folder.is_ours
        and (own := folder.network.get("sample_size")) not in (None, size // factor)
    ):
        raise ValueError(
            f"data.size is {size}, but the network in {folder.path} has {own * factor} x {own * factor} pixels: set "
            f"data.size={own * factor}, or model.init=null for a new network"
        )
    return channels, size // factor


def published_shapes(folder: str | os.PathLike) -> Path | None:
    """The config.json files of the published checkpoint whose name ``folder`` has, to plan a run; None for others."""
    shapes = Path(__file__).parent / "published" / Path(folder).name
    return shapes if shapes.is_dir() else None
