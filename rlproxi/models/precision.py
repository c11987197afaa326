"""Which arithmetic the network computes in; everything around it stays float32."""

from __future__ import annotations

import platform

import torch


def has_fast_bfloat16(device: str | torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: GPUs from Ampere on, CPUs with instructions for its products.

    oneDNN calls bfloat16 supported on every CPU with AVX-512. Without AVX512-BF16 or AMX it emulates it there, two to
    four times slower than float32.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # Arm: oneDNN asks for the instructions


def compute_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """Resolves ``model.precision`` (auto, float32, bfloat16) on a device."""
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def cache_keeps_gradients() -> bool:
    """Whether weights whose rounded copy a forward without gradients cached still get gradients from the next one.

    With torch of before 2026 they do not (PyTorch issue 112583). Draws no random numbers.
    """
    x, weight = torch.zeros(1, 1, device="cpu"), torch.zeros(1, 1, device="cpu", requires_grad=True)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        with torch.no_grad():
            torch.mm(x, weight)
        return torch.mm(x, weight).requires_grad


CACHES = cache_keeps_gradients()


def autocast(dtype: torch.dtype, device: str | torch.device) -> torch.autocast:
    """The context of a forward: autocast to bfloat16, or nothing for float32."""
    return torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16, cache_enabled=CACHES
    )
