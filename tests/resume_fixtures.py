"""The real training loop of a rank on two small networks: made in a moment, killed at any point, without Ray."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors import checkpoints, rollback
from actors.engine import Engine
from actors.rank import Rank
from local_actors import local_scribe
from rlproxi.algorithms.base import Update
from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.update_guard import UpdateGuard
from rlproxi.config import Config, build_config
from rlproxi.telemetry.timeline import Diary

MICRO_BATCHES = 4  # of one update, over all ranks


class Killed(BaseException):
    """What ends a run from outside: no handler of the program's may stop it."""


def network(kind: str, seed: int = 0) -> nn.Module:
    """Layers of odd sizes: whole, with adapters on a frozen base, or with running statistics."""
    torch.manual_seed(0 if kind == "lora" else seed)  # a frozen base is that of the starting model, in no checkpoint
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)]
    if kind == "buffers":
        return nn.Sequential(layers[0], nn.BatchNorm1d(5), *layers[1:])
    net = nn.Sequential(*layers)
    if kind == "lora":
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), net)
    return net


def engine_of(kind: str, stage: int, seed: int = 0, anchor: float = 0.1) -> Engine:
    return Engine(network(kind, seed), torch.device("cpu"), stage, 2, MICRO_BATCHES // dist.get_world_size(), 0.05, (0.9, 0.99),
                  0.01, 1.0, anchor=anchor)


def losses(engine: Engine, step: int, noise: bool = False):
    """An update's losses on this rank: its share of the micro-batches that the step names."""
    for micro in range(dist.get_rank(), MICRO_BATCHES, dist.get_world_size()):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + micro))
        if noise:
            x = x + 0.1 * torch.randn(4, 3)  # named by nothing: the generator's state has to be restored
        loss = engine.module(x).square().mean()
        yield loss, {"loss": float(loss.detach())}


def train(engine: Engine, start: int, stop: int) -> list[dict[str, float]]:
    return [engine.update(losses(engine, step), 0.05 / (step + 1)).metrics for step in range(start, stop)]


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an engine's state."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def config_of(**learner) -> Config:
    return build_config({"learner": learner, "telemetry": {"timeline": False}, "resources": {
        "threads": 1, "learner_workers": dist.get_world_size()}})


class SmallRank(Rank):
    """A policy with an average, and a second network.

    Args:
        kill: "<where> <step>": where is train, write (in the middle of a checkpoint) or done.
    """

    checkpoint_every = 2

    def __init__(self, run_dir: Path, stage: int = 0, kill: str = "", noise: bool = True, steps: int = 6, seed: int = 0,
                 **learner):
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
        self.config, self.stage, self.run_dir = config_of(zero_stage=stage, **learner), "pretrain", Path(run_dir)
        self.scribe, self.diary, self.told = local_scribe(run_dir), Diary(), time.time()
        self.dtype, self.kill, self.noise, self.seen = torch.float32, kill, noise, {}
        self.root = checkpoints.root(run_dir, self.stage)
        self.guard, self.unlogged = UpdateGuard(self.config.guards, "pretrain.lr", rollback.count(self.root)), 0
        policy = network("plain", seed)
        self.ema = EMA(policy, 0.9)
        accumulation = MICRO_BATCHES // self.world
        self.engines = {name: Engine(net, self.device, stage, 2, accumulation, 0.05, (0.9, 0.99), 0.01, 1.0, anchor=0.1)
                        for name, net in (("policy", policy), ("fake", network("plain", seed + 1)))}
        self.algorithm = SimpleNamespace(steps=steps, updates=self._updates)
        torch.manual_seed(seed + 7)

    def _updates(self, step: int):
        for name, engine in reversed(self.engines.items()):
            yield Update(name, 0.05 / (step + 1), losses(engine, step, self.noise))

    def _point(self, where: str, step: int) -> None:
        if self.kill == f"{where} {step}":
            raise Killed

    def begin(self, start: int) -> None:
        self.start = self.at = start

    def next_batch(self, step: int) -> int | None:
        self.at = step
        return None if self.stopped else step

    def updated(self, step: int, batch: int, metrics: dict[str, float]) -> None:
        self._point("train", step)
        with self.engine.gathered() as weights:
            self.ema.update(weights)

    def done(self, step: int, batch: int, metrics: dict[str, float]) -> None:
        self.seen[step] = {key: value for key, value in metrics.items() if not key.startswith("seconds")}
        self._point("done", step)

    def finish(self) -> None:
        with self.engine.gathered() as weights:
            self.last = {name: p.detach().clone() for name, p in weights.items()}

    def stop(self, error: Exception) -> None:
        self.reason = str(error)

    def save_own(self, folder: Path) -> None:
        self._point("write", self.at)
        save_file(self.ema.state_dict(), folder / "ema.safetensors")

    def load_own(self, folder: Path) -> None:
        self.ema.load_state_dict(load_file(folder / "ema.safetensors"))

    def live(self) -> "SmallRank":
        """Runs to its end or its kill, and is closed."""
        try:
            self.run()
        except Killed:
            pass
        self.close()
        return self
