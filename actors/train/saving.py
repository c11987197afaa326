"""What of a rank outlives it: checkpoints written together, taken up again together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlproxi.algorithms.base import AlgorithmStopped
from rlproxi.config.loading import Config

from . import checkpoints
from .engine import Engine
from .resume import circumstances, reasons, sentence


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's own generators: the program's algorithms name their noise instead, one of the user's need not."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class Saved:
    """The half of a ``Rank`` that writes and reads checkpoints. Its methods are collectives, called by every rank."""

    config: Config
    rank: int
    world: int
    device: torch.device
    stage: str
    root: Path  # of the stage's checkpoints
    scribe: Any
    algorithm: Any
    engines: dict[str, Engine]
    checkpoint_every: int
    stopped: bool
    stop: Callable[[Exception], None]
    unwritten = 0  # checkpoints in a row that could not be written

    def save_own(self, folder: Path) -> None:
        """Rank 0 writes what is neither weights nor optimizer into ``folder``. No collective: it may raise OSError."""

    def load_own(self, folder: Path) -> None:
        """Every rank reads what ``save_own`` wrote."""

    def checkpoint(self, step: int) -> None:
        """Writes the state after ``step`` steps, whole or not at all. Where a disk is full training goes on without, up to
        ``learner.max_checkpoint_failures`` times in a row."""
        root = self.root
        scratch = checkpoints.scratch(root, step)
        _, failed = self._together(lambda: checkpoints.begin(root, step) if self.rank == 0 else None)
        if not failed:
            sealed, failed = self._together(lambda: self._write(scratch))
        if not failed:
            facts = {"world": self.world, "made_by": self._circumstances()}
            others = {name: seal for part in sealed[1:] for name, seal in part.items()}
            _, failed = self._together(
                lambda: self.rank or checkpoints.finish(root, step, facts, others, self.config.learner.keep_checkpoints)
            )
        self.unwritten = self.unwritten + 1 if failed else 0
        if failed:
            self._not_written(root, step, failed)

    def _together(self, work: Callable[[], Any]) -> tuple[list[Any], str]:
        """(what each rank's ``work`` gave, what failed to be written on any of them): every rank goes the same way on."""
        try:
            own = (work(), "")
        except checkpoints.WRITE_ERRORS as error:
            own = (None, str(error) or type(error).__name__)
        everyone: list[Any] = [None] * self.world
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            dist.all_gather_object(everyone, own)
        return [result for result, _ in everyone], "; ".join(sorted({text for _, text in everyone if text}))

    def _write(self, scratch: Path) -> dict[str, list]:
        """This rank's files, sealed by name. Raises what could not be written, after its part in the collectives."""
        files, failed = [], None
        for name, engine in self.engines.items():
            try:
                files += engine.save(scratch / name)
            except checkpoints.WRITE_ERRORS as error:
                failed = error
        if failed is not None:
            raise failed
        files.append(scratch / f"random-{self.rank:05d}.safetensors")
        save_file(_random_state(self.device), files[-1])
        if self.rank == 0:
            self.save_own(scratch)
            return {}  # what is not sealed yet is when the checkpoint is finished
        return {str(file.relative_to(scratch)): checkpoints.seal(file) for file in files}

    def _not_written(self, root: Path, step: int, failed: str) -> None:
        """Says so, and after too many failures in a row ends the run."""
        if self.rank == 0:
            checkpoints.abandon(root)
        most = self.config.learner.max_checkpoint_failures
        remedy = "free space there, or set learner.keep_checkpoints=1"
        told = f"{self.stage}: no checkpoint of step {step}: {failed}; {checkpoints.space(root)}"
        if self.unwritten < most:
            if self.rank == 0:
                self.scribe.say.remote(
                    "warning",
                    (
                        f"{told}. Training goes on ({self.unwritten} of {most} failures in a row before it stops), the next attempt "
                        f"is {self.checkpoint_every} steps on: {remedy}"
                    ),
                )
            return
        self.stopped = True
        self.stop(
            AlgorithmStopped(f"{told}. {most} checkpoints in a row could not be written: {remedy}, then --resume")
        )

    def _circumstances(self) -> dict[str, Any]:
        import deepspeed

        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return circumstances(self.config, self.stage, device, versions)

    def restore(self) -> int:
        """Loads the newest usable checkpoint; returns the steps it has behind it, 0 without one."""
        found: list[Any] = [None]
        if self.rank == 0:
            found[0] = checkpoints.latest(self.root, lambda message: self.scribe.say.remote("warning", message))
        dist.broadcast_object_list(found, src=0, device=self.device)
        if found[0] is None:
            return 0
        folder, facts = found[0]
        for name, engine in self.engines.items():
            engine.load(folder / name)
        self.load_own(folder)
        random = folder / f"random-{self.rank:05d}.safetensors"
        if random.is_file():  # not of a rank that there was not
            _set_random_state(load_file(random), self.device)
        if self.rank == 0:
            self._tell_resume(facts)
        return facts["step"]

    def _tell_resume(self, facts: dict) -> None:
        made_by = facts.get("made_by")
        why = reasons(
            made_by if isinstance(made_by, dict) else {},
            self._circumstances(),
            asynchronous=self.stage == "rl" and self.config.rl.max_staleness > 0,
        )
        self.scribe.say.remote("note", sentence(self.stage, facts["step"], self.algorithm.steps, why))
