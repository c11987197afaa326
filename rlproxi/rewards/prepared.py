"""The small networks that the stage ``prepare`` trains for the rewards of the embedded portraits, and their files."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import ClassVar, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

_Network = TypeVar("_Network", bound="PreparedNetwork")


class PreparedNetwork(nn.Module, ABC):
    """A network of pixels that is saved as one safetensors file, with its sizes in it.

    It needs nothing but torch, so a reward replica starts quickly.

    Args:
        sizes: the subclass's constructor arguments, integers.
    """

    #: What messages call it.
    title: ClassVar[str]

    def __init__(self, **sizes: int):
        super().__init__()
        self.sizes = sizes

    def save(self, file: str | Path) -> None:
        """Writes the weights to ``file`` (.safetensors); its folder is made."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, file, metadata={key: str(value) for key, value in self.sizes.items()})

    @staticmethod
    def sizes_in(file: str | Path) -> dict[str, int] | None:
        """The sizes that a saved file carries; None where it cannot be read."""
        try:
            with safe_open(file, framework="pt") as stored:
                return {key: int(value) for key, value in stored.metadata().items()}
        except (OSError, SafetensorError, AttributeError, ValueError):
            return None

    @classmethod
    def load(cls: type[_Network], file: str | Path) -> _Network:
        """Raises FileNotFoundError, or ValueError naming a file that is damaged or holds something else."""
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"{cls.title} {str(file)!r} is missing: the stage 'prepare' makes it, or name one "
                "with the reward's params.path"
            )
        try:
            with safe_open(file, framework="pt") as stored:
                model = cls(**{key: int(value) for key, value in stored.metadata().items()})
                names = stored.keys()  # safetensors has no iterator
                model.load_state_dict({name: stored.get_tensor(name) for name in names})
        except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a usable {cls.title}: {error}") from None
        return model.eval()
