"""DeepSpeed around a module, in one process: the arithmetic of its forward."""

import pytest
import torch
from torch import nn

from actors.train.engine import Engine


def outputs(engine: Engine, x: torch.Tensor) -> torch.dtype:
    """The dtype that the first layer computes in."""
    seen = []
    hook = engine.module.module[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    engine.module(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_engine_computes_in_the_dtype_it_is_told_whatever_deepspeed_thinks_of_autocast(process_group, dtype):
    engine = Engine(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)),
        torch.device("cpu"),
        0,
        1,
        (0.9, 0.99),
        0.0,
        1.0,
        dtype,
    )
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


def small(stage: int, accumulation: int = 2) -> Engine:
    torch.manual_seed(0)
    return Engine(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        torch.device("cpu"),
        stage,
        accumulation,
        (0.9, 0.99),
        0.0,
        1.0,
        anchor=0.1,
    )


def losses(engine: Engine, number: int, spoil=None):
    """Two losses of an update; ``spoil`` (loss -> loss) is done to the second."""
    for half in range(2):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2 * number + half))
        loss = engine.module(x).square().mean()
        yield spoil(loss) if spoil and half else loss, {"loss": loss.item()}


def state(engine: Engine) -> torch.Tensor:
    """Weights, moments and step counts."""
    with engine.gathered() as weights:
        parts = [w.detach().clone().reshape(-1) for w in weights.values()]
    kept = [v.detach().float().reshape(-1).clone() for s in engine.adamw.state.values() for v in s.values()]
    return torch.cat([*parts, *kept])


class InfiniteGradient(torch.autograd.Function):
    """A loss that is a number with a gradient that is none."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_that_is_refused_changes_nothing_and_the_next_is_one_like_any_other(stage, process_group):
    reference = small(stage)
    for number in range(4):
        assert reference.update(losses(reference, number), 0.05).skipped is None
    expected = state(reference)
    reference.close()
    engine = small(stage)
    spoils = {
        "NaN": lambda loss: loss * float("nan"),
        "Inf": lambda loss: loss + float("inf"),
        "gradient": InfiniteGradient.apply,
    }
    for number in range(4):
        if number in (0, 2):  # before the optimizer has a state, and after
            before = state(engine)
            for name, spoil in spoils.items():
                done = engine.update(losses(engine, 90, spoil), 0.05)
                words = "its gradient is NaN or Inf" if name == "gradient" else "1 of its losses are NaN or Inf"
                assert done.skipped.startswith(words), name
            refused = engine.update(losses(engine, 91), 0.05, lambda metrics: f"the loss is {metrics['loss']:.1f}")
            assert refused.skipped.startswith("the loss is ") and refused.metrics["grad_norm"] > 0
            assert torch.equal(state(engine), before)
        assert engine.update(losses(engine, number), 0.05).skipped is None
    assert torch.equal(state(engine), expected)
    assert engine.module.micro_steps % 2 == 0 and engine.module.global_steps == 12
    engine.close()


def test_a_step_that_deepspeed_made_of_nan_ends_the_run_in_plain_words(process_group, monkeypatch):
    engine = small(1)
    monkeypatch.setattr(engine.module, "was_step_applied", lambda: True)  # as versions did that look at float16 alone
    with pytest.raises(FloatingPointError, match="has put it into the weights: upgrade deepspeed"):
        engine.update(losses(engine, 0, InfiniteGradient.apply), 0.05)
    engine.close()


def test_metrics_over_losses_leave_out_what_is_missing_and_a_maximum_does_not(process_group):
    engine = small(0)

    def made_with(*metrics):
        update = engine.update(((loss, of) for (loss, _), of in zip(losses(engine, 0), metrics, strict=True)), 0.05)
        return update.metrics

    nan = float("nan")
    metrics = made_with({"a": 1.0, "max": 3.0, "gone": nan}, {"a": nan, "max": 2.0})
    assert metrics["a"] == 1.0 and metrics["max"] == 3.0 and metrics["gone"] != metrics["gone"]
    assert made_with({"max": 1.0}, {"max": nan})["max"] == float("inf")
    engine.close()
