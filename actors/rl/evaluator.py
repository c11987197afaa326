"""Evaluations on the held-out prompts, the alarm they may raise, and the best model so far."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlproxi.algorithms.guards.over_optimisation import OverOptimisation
from rlproxi.algorithms.requests import SampleRequest, no_images, split_request
from rlproxi.config.loading import Config
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation import heldout
from rlproxi.evaluation.reference import Comparison
from rlproxi.rewards import RewardError
from rlproxi.telemetry.timeline import Diary

from ..rewards.service import RewardClient


class Evaluator:
    """Samples, scores, writes and watches evaluations.

    ``guard`` is the one that saw the newest evaluation, and before it those of earlier iterations in the run
    directory: it is made anew each time, so a resumed run's and an unbroken run's know the same.

    Args:
        sample: (request, version) -> (images uint8 [P * S, H, W, 3], anything more). Asked for many pieces at once.
        save: (version, folder) -> None; writes the model with the weights of that version.
        diary: of when evaluations were.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        scribe: Any,
        client: RewardClient,
        sample: Callable[[SampleRequest, int], Awaitable[tuple]],
        save: Callable[[int, str], Awaitable[None]],
        diary: Diary | None = None,
    ):
        self.diary = diary or Diary()
        self.config, self.run_dir, self.scribe, self.client = config, run_dir, scribe, client
        self.sample, self.save = sample, save
        self.scorers = [r.name for r in [*config.rewards.train, *config.rewards.heldout]]
        self.judges = [r.name for r in config.rewards.heldout]
        self.compare, self.told = Comparison(config), None
        self.guard = self._new_guard()

    def _new_guard(self) -> OverOptimisation:
        return OverOptimisation.of(self.config)

    async def evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float = 1.0) -> dict:
        """Held-out prompts at each step count; writes and returns the evaluation (see evaluation.heldout)."""
        with self.diary.span("evaluation", 0, "evaluate"):
            return await self._evaluate(tag, step_counts, version, guidance_scale)

    async def _evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float) -> dict:
        samples = self.config.evaluate.samples
        indices, prompts = heldout_prompts(self.config)
        result = {
            "tag": tag,
            "iteration": version,
            "prompts": prompts,
            "samples": samples,
            "guidance_scale": guidance_scale,
            "headline_steps": self.config.sampler.num_inference_steps,
            "by_steps": {},
        }
        pictures, judged, correct = {}, {}, {}
        for count in step_counts:
            whole = SampleRequest(
                "heldout", 0, tuple(prompts), tuple(indices), samples, num_steps=count, guidance_scale=guidance_scale
            )
            images, broken = await self._images(whole, version)
            scores, details = await self._judge(images, broken, prompts)
            # Grey in the place of what is no image would pass for diversity, and for distance.
            seen = {} if broken.any() else await self._look(images)
            entry = heldout.summarise(scores, details, self.judges, samples, seen)
            result["by_steps"][str(count)] = entry
            pictures[count] = images
            judged[count] = scores[self.judges[0] if self.judges else self.scorers[0]]
            correct[count] = details[self.judges[0]] if self.judges else {}
            self.scribe.append.remote(
                "evaluation", {"stage": "rl", "tag": tag, "step": version, "steps": count, **entry}
            )
        if self.compare.data:
            result["data"] = self.compare.data
        # The best model first: an evaluation that can be read has been acted on.
        await self._watch(result)
        heldout.write(self.run_dir, tag, result, pictures, judged, correct)
        return result

    async def _images(self, whole: SampleRequest, version: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [P * S, H, W, 3], made in micro-batches of about the training's size, and which are none, bool [P * S]."""
        g = self.config.rl
        groups = max(1, g.groups_per_micro_batch * g.group_size // whole.group_size)
        pieces = await asyncio.gather(*(self.sample(request, version) for request in split_request(whole, groups)))
        broken = np.concatenate([no_images(piece[0]) for piece in pieces])
        if broken.any():
            message = (
                f"evaluation: {int(broken.sum())} of {len(broken)} samples of {whole.num_steps} steps count as missing, because "
                "they are NaN or Inf"
            )
            self.scribe.append.remote("warning", {"message": message})
        return np.concatenate([np.asarray(piece[0]) for piece in pieces]), broken

    async def _judge(self, images: np.ndarray, broken: np.ndarray, prompts: list[str]) -> tuple[dict, dict]:
        """({scorer: [P * S]}, {judge: {part: [P * S]}}); NaN is missing."""
        samples = self.config.evaluate.samples
        rows = list(zip(np.split(images, len(prompts)), prompts))
        scores = {
            name: np.concatenate(await asyncio.gather(*(self._score(name, *row) for row in rows)))
            for name in self.scorers
        }
        details = {}
        for name in self.judges:
            parts = await asyncio.gather(*(self._details(name, *row) for row in rows))
            known = next((list(part) for part in parts if part), [])
            details[name] = {
                key: np.concatenate([part.get(key, np.full(samples, np.nan)) for part in parts]) for key in known
            }

        def present(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: np.where(broken, np.nan, column) for name, column in columns.items()}

        return present(scores), {name: present(columns) for name, columns in details.items()}

    async def _score(self, name: str, images: np.ndarray, prompt: str) -> np.ndarray:
        """Scores of one prompt's samples; NaN, with a warning, where they cannot be had: an evaluation ends no run."""
        try:
            return await self.client.score(name, images, prompt)
        except RewardError as error:
            self.scribe.append.remote("warning", {"message": f"evaluation: {prompt!r} has no score: {error}"})
            return np.full(len(images), np.nan, np.float32)

    async def _details(self, name: str, images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        try:
            return await self.client.details(name, images, prompt)
        except RewardError:
            return {}  # the same prompt's missing score was told of already

    async def _look(self, images: np.ndarray) -> dict:
        """Diversity and distance to data; what is missing of them is told once."""
        seen = await asyncio.to_thread(self.compare, images)
        if self.compare.note != self.told:
            self.told = self.compare.note
            self.scribe.append.remote("note", {"message": f"evaluation: {self.told}"})
        return seen

    async def _watch(self, result: dict) -> None:
        """Shows an evaluation to a guard that knows the earlier ones; passes its alarm on and keeps the best model."""
        self.guard = self._new_guard()
        now = heldout.headline(result, self.config)
        if now is None:
            return
        for seen in heldout.evaluated(self.run_dir, self.config, now.iteration - 1):
            self.guard.see(seen)
        alarm = self.guard.see(now)
        if alarm:
            self.scribe.append.remote(
                "alarm", {"stage": "rl", "step": now.iteration, "message": alarm, "best": self.guard.best.iteration}
            )
        if self.guard.best is now and now.iteration > 0:
            await self.save(now.iteration, str(self.run_dir / "models" / "best"))
            self.scribe.append.remote("best", {"stage": "rl", "step": now.iteration, "heldout": now.heldout})
