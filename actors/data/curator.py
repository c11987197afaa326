"""The stage ``curate``: a pool of workers, each with its own models, turns raw shards into curated ones.

Every step writes files that are complete or absent, so a resumed job does only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import ray

from rlproxi.config.curation import Curate
from rlproxi.config.loading import Config
from rlproxi.data.curation import job, merge, pictures, plan, records
from rlproxi.data.curation.examine import Examiner
from rlproxi.data.curation.faces import load_opencv
from rlproxi.data.curation.write import Writer
from rlproxi.data.shards import ShardUnreadable
from rlproxi.errors import ConfigError
from rlproxi.pages import curation as page
from rlproxi.rewards import RewardError
from rlproxi.run_directory import RunDirectory

from .workers import Progress, WorkerPool

_Step = TypeVar("_Step", Examiner, Writer)


class CurateWorker:
    """An actor with one device, or one CPU core, and the models of the current phase."""

    def __init__(self, settings: Curate, place: records.Place):
        import torch

        threads = max(1, int(settings.num_cpus))
        torch.set_num_threads(threads)
        if settings.faces:
            load_opencv().setNumThreads(threads)
        self.settings, self.place = settings, place
        self.device = "cuda" if settings.num_gpus else "cpu"
        self.step: Examiner | Writer | None = None

    def examine(self, shard: str) -> tuple[int, int]:
        """Write the shard's records and return (samples, those that passed); (-1, 0) for a shard that is unreadable."""
        examiner = self._load(Examiner)
        try:
            found = examiner.examine(shard)
        except ShardUnreadable:
            return -1, 0
        mark = records.examine_fingerprint(self.settings, shard)
        self.place.write_lines(self.place.records(shard), map(asdict, found), mark)
        return len(found), sum(record.stage is None for record in found)

    def write(self, output: plan.Output) -> tuple[int, int]:
        """Write one curated shard and return (samples, samples)."""
        count = self._load(Writer).write(output, self.place)
        return count, count

    def peek(self, shard: str, chosen: dict[int, list[dict]]) -> dict[int, str]:
        """A raw shard's thumbnails, as ``pictures.peek``."""
        return pictures.peek(shard, chosen, self.settings.max_pixels)

    def _load(self, kind: type[_Step]) -> _Step:
        """The models of a step; those of the step before are freed first.

        The constructor does not load them, because its errors reach the driver only as a dead actor.
        """
        if not isinstance(self.step, kind):
            self.step = None
            self.step = kind(self.settings, self.device)
        return self.step


def curate(config: Config, run_dir: Path, log: Any) -> dict:
    """Run the whole stage and return the contents of curation.json. Blocks.

    Raises ConfigError for input that cannot be used, before any worker starts where that is possible.
    """
    settings = config.curate
    place = records.Place(settings.out or RunDirectory(run_dir).curated)
    shards = job.check(settings, place.out)
    _check_size(config)
    options = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    workers = WorkerPool(CurateWorker, [(options, (settings, place))] * min(settings.workers, len(shards)))
    with place.attempt(), workers as pool, _user_errors():
        marks = {shard: records.examine_fingerprint(settings, shard) for shard in shards}
        missing = {s: (s,) for s in shards if not records.is_done(place.records(s), marks[s])}
        lost = _run(pool, "examine", missing, len(shards), log)
        if lost:
            _report(lost, len(shards), settings, log)
            shards = [shard for shard in shards if shard not in lost]

        found = plan.survivors(place, shards, settings)
        outputs = plan.outputs(found, shards, settings)
        job.clear_stale(place, outputs)
        written = {
            place.shard(o.number).name: (o,)
            for o in outputs
            if not (records.is_done(place.part(o.number), o.fingerprint) and place.shard(o.number).is_file())
        }
        _run(pool, "write", written, len(outputs), log)

        statistics = merge.merge(place, shards, found, outputs, settings)
        wanted = pictures.wanted(statistics, page.shown(statistics))
        shown = dict(pool.run("peek", {shard: (shard, chosen) for shard, chosen in wanted.items()}))
        summary = {**statistics.summary(), "unreadable_shards": lost}
        place.write_text("curation.html", page.render(statistics, shown, place.out.name))
        place.write_text("curation.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _run(pool: WorkerPool, method: str, tasks: Mapping[str, tuple], total: int, log: Any) -> list[str]:
    """Run the ``tasks`` that are missing of ``total`` shards; return the names of those that could not be read."""
    progress = Progress(log, f"curate/{method}", total, total - len(tasks), samples=0, passed=0)
    lost = []
    for name, (samples, passed) in pool.run(method, tasks):
        progress.add(samples=max(0, samples), passed=passed)
        if samples < 0:
            lost.append(name)
    return sorted(lost)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Inside, an error of a worker that the user can correct becomes a ConfigError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (ImportError, FileNotFoundError, ValueError, RewardError, ShardUnreadable)):
            raise ConfigError(f"curate: {cause}") from None
        raise


def _check_size(config: Config) -> None:
    """Raise ConfigError where the cluster is too small: the last shards would wait for ever for their workers."""
    if config.resources.autoscaling:
        return
    have, c = ray.cluster_resources(), config.curate
    for kind, each in (("CPU", c.num_cpus), ("GPU", c.num_gpus)):
        if c.workers * each > have.get(kind, 0) + 1e-9:
            asked = f"curate.workers {c.workers} x num_{kind.lower()}s {each:g} asks for {c.workers * each:g} {kind}s"
            raise ConfigError(
                f"{asked} and the cluster has {have.get(kind, 0):g}: lower one of them, add nodes, or set "
                "resources.autoscaling=true if the cluster grows on demand"
            )


def _report(lost: list[str], total: int, settings: Curate, log: Any) -> None:
    """Warn of shards that cannot be read; raise ConfigError if curate.unreadable is "stop"."""
    message = f"{len(lost)} of {total} shards cannot be read: {', '.join(lost[:5])}{', ...' * (len(lost) > 5)}"
    if settings.unreadable == "stop":
        remedy = "make them readable and resume the run, or leave them out with curate.unreadable=skip"
        raise ConfigError(f"curate.urls: {message}; all others are examined: {remedy}")
    log.append.remote("warning", {"message": f"curate: {message}; left out"})
