"""What the conductor records of a run beside its numbers: the timeline, idle shares, restarts, galleries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rlproxi.algorithms.requests import SampleRequest
from rlproxi.config.loading import Config
from rlproxi.telemetry import gallery, timeline
from rlproxi.telemetry.timeline import Diary

from ..cluster.resources import stage_demand, total_resources
from .messages import Scored, Trained


class Observer:
    """Writes ``timeline.jsonl`` and ``samples/`` in a thread of its own. A fault there is one warning in the run log.

    diary: has the spans of pool, rewards and evaluator. lost: returns the number of actors and replicas that died.
    all_roles: rollout actors and rewards take part in an iteration; else only the learner does.
    """

    def __init__(self, config: Config, run_dir: Path, log: Any, diary: Diary, lost: Callable[[], int], all_roles: bool):
        self.settings, self.run_dir, self.log = config.telemetry, run_dir, log
        self.diary, self.lost = diary, lost
        self.learners_begun = 0
        self.gpus = total_resources(stage_demand(config, "rl"))["GPU"]
        self.lanes: dict[str, Sequence[int | str]] = {"learner": [0]}
        if all_roles:
            self.lanes["rollout"] = range(config.resources.rollout_actors)
            self.lanes["reward"] = [reward.name for reward in config.rewards.train]
        self.writer = ThreadPoolExecutor(1)  # one thread, so that lines stay in order
        self.warned = False

    def begun(self) -> None:
        """A learner begins: drop the spans of what was in flight."""
        self.learners_begun += 1
        self.diary.clear()

    def keep(self, iteration: int, j: int, request: SampleRequest, images: np.ndarray) -> np.ndarray | None:
        """The images of micro-batch ``j`` that go into the iteration's gallery; None where none does."""
        groups = self.settings.samples_groups - j * len(request.prompts)
        if groups <= 0 or not gallery.due(iteration, self.settings.samples_every):
            return None
        return images[: groups * request.group_size]

    def committed(self, trained: Trained, begun: float, ended: float, images: int) -> dict[str, float]:
        """Write an iteration's line of the timeline; returns its metrics.

        It lasted from ``begun`` to ``ended`` (unix seconds, this machine's clock) and trained on ``images`` images.
        """
        for span in trained.spans:
            self.diary.note(span.role, 0, span.phase, ended + (span.start - trained.clock), span.seconds)
        spans = self.diary.take()
        idle = timeline.idle_shares([*spans, *self.diary.going_on(ended)], begun, ended, self.lanes)
        if self.settings.timeline:
            self._later(lambda: timeline.append(self.run_dir, "rl", trained.iteration + 1, spans))
        metrics = {f"idle/{role}": share for role, share in idle.items()}
        metrics["restarts"] = self.lost() + max(0, self.learners_begun - 1)
        if self.gpus:
            metrics["images_per_second/gpu"] = images / max(ended - begun, 1e-9) / self.gpus
        return metrics

    def show(self, iteration: int, scored: Sequence[Scored]) -> None:
        """Write the gallery of an iteration whose micro-batches are ``scored``, where they kept images for it."""
        groups = [group for each in scored for group in _groups(each)]
        if groups:
            self._later(lambda: self._write(iteration + 1, scored[0].stamp.version, groups))

    def _write(self, step: int, version: int, groups: list[gallery.GalleryGroup]) -> None:
        file = gallery.write(self.run_dir, step, version, groups)
        self.log.append.remote("samples", {"stage": "rl", "step": step, "file": file})

    def _later(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # closed: the run is over
            self.writer.submit(self._guarded, work)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self.warned:
                self.warned = True
                self.log.warn.remote(
                    f"telemetry: timeline or gallery cannot be written: {type(error).__name__}: {error}"
                )

    async def close(self) -> None:
        """Wait until all is written."""
        await asyncio.to_thread(self.writer.shutdown)


def _groups(scored: Scored) -> list[gallery.GalleryGroup]:
    """The groups of a micro-batch that its gallery shows."""
    if scored.images is None:
        return []
    request, groups = scored.request, []
    images = scored.images.reshape(-1, request.group_size, *scored.images.shape[1:])
    for i, shown in enumerate(images):
        parts = {name: part[i] for name, part in scored.parts.items()}
        groups.append(gallery.GalleryGroup(request.prompts[i], request.indices[i], shown, scored.rewards[i], parts))
    return groups
