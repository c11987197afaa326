"""The stage ``curate``: raw shards to curated ones by a pool of workers, each with its own models.

Every step leaves files (``rlproxi.data.curation.records``) that are whole or not there, so a resumed job does only what
is missing. A worker that dies is started again and repeats its shard.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from rlproxi.config.curation import Curate
from rlproxi.config.loading import Config
from rlproxi.data.curation import job, merge, pictures, plan, records
from rlproxi.data.curation.examine import ShardUnreadable, Tools, examine
from rlproxi.data.curation.faces import load_opencv
from rlproxi.data.curation.write import WriteTools, write
from rlproxi.errors import ConfigError
from rlproxi.pages import curation as page
from rlproxi.rewards import RewardError
from rlproxi.run_directory import RunDirectory

#: How often a shard is tried again whose worker died: one that kills every worker must end the job.
_RETRIES = 3


@ray.remote(max_restarts=-1, max_task_retries=_RETRIES)
class _Worker:
    """One device, or one CPU core, with the models of the phase that it is in."""

    def __init__(self, settings: Curate, out: str):
        import torch

        threads = max(1, int(settings.num_cpus))
        torch.set_num_threads(threads)
        if settings.faces:
            load_opencv().setNumThreads(threads)
        self.settings, self.place = settings, records.Place(out)
        self.device = "cuda" if settings.num_gpus else "cpu"
        self.kind, self.tools = None, None

    def examine(self, shard: str) -> tuple[int, int]:
        """Writes the shard's records; (samples, those that passed). (-1, 0): the shard cannot be read."""
        self._load(Tools)
        try:
            found = examine(shard, self.settings, self.tools)
        except ShardUnreadable:
            return -1, 0
        records.save_records(self.place.records(shard), records.examine_fingerprint(self.settings, shard), found)
        return len(found), sum(record.stage is None for record in found)

    def write(self, output: plan.Output) -> tuple[int, int]:
        """Writes one curated shard; (samples, the same)."""
        self._load(WriteTools)
        count = write(output, self.place, self.settings, self.tools)
        return count, count

    def peek(self, wanted: tuple[str, dict[int, list[dict]]]) -> dict[int, str]:
        """A raw shard's pictures for the page."""
        shard, chosen = wanted
        return pictures.peek(shard, chosen, self.settings.max_pixels)

    def _load(self, kind: type) -> None:
        """Makes way for the models of a phase, and loads them. Not in the constructor: what that raises reaches the
        driver as a dead actor only."""
        if self.kind is not kind:
            self.kind, self.tools = None, None
            self.tools = kind.load(self.settings, self.device)
            self.kind = kind


def curate(config: Config, run_dir: Path, scribe: Any) -> dict:
    """The whole stage; returns what curation.json holds. Blocks.

    Progress: metrics of the stages curate/examine and curate/write, whose step is the per cent that are done.
    Raises ConfigError for input that cannot be worked with, before any worker starts where that is possible.
    """
    settings = config.curate
    place = records.Place(settings.out or RunDirectory(run_dir).curated)
    shards = job.check(settings, place.out)
    _check_size(config)
    place.examined.mkdir(parents=True, exist_ok=True)
    with _Pool(settings, place, len(shards)) as pool:
        todo = [s for s in shards if not records.is_done(place.records(s), records.examine_fingerprint(settings, s))]
        answers = pool.run("examine", todo, _Progress("curate/examine", len(shards), len(todo), scribe))
        lost = sorted(shard for shard, (count, _) in answers if count < 0)
        shards = _without(shards, lost, settings, scribe)

        found = plan.survivors(place, shards, settings)
        outputs = plan.outputs(found, shards, settings)
        job.clear_stale(place, outputs)
        todo = [
            o
            for o in outputs
            if not (records.is_done(place.part(o.number), o.fingerprint) and place.shard(o.number).is_file())
        ]
        list(pool.run("write", todo, _Progress("curate/write", len(outputs), len(todo), scribe)))

        statistics = merge.merge(place, shards, found, outputs, settings)
        wanted = list(pictures.wanted(statistics, page.shown(statistics)).items())
        shown = {shard: thumbnails for (shard, _), thumbnails in pool.run("peek", wanted)}
    summary = {**statistics.summary(), "unreadable_shards": lost}
    page.write_page(place, statistics, shown)
    merge.write_summary(place, summary)
    return summary


def _check_size(config: Config) -> None:
    """A pool's worker that never starts would hold up the last shards for ever."""
    if config.resources.autoscaling:
        return
    have, c = ray.cluster_resources(), config.curate
    for kind, each in (("CPU", c.num_cpus), ("GPU", c.num_gpus)):
        if c.workers * each > have.get(kind, 0) + 1e-9:
            raise ConfigError(
                f"curate.workers {c.workers} x num_{kind.lower()}s {each:g} asks for "
                f"{c.workers * each:g} {kind}s and "
                f"the cluster has {have.get(kind, 0):g}: lower one of them, add nodes, or set "
                "resources.autoscaling=true if the cluster grows on demand"
            )


def _without(shards: list[str], lost: list[str], settings: Curate, scribe: Any) -> list[str]:
    if not lost:
        return shards
    named = ", ".join([*lost[:5], *(["..."] if len(lost) > 5 else [])])
    told = f"{len(lost)} of {len(shards)} shards cannot be read: {named}"
    if settings.unreadable == "stop":
        raise ConfigError(
            f"curate.urls: {told}; all others are examined, so make these readable and resume the run, "
            "or leave them out with curate.unreadable=skip"
        )
    scribe.append.remote("warning", {"message": f"curate: {told}; left out"})
    return [s for s in shards if s not in set(lost)]


class _Progress:
    """Tells the scribe whenever another per cent of a phase's shards is done."""

    def __init__(self, stage: str, total: int, todo: int, scribe: Any):
        self.stage, self.total, self.done, self.scribe = stage, total, total - todo, scribe
        self.samples = self.passed = 0
        self.told, self.begun = -1, time.time()

    def __call__(self, samples: int, passed: int) -> None:
        self.done, self.samples, self.passed = self.done + 1, self.samples + max(0, samples), self.passed + passed
        step = 100 * self.done // self.total
        if step > self.told:
            self.told = step
            self.scribe.append.remote(
                "metrics",
                {
                    "stage": self.stage,
                    "step": step,
                    "shards": self.done,
                    "samples": self.samples,
                    "passed": self.passed,
                    "images_per_second": self.samples / max(time.time() - self.begun, 1e-9),
                },
            )


class _Pool:
    """Workers that each have one task at a time; gone when the block ends."""

    def __init__(self, settings: Curate, place: records.Place, most: int):
        self.settings, self.out, self.most = settings, str(place.out.resolve()), most
        self.workers: list = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def run(self, method: str, items: Sequence, progress: _Progress | None = None) -> Iterator[tuple[Any, Any]]:
        """(item, result) as they are done. Raises ConfigError for what the user can mend, else what a task raised."""
        if items and not self.workers:
            options = _Worker.options(num_cpus=self.settings.num_cpus, num_gpus=self.settings.num_gpus)
            count = min(self.settings.workers, self.most)
            self.workers = [options.remote(self.settings, self.out) for _ in range(count)]
        waiting, idle, busy = list(reversed(items)), list(self.workers), {}
        while waiting or busy:
            while waiting and idle:
                worker, item = idle.pop(), waiting.pop()
                busy[getattr(worker, method).remote(item)] = (worker, item)
            (ref,), _ = ray.wait(list(busy), num_returns=1)
            worker, item = busy.pop(ref)
            result = _get(ref)
            idle.append(worker)
            if progress is not None:
                progress(*result)
            yield item, result


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (ImportError, FileNotFoundError, ValueError, RewardError, ShardUnreadable)):
            raise ConfigError(f"curate: {cause}") from None
        raise
