"""The peak memory of a piece of torch code that runs without memory: of every allocation and release, on ghosts.

Ghosts are tensors with shapes, dtypes, storages and an autograd graph, but no data. A step that runs on them
allocates, saves for its backward and frees exactly what it would, so its peak is counted and not guessed. What happens
inside one kernel (its workspace) is not seen.

A ghost is what torch's FakeTensor is, without the caution and the caches: 7 times faster, and a plan takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: CUDA's allocator hands out multiples of this.
CUDA_BLOCK = 512

#: What autocast computes in float32 on CUDA and leaves alone on the CPU (PyTorch, "Autocast Op Reference"): inputs are
#: cast, or only the result is made float32.
_FLOAT32_ON_CUDA = (
    *("layer_norm", "group_norm", "rms_norm", "exp", "expm1", "log", "log1p"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "rsqrt", "softplus"),
)
_FLOAT32_RESULT_ON_CUDA = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum")


class Ghost(Tensor):
    """A CPU tensor to autograd, autocast and whoever asks, a meta tensor ``on_meta`` to the kernels."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @staticmethod
    def __new__(cls, inner: Tensor) -> Ghost:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=torch.device("cpu"),
            storage_offset=inner.storage_offset(),
        )

    def __init__(self, inner: Tensor):
        self.on_meta = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _haunt(func, args, kwargs or {})


class _Ghosts(TorchDispatchMode):
    """Inside, new tensors are ghosts; what was computed from real ones alone stays real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _makes(func) or any(issubclass(x, Ghost) for x in types):
            return _haunt(func, args, kwargs)
        return func(*args, **kwargs)


def _haunt(func, args, kwargs):
    if func is torch.ops.aten._local_scalar_dense.default:
        return 1.0  # .item(): there is no value, and a metric's value changes no size
    inner = {key: _inner(value) if key != "generator" else None for key, value in kwargs.items()}
    if "device" in inner or _makes(func):
        inner["device"] = torch.device("meta")
    result = func(*map(_inner, args), **inner)
    if _in_place(func):
        return args[0]
    if isinstance(result, (list, tuple)):
        return type(result)(Ghost(x) if isinstance(x, Tensor) else x for x in result)
    return Ghost(result) if isinstance(result, Tensor) else result


def _inner(value: Any) -> Any:
    if isinstance(value, Ghost):
        return value.on_meta
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [_inner(x) for x in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def _makes(func) -> bool:
    """Whether an operator makes a tensor of none, as zeros does."""
    arguments = func._schema.arguments
    return any(x.name == "device" for x in arguments) and not any("Tensor" in str(x.type) for x in arguments)


@functools.cache
def _in_place(func) -> bool:
    return any(x.alias_info and x.alias_info.is_write for x in func._schema.returns)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside it and still live.

    Storages from outside (weights, inputs, existing gradients) are not counted.

    Attributes:
        now, peak: bytes. block: what each allocation is rounded up to.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.now = self.peak = 0
        self.block = block
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if _allocates(func):
            for value in result if isinstance(result, (list, tuple)) else (result,):
                if isinstance(value, Ghost):
                    self._made(value.on_meta.untyped_storage())
                elif isinstance(value, Tensor) and value.device.type != "meta":
                    self._made(value.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            size = self._live[key] = -(-storage.nbytes() // self.block) * self.block
            weakref.finalize(storage, self._gone, key).atexit = False
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)


@functools.cache
def _allocates(func) -> bool:
    """Whether an operator's results are new tensors, not views of its inputs or the inputs themselves."""
    return not any(x.alias_info for x in func._schema.returns) and func is not torch.ops.aten._unsafe_view.default


@contextlib.contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Makes autocast on ghosts, CPU tensors to it, do what it does on CUDA, where more is computed in float32.

    Ghosts on CUDA would need a build of torch for CUDA, and a plan should read the same on a login node.
    """
    with torch.library._scoped_library("aten", "IMPL", "AutocastCPU") as library:
        for name in _FLOAT32_ON_CUDA:
            library.impl(name, _in_float32(name))
        for name in _FLOAT32_RESULT_ON_CUDA:
            library.impl(name, _to_float32(name))
        yield


def _operator(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_float32(name: str) -> Callable:
    operator = _operator(name)

    def kernel(*args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return operator(*map(_float32, args), **{key: _float32(value) for key, value in kwargs.items()})

    return kernel


def _to_float32(name: str) -> Callable:
    operator = _operator(name)

    def kernel(x, *args, dtype=None, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return operator(x, *args, dtype=dtype or (torch.float32 if x.is_floating_point() else None), **kwargs)

    return kernel


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


def no_memory() -> TorchDispatchMode:
    """A context inside which tensors have no data: networks run in no time and no memory."""
    return _Ghosts()


def without_data(module: nn.Module) -> nn.Module:
    """``module``, built on the meta device, with ghosts in the place of its tensors."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is not None and id(value) not in made and not isinstance(value, Ghost):
                    ghost = Ghost(value.detach().to("meta"))
                    whole = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(ghost, value.requires_grad) if whole else ghost
                if value is not None:
                    store[name] = made.get(id(value), value)  # type: ignore[assignment]  # a parameter for a parameter
    return module


@contextlib.contextmanager
def traced(device: str) -> Iterator[LiveBytes]:
    """Inside, allocations are counted as ``device`` ('cpu' or 'cuda') makes them. Enter ``no_memory`` first."""
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(_cuda_autocast())
        yield stack.enter_context(LiveBytes(CUDA_BLOCK if device == "cuda" else 1))
