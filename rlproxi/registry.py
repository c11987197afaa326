"""One registry for whatever registers itself by name: algorithms, scorers."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Named = TypeVar("Named")


class Registry(Generic[T]):
    """Objects of one kind by name. The modules of ``package`` are imported at the first look-up, and register theirs.

    Args:
        kind: what it holds, for messages, such as 'algorithm'.
        package: the full name of the package to discover. Packages inside it are left out.
        base: the class that each object must be a subclass of, as ``package.module:Class``; None: anything goes.
    """

    def __init__(self, kind: str, package: str, base: str | None = None):
        self.kind, self.package, self.base = kind, package, base
        self._found: dict[str, T] = {}
        self._default: str | None = None
        self._discovered = False

    def register(self, *names: str, default: bool = False) -> Callable[[Named], Named]:
        """Return a decorator that stores a class under these names; ``default``: the first is used where none is given.

        The decorator raises ValueError where another object has the name.
        """

        def keep(thing: Named) -> Named:
            for name in names:  # mypy does not know that the decorated class is a T
                if self._found.setdefault(name, thing) is not thing:  # type: ignore[arg-type, comparison-overlap]
                    raise ValueError(f"{self.kind} {name!r} is registered twice: choose another name")
            if default:
                self._default = names[0]
            return thing

        return keep

    def names(self) -> list[str]:
        """The registered names, sorted."""
        self._discover()
        return sorted(self._found)

    @property
    def default(self) -> str:
        """The name to use where none is given. Raises ValueError where no object was registered as the default."""
        self._discover()
        if self._default is None:
            raise ValueError(f"no {self.kind} is registered as the default")
        return self._default

    def get(self, name: str) -> T:
        """The object of a registered name, or the one at ``package.module:Class``.

        Raises ValueError for a name that is not known, and for a class that cannot be imported or is of another kind.
        """
        if ":" in name:
            return self._imported(name)
        self._discover()
        if name not in self._found:
            close = difflib.get_close_matches(name, self._found, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{self.kind} {name!r} is unknown: {meant}choose one of {', '.join(self.names())}, or name a class of "
                "your own as package.module:Class"
            )
        return self._found[name]

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # before the imports, because a module may look up names while it is imported
        try:
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                if not module.ispkg:
                    importlib.import_module(f"{self.package}.{module.name}")
        except BaseException:
            self._discovered = False
            raise

    def _imported(self, name: str) -> T:
        thing = imported(self.kind, name)
        if self.base is not None and not (isinstance(thing, type) and issubclass(thing, imported("class", self.base))):
            raise ValueError(f"{self.kind} {name!r} is not a subclass of {self.base.replace(':', '.')}")
        return thing


def imported(kind: str, path: str) -> Any:
    """The object at ``package.module:name``. Raises ValueError, which begins with ``kind`` and the path."""
    module, _, attribute = path.partition(":")
    if not (module and attribute):
        raise ValueError(f"{kind} {path!r} is not of the form package.module:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module raises while it is imported
        fault = f"{type(error).__name__}: {error}; it must be installed or on PYTHONPATH"
        raise ValueError(f"{kind} {path!r} cannot be imported: {fault}") from None
