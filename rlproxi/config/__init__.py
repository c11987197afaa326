"""The typed sections of a run's config, the YAML reader, overrides, and the generated reference."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import Config, build_config, dump_config, load_config

__all__ = ["Config", "build_config", "dump_config", "load_config"]


def __getattr__(name: str) -> Any:
    # On first use: the live page reads YAML with this package and must not import torch.
    if name in __all__:
        from . import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
