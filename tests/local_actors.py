"""Actor classes in the process of the test: their own code, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from actors.scribe import Scribe


class Done:
    """What a call without an answer returns, to be waited for."""

    def __await__(self):
        return iter(())


class Local:
    """An object as an actor's handle: ``handle.method.remote(...)`` runs at once."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __getattr__(self, name: str):
        method = getattr(self.thing, name)

        def remote(*arguments: Any, **more: Any) -> Any:
            answer = method(*arguments, **more)
            return Done() if answer is None else answer
        return SimpleNamespace(remote=remote)


def undecorated(actor_class: Any) -> type:
    """The class under ``ray.remote``."""
    return actor_class.__ray_metadata__.modified_class


def local_scribe(folder) -> Local:
    """A scribe that writes the run log of ``folder``; ``.thing`` is the scribe itself."""
    return Local(undecorated(Scribe)(str(folder)))
