"""DeepSpeed behind four verbs (update, weights, save, load), the same for every algorithm."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from pathlib import Path
from typing import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlproxi.algorithms.anchor import AnchoredAdamW
from rlproxi.models.loading import trainable
from rlproxi.models.precision import autocast

from .engine_state import EngineState


def _quiet_deepspeed(device: torch.device) -> None:
    """Environment that DeepSpeed reads at import, and the CPU op it would compile for half a minute."""
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
    """Makes the module enter autocast by itself: DeepSpeed switches a caller's off on GPUs, so that the learner would
    not compute what the rollout did."""
    plain = module.forward

    def forward(*args, **kwargs):
        with autocast(dtype, device):
            return plain(*args, **kwargs)

    module.forward = forward


class Engine:
    """A module under DeepSpeed: float32 masters, AdamW, ZeRO ``stage``.

    Must be made inside an initialised ``torch.distributed`` world (Ray Train makes it).

    Args:
        module: what is trained; called through ``engine.module``.
        micro_batch_size: samples of one forward on one rank (bookkeeping for DeepSpeed).
        accumulation: how many losses one update is made of, on each rank.
        dtype: the arithmetic of the forward; bfloat16 by autocast.
        anchor: weight of the squared distance to the first weights, see ``AnchoredAdamW``.
    """

    def __init__(self, module: nn.Module, device: torch.device, stage: int, micro_batch_size: int,
                 accumulation: int, lr: float, betas: tuple[float, float], weight_decay: float, grad_clip: float,
                 dtype: torch.dtype = torch.float32, anchor: float = 0.0):
        _quiet_deepspeed(device)
        import deepspeed

        self.device = device
        self.stage = stage
        self.accumulation = accumulation
        weights = list(trainable(module).values())
        optimizer = AnchoredAdamW(weights, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, anchor=anchor)
        _autocast_inside(module, dtype, device)
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": grad_clip,
            # Its bucket for reductions is 2 GB unless told otherwise, however little is trained.
            "zero_optimization": {"stage": stage, "reduce_bucket_size": min(500_000_000, sum(p.numel() for p in weights))},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False)

    def update(self, losses: Iterable[tuple[Tensor, dict[str, float]]], lr: float) -> dict[str, float]:
        """One optimizer step on ``accumulation`` losses; returns their metrics over all ranks, and
        ``grad_norm``, before clipping. Raises FloatingPointError, on every rank, where one of them is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, list[float]] = {}
        norm = None
        count = 0
        for loss, metrics in losses:
            count += 1
            self.module.backward(loss)
            if count == self.accumulation and self.stage == 0:
                norm = self._norm()
            self.module.step()
            for key, value in metrics.items():
                sums.setdefault(key, []).append(value)
        if count != self.accumulation:
            raise RuntimeError(f"an update took {count} losses where the engine accumulates {self.accumulation}")
        if norm is None:
            norm = float(self.module.get_global_grad_norm())
        means = self._across_ranks(sums)
        if not (math.isfinite(norm) and all(math.isfinite(v) for v in means.values())):
            raise FloatingPointError(f"loss or gradient is not finite (grad_norm {norm}, {means}): lower the learning "
                                     "rate, or set model.precision=float32 to see whether rounding is the cause")
        return {**means, "grad_norm": norm, "lr": lr}

    def _across_ranks(self, values: dict[str, list[float]]) -> dict[str, float]:
        """The mean of each metric over losses and ranks; the maximum where its name says max."""
        result = {}
        for key in sorted(values):
            largest = "max" in key
            own = max(values[key]) if largest else sum(values[key]) / len(values[key]) / dist.get_world_size()
            total = torch.tensor(own, dtype=torch.float64, device=self.device)
            dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
            result[key] = total.item()
        return result

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
        """Weights and optimizer of what is trained into ``folder``; a collective. Returns the files that this rank wrote.

        Raises OSError or SafetensorError on the ranks that could not write.
        """
        return EngineState(self.module, self.stage, self.device).save(folder)

    def load(self, folder: Path) -> None:
        """The inverse of ``save``; a collective. The number of ranks and the ZeRO stage may be others than those that saved.

        Raises FileNotFoundError where ``folder`` holds no state, ValueError where it is of another network.
        """
        EngineState(self.module, self.stage, self.device).load(folder)

    def close(self) -> None:
        """Frees the engine; ZeRO 3 can abort the process at exit if it is still alive then."""
        with contextlib.suppress(Exception):
            self.module.destroy()
        self.module = self.optimizer = None
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
