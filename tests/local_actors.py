"""Actor classes in the process of the test: their own code, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from actors.scribe import Scribe


class Local:
    """An object as an actor's handle: ``handle.method.remote(...)`` runs at once."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=getattr(self.thing, name))


def undecorated(actor_class: Any) -> type:
    """The class under ``ray.remote``."""
    return actor_class.__ray_metadata__.modified_class


def local_scribe(folder) -> Local:
    """A scribe that writes the run log of ``folder``; ``.thing`` is the scribe itself."""
    return Local(undecorated(Scribe)(str(folder)))
