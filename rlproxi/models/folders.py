"""Model folders: which they are and what they say of themselves, before a network is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.loading import Config
from ..run_directory import RunDirectory
from .autoencoder import latent_facts
from .checkpoint_files import read_json

INDEX, SETTINGS = "model_index.json", "sampler.json"
#: Where a denoiser's network lies, in the order that is looked.
NETWORKS = ("unet", "transformer")
#: The classes of our own networks.
OWN = ("ProximalUNet", "ProximalTransformer")
EXPECTED = (
    "expected a model folder (unet/ or transformer/, text_encoder/, tokenizer/, as diffusers lays them out) "
    "or a run directory that holds one as models/final or models/pretrained"
)


def find_model(path: str | os.PathLike) -> Path:
    """The model folder that ``path`` is, or that the run directory ``path`` holds: models/final, else pretrained.

    Raises FileNotFoundError that names the folder and says what was expected there.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: {EXPECTED}")
    for folder in (path, RunDirectory(path).final, RunDirectory(path).pretrained):
        if any((folder / part).is_dir() for part in NETWORKS):
            return folder
    raise FileNotFoundError(f"{path} holds no model: {EXPECTED}")


def published_shapes(folder: str | os.PathLike) -> Path | None:
    """The config.json files, without weights, of the published checkpoint whose name ``folder`` has; None for others.

    With them a run can be planned before its checkpoint is downloaded.
    """
    shapes = Path(__file__).parent / "published" / Path(folder).name
    return shapes if shapes.is_dir() else None


def network_config(folder: str | os.PathLike) -> tuple[str, dict]:
    """('unet' or 'transformer', its config.json). Raises FileNotFoundError or ValueError naming the file."""
    folder = find_model(folder)
    part = next(part for part in NETWORKS if (folder / part).is_dir())
    return part, read_json(folder / part / "config.json")


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


def read_settings(folder: Path) -> dict:
    """sampler.json of a model folder; {} where there is none, as in a folder of diffusers' own."""
    file = folder / SETTINGS
    if file.is_file():
        values = read_json(file)
        for key in ("schedule", "sampler"):
            if not isinstance(values.get(key), dict):
                raise ValueError(f"{file} is not readable: no {key!r} in it")
        return values
    if network_config(folder)[1].get("_class_name") in OWN:
        raise FileNotFoundError(f"{file} is missing: {EXPECTED}")
    return {}


def parts_folder(config: Config) -> Path | None:
    """The folder with autoencoder and text encoders that a config brings along; None: pixels, built-in text."""
    named = config.model.init or config.model.encoders
    if named is None:
        return None
    return find_model(named) if config.model.init else Path(named)


def latent_space(config: Config) -> tuple[int, int]:
    """(channels, H = W) of a sample: the autoencoder's latents, or pixels."""
    folder = parts_folder(config)
    if folder is None or not (folder / "vae").is_dir():
        return 3, config.data.size
    channels, factor = latent_facts(folder)
    if config.data.size % factor:
        raise ValueError(
            f"data.size {config.data.size} is not a multiple of {factor}, the autoencoder's factor ({folder})"
        )
    return channels, config.data.size // factor
