"""Checkpoints of a training stage: every rank writes its part, and every rank goes on from the same one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlproxi.algorithms.base import AlgorithmStopped
from rlproxi.config.loading import Config

from . import checkpoints
from .engine import Engine
from .resume import circumstances, reasons, sentence

T = TypeVar("T")


@dataclass(frozen=True)
class RankPlace:
    """A rank's number, the number of ranks, and the rank's device."""

    rank: int
    world: int
    device: torch.device


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's own generators: the program's algorithms name their noise instead, one of the user's need not."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


class Checkpointer:
    """Writes and reads a stage's checkpoints. ``write`` and ``restore`` are collectives, called by every rank.

    ``root``: their folder. ``every``: steps between two, for messages. ``run_log``: the run-log actor.
    """

    def __init__(self, root: Path, config: Config, stage: str, place: RankPlace, every: int, run_log: Any):
        self.root, self.config, self.stage, self.place = root, config, stage, place
        self.every, self.run_log = every, run_log
        self.unwritten = 0  # checkpoints in a row that could not be written

    def write(self, step: int, engines: Mapping[str, Engine], save_own: Callable[[Path], None]) -> None:
        """Writes the state after ``step`` steps, whole or not at all. Training goes on without, where a disk is full.

        An engine's name is also that of its folder. With ``save_own`` rank 0 writes the rest into the checkpoint's
        folder; it may raise OSError.

        Raises AlgorithmStopped after ``learner.max_checkpoint_failures`` in a row that could not be written.
        """
        first = self.place.rank == 0
        scratch = checkpoints.scratch(self.root, step)
        _, failed = self._together(lambda: checkpoints.begin(self.root, step) if first else None)
        if not failed:
            sealed, failed = self._together(lambda: self._write_part(scratch, engines, save_own))
        if not failed:
            others = {name: seal for part in sealed[1:] for name, seal in part.items()}
            world, made_by, keep = self.place.world, self._circumstances(), self.config.learner.keep_checkpoints
            _, failed = self._together(
                lambda: checkpoints.finish(self.root, step, world, made_by, others, keep) if first else None
            )
        self.unwritten = self.unwritten + 1 if failed else 0
        if failed:
            self._not_written(step, failed)

    def _together(self, work: Callable[[], T]) -> tuple[list[T], str]:
        """What each rank's ``work`` returned, and the errors of those that could not write; the same on every rank."""
        own: tuple[T | None, str]
        try:
            own = (work(), "")
        except checkpoints.WRITE_ERRORS as error:
            own = (None, str(error) or type(error).__name__)
        everyone: list[Any] = [None] * self.place.world
        device = self.place.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            dist.all_gather_object(everyone, own)
        return [result for result, _ in everyone], "; ".join(sorted({text for _, text in everyone if text}))

    def _write_part(
        self, scratch: Path, engines: Mapping[str, Engine], save_own: Callable[[Path], None]
    ) -> dict[str, checkpoints.Seal]:
        """Writes this rank's files; returns their seals by name. Raises after this rank's part in the collectives."""
        files, failed = [], None
        for name, engine in engines.items():
            try:
                files += engine.save(scratch / name)
            except checkpoints.WRITE_ERRORS as error:
                failed = error
        if failed is not None:
            raise failed
        files.append(scratch / f"random-{self.place.rank:05d}.safetensors")
        save_file(_random_state(self.place.device), files[-1])
        if self.place.rank == 0:
            save_own(scratch)
            return {}  # ``checkpoints.finish`` seals this process's files
        return {str(file.relative_to(scratch)): checkpoints.seal(file) for file in files}

    def _not_written(self, step: int, failed: str) -> None:
        if self.place.rank == 0:
            checkpoints.abandon(self.root)
        most = self.config.learner.max_checkpoint_failures
        remedy = "free space there, or set learner.keep_checkpoints=1"
        words = f"{self.stage}: no checkpoint of step {step}: {failed}; {checkpoints.space(self.root)}"
        if self.unwritten >= most:
            words += f". {most} checkpoints in a row could not be written"
            raise AlgorithmStopped(f"{words}: {remedy}, then --resume")
        if self.place.rank == 0:
            going = f"Training goes on, failure {self.unwritten} of {most} in a row; next attempt in {self.every} steps"
            self.run_log.announce.remote("warning", f"{words}. {going}: {remedy}")

    def _circumstances(self) -> dict[str, Any]:
        import deepspeed

        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        device = self.place.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return circumstances(self.config, self.stage, kind, versions)

    def restore(self, engines: Mapping[str, Engine], load_own: Callable[[Path], None], steps: int) -> int:
        """Loads the newest usable checkpoint; returns the steps it has behind it, 0 without one.

        With ``load_own`` every rank reads what ``save_own`` wrote. ``steps``: the stage's, for the note.
        """
        newest: list[Any] = [None]
        if self.place.rank == 0:
            newest[0] = checkpoints.latest(self.root, partial(self.run_log.announce.remote, "warning"))
        dist.broadcast_object_list(newest, src=0, device=self.place.device)
        found: checkpoints.Checkpoint | None = newest[0]
        if found is None:
            return 0
        for name, engine in engines.items():
            engine.load(found.folder / name)
        load_own(found.folder)
        random = found.folder / f"random-{self.place.rank:05d}.safetensors"
        state = load_file(random) if random.is_file() else {}  # none for a rank beyond the number that wrote it
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.place.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.place.device)
        if self.place.rank == 0:
            overlapped = self.stage == "rl" and self.config.rl.max_staleness > 0
            why = reasons(found.made_by, self._circumstances(), asynchronous=overlapped)
            self.run_log.announce.remote("note", sentence(self.stage, found.step, steps, why))
        return found.step
