import pytest
import torch
from ray.exceptions import RayTaskError

from rlproxi.errors import is_out_of_memory


def from_an_actor(cause: Exception, source: str = "") -> Exception:
    """What ``await actor.method.remote()`` raises; its words are the actor's traceback."""
    error = RayTaskError("sample", f"Traceback\n  {source}\n{cause}", cause, "actor", 1, "127.0.0.1")
    return error.as_instanceof_cause()


def caused_by(cause: Exception) -> Exception:
    try:
        raise ValueError("the micro-batch failed") from cause
    except ValueError as error:
        return error


def cpu_error() -> Exception:
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.cuda.OutOfMemoryError("no words"),
        MemoryError(),
        cpu_error(),
        RuntimeError("not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_a_lack_of_memory_is_known_however_it_arrives(error):
    wrapped = RayTaskError("f", "Traceback", error, "actor", 1, "127.0.0.1")
    for each in (error, wrapped, from_an_actor(error), caused_by(error), caused_by(wrapped), from_an_actor(wrapped)):
        assert is_out_of_memory(each), repr(each)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_faults_are_not(error):
    assert not is_out_of_memory(error)
    if isinstance(error, Exception):
        assert not is_out_of_memory(caused_by(error)) and not is_out_of_memory(from_an_actor(error))


def test_a_line_of_source_that_speaks_of_memory_is_not_the_error():
    assert not is_out_of_memory(from_an_actor(RuntimeError("shapes"), 'raise RuntimeError("out of memory")'))


def test_causes_in_a_circle_come_to_an_end():
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
