"""The live page's reader of run directories. ``LiveRun`` follows one of them, ``hub.Hub`` several."""

from .run import LiveRun

__all__ = ["LiveRun"]
