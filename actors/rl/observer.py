"""What the conductor tells of a run beside its numbers: who did what when, idle roles, restarts, galleries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import Config
from rlproxi.telemetry import gallery, timeline
from rlproxi.telemetry.timeline import Diary, Span

from ..cluster.resources import stage_demand, total_resources

#: A learner's span as it comes over the wire: (role, phase, seconds from now to its start, seconds). Clocks differ.
Told = tuple[str, str, float, float]


class Observer:
    """Writes ``timeline.jsonl`` and ``samples/`` in a thread of its own; a fault there is one warning in the run log.

    Args:
        scribe: handle; is told of galleries and of what went wrong.
        diary: where the pool, the rewards and the evaluator note their spans.
        lost: the number of actors and replicas that have died.
        all_roles: rollout actors and rewards are part of an iteration; else the learner alone.
    """

    def __init__(
        self, config: Config, run_dir: Path, scribe: Any, diary: Diary, lost: Callable[[], int], all_roles: bool
    ):
        self.settings, self.run_dir, self.scribe = config.telemetry, run_dir, scribe
        self.diary, self.lost = diary, lost
        self.learners_begun = 0
        self.gpus = total_resources(stage_demand(config, "rl"))["GPU"]
        self.lanes: dict[str, list] = {"learner": [0]}
        if all_roles:
            self.lanes |= {
                "rollout": list(range(config.resources.rollout_actors)),
                "reward": [reward.name for reward in config.rewards.train],
            }
        self.one = ThreadPoolExecutor(1)  # so that lines come in order
        self.warned = False

    def begun(self) -> None:
        """A learner begins: what is in flight is dropped, and its spans with it."""
        self.learners_begun += 1
        self.diary.clear()

    def keep(self, iteration: int, j: int, request: SampleRequest, images: np.ndarray) -> np.ndarray | None:
        """Those images of micro-batch ``j`` that belong into the iteration's gallery; None where none does."""
        groups = self.settings.samples_groups - j * len(request.prompts)
        if groups <= 0 or not gallery.due(iteration, self.settings.samples_every):
            return None
        return images[: groups * request.group_size]

    def committed(
        self, iteration: int, begun: float, ended: float, images: int, told: Iterable[Told]
    ) -> dict[str, float]:
        """Writes the iteration's line; returns its metrics. ``told``: rank 0's spans (ranks march in step)."""
        for role, phase, start, seconds in told:
            self.diary.note(role, 0, phase, ended + start, seconds)
        spans = self.diary.take()
        idle = timeline.idle_shares([*spans, *self.diary.going_on(ended)], begun, ended, self.lanes)
        if self.settings.timeline:
            self._later(lambda: timeline.append(self.run_dir, "rl", iteration + 1, spans))
        metrics = {f"idle/{role}": share for role, share in idle.items()}
        metrics["restarts"] = self.lost() + max(0, self.learners_begun - 1)
        if self.gpus:
            metrics["images_per_second/gpu"] = images / max(ended - begun, 1e-9) / self.gpus
        return metrics

    def show(self, iteration: int, version: int, scored: list) -> None:
        """Writes the iteration's gallery, where images of it were kept. ``scored``: ``Scored`` of each micro-batch."""
        groups = [group for each in scored if each.images is not None for group in _groups(each)]
        if groups:
            self._later(lambda: self._write(iteration + 1, version, groups))

    def _write(self, step: int, version: int, groups: list[gallery.Group]) -> None:
        file = gallery.write(self.run_dir, step, version, groups)
        self.scribe.append.remote("samples", {"stage": "rl", "step": step, "file": file})

    def _later(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # closed: the run is over
            self.one.submit(self._guarded, work)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self.warned:
                self.warned = True
                message = f"telemetry: timeline or gallery cannot be written: {type(error).__name__}: {error}"
                self.scribe.append.remote("warning", {"message": message})

    async def close(self) -> None:
        """Waits until all is written."""
        await asyncio.to_thread(self.one.shutdown)


def _groups(scored: Any) -> list[gallery.Group]:
    """The kept groups of a micro-batch."""
    size = scored.request.group_size
    images = scored.images.reshape(-1, size, *scored.images.shape[1:])
    return [
        gallery.Group(
            scored.request.prompts[i],
            scored.request.indices[i],
            images[i],
            scored.rewards[i],
            {name: part[i] for name, part in scored.parts.items()},
        )
        for i in range(len(images))
    ]


def over_the_wire(spans: list[Span], now: float) -> list[Told]:
    """A learner's spans for ``Observer.committed``."""
    return [(span.role, span.phase, span.start - now, span.seconds) for span in spans]
