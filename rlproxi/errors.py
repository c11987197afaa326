"""The errors that end a run with a sentence for the user, and how a lack of memory is told from every other fault."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class ConfigError(ValueError):
    """A config that cannot be run: the message names the key, the value and the remedy."""


class RunStopped(RuntimeError):
    """The run ended itself, with a reason for the user."""


#: What torch says in a plain RuntimeError: its CPU allocators (Linux, Windows), other devices and cuBLAS.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, is a lack of host or device memory.

    Looks through ``__cause__`` and through ``cause``, where Ray keeps what an actor raised.
    """
    return any(_itself(each) for each in _with_causes(error))


def first_line(error: BaseException) -> str:
    """The error's own words, without the statistics that torch adds."""
    return str(error).strip().partition("\n")[0].partition(" See documentation")[0]


def last_error_line(text: str) -> str:
    """The last line that names an error, else the last line: Serve and Ray put their tracebacks around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ([line for line in lines if "Error: " in line] or lines or [""])[-1]


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [getattr(each, "cause", None), each.__cause__]


def _itself(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The words of an error that wraps another are a whole traceback, lines of source included.
    wraps = isinstance(getattr(error, "cause", None), BaseException)
    return isinstance(error, RuntimeError) and not wraps and any(words in str(error).lower() for words in _WORDS)
