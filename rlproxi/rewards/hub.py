"""Where a scorer's files are: a local path, or downloaded from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

#: What a model folder needs besides its weights.
_SMALL_FILES = ("*.json", "*.txt")


def model_folder(name: str, key: str, weights: bool = True) -> Path:
    """The folder of a transformers model or tokenizer: ``name`` itself, or the hub repository of that id.

    Args:
        name: a folder, or a hub id.
        key: the reward's parameter, for messages.
        weights: whether model weights are wanted; safetensors where the repository has them, else .bin.
    Raises FileNotFoundError where neither the folder nor the repository can be had.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):  # a path: asking the hub would only hide the slip
        raise FileNotFoundError(f"{key} {name!r} is no folder on this machine")
    from huggingface_hub import snapshot_download

    try:
        wanted = [*_SMALL_FILES, "model*.safetensors"] if weights else [*_SMALL_FILES]
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client has no common ancestor for what can go wrong on a network
        raise _missing(name, key, error) from None
    return folder


def checkpoint_file(path: str | None, repository: str, name: str, key: str = "checkpoint") -> Path:
    """A checkpoint: the file at ``path``, or, where that is None, file ``name`` of a hub repository.

    Raises FileNotFoundError where it is neither here nor can be downloaded.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{key} {path!r} is no file; leave it out to download {name} of {repository}")
        return Path(path)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # as above
        raise _missing(f"{repository}/{name}", key, error) from None


def weight_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that hold weights, as from_pretrained would choose: safetensors before .bin."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def reason(error: Exception) -> str:
    """The type of an error and the first line of what it says: libraries' messages go on for pages."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _missing(name: str, key: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{key} {name!r} is not on this machine and cannot be downloaded ({reason(error)}); "
        f"download it elsewhere and set {key} to its path"
    )
