"""Evaluations on the held-out prompts, the alarm on over-optimisation, and the best model so far."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlproxi.algorithms.guards.over_optimisation import OverOptimisation
from rlproxi.algorithms.requests import SampleRequest, split_request
from rlproxi.config.loading import Config
from rlproxi.data.prompts import heldout_prompts
from rlproxi.evaluation import heldout
from rlproxi.evaluation.reference import Comparison
from rlproxi.rewards import RewardError
from rlproxi.run_directory import RunDirectory

from ..rewards.service import RewardClient
from .pool import RolloutPool


class Evaluator:
    """Samples, scores and writes evaluations, and looks for over-optimisation in them.

    Each evaluation makes a new ``guard`` from those in the run directory: a resumed run decides as an unbroken one.
    ``pool`` samples, for many requests at once, writes the best model, and takes the spans of evaluations.
    """

    def __init__(self, config: Config, run_dir: Path, log: Any, client: RewardClient, pool: RolloutPool):
        self.config, self.run_dir, self.log, self.client, self.pool = config, run_dir, log, client, pool
        self.scorers = [r.name for r in [*config.rewards.train, *config.rewards.heldout]]
        self.judges = [r.name for r in config.rewards.heldout]
        self.comparison = Comparison(config)
        self.noted: str | None = None  # what the log already says of missing comparisons
        self.guard = OverOptimisation(self.config)

    @property
    def early_end(self) -> str | None:
        """Why the newest evaluation ends RL (``evaluate.patience``); None where RL goes on."""
        best = self.guard.best
        if best is None or not self.guard.should_stop:
            return None
        below = f"{self.guard.below} evaluations in a row far below iteration {best.iteration}"
        return f"RL ends early: {below} (evaluate.patience)"

    async def evaluate(self, tag: str, step_counts: list[int], version: int, guidance_scale: float = 1.0) -> dict:
        """Evaluate the weights of ``version`` on the held-out prompts, at each number of sampler steps.

        Returns what it writes to ``evaluation/<tag>.json`` (see ``rlproxi.evaluation.heldout``).
        """
        with self.pool.diary.span("evaluation", 0, "evaluate"):
            samples = self.config.evaluate.samples
            indices, prompts = heldout_prompts(self.config)
            names = tuple(prompts), tuple(indices)
            request = SampleRequest("heldout", 0, *names, samples, guidance_scale=guidance_scale)
            by_steps: dict[str, dict] = {}
            result: dict[str, Any] = {
                "tag": tag,
                "iteration": version,
                "prompts": prompts,
                "samples": samples,
                "guidance_scale": guidance_scale,
                "headline_steps": self.config.sampler.num_inference_steps,
                "by_steps": by_steps,
            }
            pictures, judged, correct = {}, {}, {}
            for count in step_counts:
                images, finite = await self._images(replace(request, num_steps=count), version)
                scores, details = await self._judge(images, finite, prompts)
                # A grey image in the place of a broken one would change diversity and distance.
                seen = await self._compare(images) if finite.all() else {}
                entry = heldout.summarise(scores, details, self.judges, samples, seen)
                by_steps[str(count)] = entry
                pictures[count] = images
                judged[count] = scores[self.judges[0] if self.judges else self.scorers[0]]
                correct[count] = details[self.judges[0]] if self.judges else {}
                record = {"stage": "rl", "tag": tag, "step": version, "steps": count, **entry}
                self.log.append.remote("evaluation", record)
            if self.comparison.data:
                result["data"] = self.comparison.data
            # The best model first: once the file of an evaluation exists, its best model is saved too.
            await self._watch(result)
            heldout.write(self.run_dir, tag, result, pictures, judged, correct)
            return result

    async def _images(self, whole: SampleRequest, version: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [P * S, H, W, 3], and which are finite, bool [P * S]; in requests as large as in training."""
        rl = self.config.rl
        rows = rl.prompts_per_step // rl.micro_batches * rl.group_size
        requests = split_request(whole, max(1, rows // whole.group_size))
        pieces = await asyncio.gather(*(self.pool.sample(request, version) for request in requests))
        finite = np.concatenate([piece.finite for piece in pieces])
        if not finite.all():
            self.log.warn.remote(
                f"evaluation: {int((~finite).sum())} of {len(finite)} samples of {whole.num_steps} steps count as "
                "missing, because they are NaN or Inf"
            )
        return np.concatenate([piece.images for piece in pieces]), finite

    async def _judge(self, images: np.ndarray, finite: np.ndarray, prompts: list[str]) -> tuple[dict, dict]:
        """({scorer: [P * S]}, {judge: {part: [P * S]}}); NaN is missing."""
        samples = self.config.evaluate.samples
        rows = list(zip(np.split(images, len(prompts)), prompts, strict=True))
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
            return {name: np.where(finite, column, np.nan) for name, column in columns.items()}

        return present(scores), {name: present(columns) for name, columns in details.items()}

    async def _score(self, name: str, images: np.ndarray, prompt: str) -> np.ndarray:
        """Scores of one prompt's samples; NaN, with a warning, where the scorer fails: an evaluation ends no run."""
        try:
            return await self.client.score(name, images, prompt)
        except RewardError as error:
            self.log.warn.remote(f"evaluation: {prompt!r} has no score: {error}")
            return np.full(len(images), np.nan, np.float32)

    async def _details(self, name: str, images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        try:
            return await self.client.details(name, images, prompt)
        except RewardError:
            return {}  # the log already has a warning for this prompt's missing score

    async def _compare(self, images: np.ndarray) -> dict:
        """Diversity and distance to data. The log says once which of them are missing and why."""
        seen = await asyncio.to_thread(self.comparison, images)
        if self.comparison.note != self.noted:
            self.noted = self.comparison.note
            self.log.append.remote("note", {"message": f"evaluation: {self.noted}"})
        return seen

    async def _watch(self, result: dict) -> None:
        """Show an evaluation to a guard that has seen the earlier ones; log its alarm, and save the best model."""
        self.guard = OverOptimisation(self.config)
        now = heldout.headline(result, self.config)
        if now is None:
            return
        for seen in heldout.evaluated(self.run_dir, self.config, now.iteration - 1):
            self.guard.see(seen)
        alarm = self.guard.see(now)
        best = self.guard.best
        if alarm:
            fields = {"stage": "rl", "step": now.iteration, "message": alarm, "best": best and best.iteration}
            self.log.append.remote("alarm", fields)
        if best is now and now.iteration > 0:
            await self.pool.save(now.iteration, str(RunDirectory(self.run_dir).best))
            self.log.append.remote("best", {"stage": "rl", "step": now.iteration, "heldout": now.heldout})
