"""A network in ONNX's file format without the onnx package: convolutions whose weights are told, for OpenCV to read.

The format is protocol buffers (onnx.proto3); the few messages needed are written out field by field.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    """An integer as varint, anything else with its length before it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, array: np.ndarray) -> bytes:
    kind = {"float32": 1, "int64": 7}[array.dtype.name]
    return b"".join(_field(1, d) for d in array.shape) + _field(2, kind) + _field(8, name) + _field(9, array.tobytes())


def _node(kind: str, inputs: list[str], output: str, **attributes: list[int]) -> bytes:
    named = [_field(1, key) + b"".join(_field(8, v) for v in values) + _field(20, 7)
             for key, values in attributes.items()]
    return (b"".join(_field(1, i) for i in inputs) + _field(2, output) + _field(3, f"make_{output}") + _field(4, kind)
            + b"".join(_field(5, a) for a in named))


def _value(name: str, shape: list[int | str]) -> bytes:
    dims = b"".join(_field(1, _field(1 if isinstance(d, int) else 2, d)) for d in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def write_convolutions(file: Path, size: int, outputs: dict[str, tuple[np.ndarray, np.ndarray, int]]) -> Path:
    """Input [1, 3, size, size]; each output, a convolution (weight [C, 3, s, s], bias [C], stride s) as [1, H W, C]."""
    nodes, tensors, results = [], [], []
    for name, (weight, bias, stride) in outputs.items():
        channels = len(bias)
        tensors += [_tensor(f"{name}_w", weight.astype(np.float32)), _tensor(f"{name}_b", bias.astype(np.float32)),
                    _tensor(f"{name}_s", np.array([1, -1, channels], np.int64))]
        nodes += [_node("Conv", ["input", f"{name}_w", f"{name}_b"], f"{name}_c", kernel_shape=[stride, stride],
                        strides=[stride, stride]),
                  _node("Transpose", [f"{name}_c"], f"{name}_t", perm=[0, 2, 3, 1]),
                  _node("Reshape", [f"{name}_t", f"{name}_s"], name)]
        results.append(_value(name, [1, (size // stride) ** 2, channels]))
    graph = (b"".join(_field(1, n) for n in nodes) + _field(2, "graph") + b"".join(_field(5, t) for t in tensors)
             + _field(11, _value("input", [1, 3, size, size])) + b"".join(_field(12, r) for r in results))
    file.write_bytes(_field(1, 6) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 11)))
    return file
