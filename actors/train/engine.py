"""DeepSpeed behind four methods (update, gathered, save, load), the same for every algorithm."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlproxi.algorithms.anchor import AnchoredAdamW
from rlproxi.algorithms.guards.updates import not_finite
from rlproxi.models.loading import trainable
from rlproxi.models.precision import autocast

from .engine_state import EngineState


def _quiet_deepspeed(device: torch.device) -> None:
    """Sets what DeepSpeed reads at import, and spares the CPU op that it would compile for half a minute."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    if device.type == "cpu":
        # Half private; without it gloo alone does the reductions all the same, after a compilation.
        with contextlib.suppress(AttributeError, KeyError):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _autocast_inside(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Makes the module enter autocast by itself: on GPUs DeepSpeed switches a caller's off."""
    plain = module.forward

    def forward(*args, **kwargs):
        with autocast(dtype, device):
            return plain(*args, **kwargs)

    module.forward = forward


@dataclass
class Updated:
    """The outcome of an update.

    metrics: over all ranks; ``grad_norm`` is the norm before clipping. skipped: why the update was not made, or None.
    """

    metrics: dict[str, float]
    skipped: str | None


class Engine:
    """A module under DeepSpeed: float32 masters, AdamW, ZeRO ``stage``.

    Must be made inside an initialised ``torch.distributed`` world (Ray Train makes it).

    Args:
        module: what is trained; called through ``engine.module``.
        accumulation: how many losses one update is made of, on each rank.
        dtype: the arithmetic of the forward; bfloat16 by autocast.
        anchor: weight of the squared distance to the first weights, see ``AnchoredAdamW``.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        stage: int,
        accumulation: int,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        dtype: torch.dtype = torch.float32,
        anchor: float = 0.0,
    ):
        _quiet_deepspeed(device)
        import deepspeed

        self.device, self.stage, self.accumulation = device, stage, accumulation
        weights = list(trainable(module).values())
        # ``update`` sets the learning rate.
        options = {"lr": 0.0, "betas": betas, "weight_decay": weight_decay, "fused": True}
        self.adamw = AnchoredAdamW(weights, anchor, **options)
        _autocast_inside(module, dtype, device)
        # Its bucket for reductions is 2 GB by default, however little is trained.
        bucket = min(500_000_000, sum(p.numel() for p in weights))
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # only its own throughput figures depend on it
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": grad_clip,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self.adamw, config=settings, dist_init_required=False
        )

    def update(
        self,
        losses: Iterable[tuple[Tensor, dict[str, float]]],
        lr: float,
        refuse: Callable[[dict[str, float]], str | None] = lambda metrics: None,
    ) -> Updated:
        """One optimizer step on ``accumulation`` losses: a (scalar loss, metrics) for each backward, made lazily.

        It is skipped on every rank, and changes nothing, where a loss or its gradient is not finite on any rank, or
        where ``refuse`` returns a reason for the metrics over all ranks.

        Raises RuntimeError where there are more or fewer losses than ``accumulation``, FloatingPointError where
        DeepSpeed has put a gradient that is not finite into the weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seen: dict[str, list[float]] = {}
        broken = torch.zeros((), dtype=torch.int64, device=self.device)
        norm: float | None = None
        reason: str | None = None
        means: dict[str, float] = {}
        count = 0
        for loss, metrics in losses:
            count += 1
            self.module.backward(loss)
            broken += ~torch.isfinite(loss.detach()).all()
            for key, value in metrics.items():
                seen.setdefault(key, []).append(value)
            if count == self.accumulation:
                norm = self._norm() if self.stage == 0 else None
                means, total = self._across_ranks(seen, broken)
                reason = not_finite(norm, total) or refuse(means)
            self.adamw.vetoed = reason is not None
            self.module.step()
        if count != self.accumulation:
            raise RuntimeError(f"an update took {count} losses where the engine accumulates {self.accumulation}")
        if norm is None:
            norm = float(self.module.get_global_grad_norm())
        if reason is None and not math.isfinite(norm):
            # ZeRO knows the norm only inside the step, and gives a step of NaN or Inf up by itself.
            if self.module.was_step_applied():
                raise FloatingPointError(
                    f"{not_finite(norm, 0)}, and this version of DeepSpeed has put it into the weights: "
                    "upgrade deepspeed, and resume the run from its last checkpoint"
                )
            reason = not_finite(norm, 0)
        return Updated({**means, "grad_norm": norm, "lr": lr}, reason)

    def _across_ranks(self, values: dict[str, list[float]], broken: Tensor) -> tuple[dict[str, float], int]:
        """The metrics over losses and ranks, and the sum of ``broken``; the same on every rank.

        A metric is the mean of its finite values, or, where its name says max, the maximum (infinite where one was not
        finite).
        """
        means, maxima = ([key for key in sorted(values) if ("max" in key) is largest] for largest in (False, True))
        finite = {key: [v for v in values[key] if math.isfinite(v)] for key in values}
        sums = [x for key in means for x in (sum(finite[key]), len(finite[key]))]
        total = torch.tensor([*sums, float(broken)], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        largest = [max(values[key]) if len(finite[key]) == len(values[key]) else math.inf for key in maxima]
        worst = torch.tensor(largest, dtype=torch.float64, device=self.device)
        if maxima:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        *sums, lost = total.tolist()
        found = {key: sums[2 * i] / sums[2 * i + 1] if sums[2 * i + 1] else math.nan for i, key in enumerate(means)}
        return {**found, **dict(zip(maxima, worst.tolist(), strict=True))}, int(lost)

    def _norm(self) -> float:
        grads = [p.grad for p in self.module.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    @contextlib.contextmanager
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        """name -> full float32 parameter of what is trained, on every rank; a collective at ZeRO 3."""
        weights = trainable(self.module.module)
        if self.stage < 3:
            yield weights
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(weights.values())), torch.no_grad():
            yield weights

    def save(self, folder: Path) -> list[Path]:
        """See ``EngineState.save``; a collective."""
        return EngineState(self.module, self.stage, self.device).save(folder)

    def load(self, folder: Path) -> None:
        """See ``EngineState.load``; a collective."""
        EngineState(self.module, self.stage, self.device).load(folder)

    def close(self) -> None:
        """Frees the engine; ZeRO 3 can abort the process at exit if it is still alive then."""
        with contextlib.suppress(Exception):
            self.module.destroy()
        del self.module, self.optimizer, self.adamw
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
