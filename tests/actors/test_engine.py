"""DeepSpeed around a module, in one process: the arithmetic of its forward."""

import pytest
import torch
from torch import nn

from actors.engine import Engine


def outputs(engine: Engine, x: torch.Tensor) -> torch.dtype:
    """The dtype that the first layer computes in."""
    seen = []
    hook = engine.module.module[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    engine.module(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_engine_computes_in_the_dtype_it_is_told_whatever_deepspeed_thinks_of_autocast(process_group, dtype):
    engine = Engine(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.device("cpu"), 0, 2, 1, 1e-3, (0.9, 0.99), 0.0, 1.0,
                    dtype)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert outputs(engine, x) is dtype
        # On a GPU DeepSpeed sees the caller's autocast, which its own settings do not ask for, and switches it off.
        torch.set_autocast_enabled("cuda", True)
        try:
            assert outputs(engine, x) is dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
    engine.close()
