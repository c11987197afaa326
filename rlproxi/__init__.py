"""Reward fine-tuning of text-to-image models around proximal diffusion.

``import rlproxi`` is light: the names below are imported from ``rlproxi.api`` when they are first used.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["TextToImage", "export", "fine_tune", "load_config", "score_images"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("rlproxi.api"), name)
    raise AttributeError(f"module 'rlproxi' has no attribute {name!r}; it gives {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
