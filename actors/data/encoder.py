"""The stage ``encode``: shards to cached files, each by whichever worker is free.

A shard is encoded whole or not at all and its file's name says what is in it, so a worker that dies costs one shard,
which Ray gives to its successor, and a run that is started again encodes only what is missing.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from rlproxi.config.loading import Config
from rlproxi.data.addresses import list_shards
from rlproxi.data.cache import Entry, cached_file, source_version, write_manifest, write_prompts
from rlproxi.data.encode import Encoder, Recipe, Unreadable, build_recipe, entry
from rlproxi.data.order import Order
from rlproxi.data.shards import UNREADABLE, Skip

#: Seconds before a shard that its storage did not give is asked for again.
PAUSES = (1, 5, 20)


@ray.remote(max_restarts=3, max_task_retries=3)
class EncodeWorker:
    """One device, or one CPU core, that encodes shards."""

    def __init__(self, recipe: Recipe, parts_folder: str | None, threads: int):
        import torch

        # Results depend on the number of threads.
        torch.set_num_threads(1)
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self.encoder = Encoder(recipe, parts_folder, device, threads)

    def encode(self, url: str, path: str) -> Entry | Skip:
        """Encodes one shard; a Skip where its storage fails time and again."""
        if Path(path).is_file():  # a worker that died after its last shard
            return entry(url, Path(path))
        for pause in (*PAUSES, None):
            try:
                return self.encoder.shard(url, Path(path))
            except Unreadable as error:
                if pause is None:
                    return Skip(url, "", str(error))
                time.sleep(pause)


def encode(config: Config, cache: Path, parts_folder: str | None, scribe: Any) -> dict[str, Any]:
    """Encodes every shard of ``data.urls`` that is not in ``cache`` yet; blocks.

    ``cache`` must be a folder that all nodes share. Writes the run's manifest and prompts there (``manifest_path``,
    ``prompts_path``).

    Args:
        parts_folder: a folder with vae/ and text encoders, which all nodes see; None caches pixels.

    Returns {"shards", "encoded" (of them, now), "samples", "skipped", "reasons" (kind -> count), "unused" (samples in
    buckets too small for a batch), "prompts", "seconds"}.

    Raises ValueError or FileNotFoundError before any work for addresses, keys or folders that cannot be used;
    ValueError where no sample, or no whole batch, came out; RuntimeError naming a shard that its workers died of.
    """
    begun = time.time()
    cache = Path(cache)
    recipe = build_recipe(config, parts_folder)
    urls = list_shards(config.data.urls)
    with ThreadPoolExecutor(16) as pool:  # remote storages answer slowly, but many at once
        files = dict(zip(urls, pool.map(lambda url: _file(cache, url, recipe), urls)))
    found: dict[str, Entry | Skip] = {url: file for url, file in files.items() if isinstance(file, Skip)}
    found.update({url: entry(url, file) for url, file in files.items() if url not in found and file.is_file()})
    todo = {url: file for url, file in files.items() if url not in found}
    progress = _Progress(scribe, found, begun)
    for url, result in _run(config, recipe, parts_folder, todo):
        found[url] = result
        progress.tell(result)
    return _finish(config, cache, [found[url] for url in urls], len(todo), begun)


def _file(cache: Path, url: str, recipe: Recipe) -> Path | Skip:
    try:
        return cached_file(cache, url, source_version(url), recipe.fingerprint)
    except (OSError, ValueError) as error:
        return Skip(url, "", f"{UNREADABLE}: {type(error).__name__}: {' '.join(str(error).split())}")


class _Progress:
    """Tells the run's log how far the stage is."""

    def __init__(self, scribe: Any, found: dict[str, Entry | Skip], begun: float):
        self.scribe, self.begun, self.done, self.samples, self.skipped = scribe, begun, 0, 0, 0
        for result in found.values():
            self._count(result)
        self.before = self.samples

    def _count(self, result: Entry | Skip) -> None:
        self.done += 1
        if isinstance(result, Skip):
            self.skipped += 1
        else:
            self.samples += sum(result.rows.values())
            self.skipped += sum(result.skipped.values())

    def tell(self, result: Entry | Skip) -> None:
        self._count(result)
        self.scribe.append.remote(
            "metrics",
            {
                "stage": "encode",
                "step": self.done,
                "samples": self.samples,
                "skipped": self.skipped,
                "images_per_second": (self.samples - self.before) / (time.time() - self.begun),
            },
        )


def _workers(config: Config, parts_folder: str | None, most: int) -> list[Any]:
    """(options, threads) of each worker: one for each share of a GPU where networks have one, else each free CPU."""
    r, free = config.resources, ray.available_resources()
    cpus = free.get("CPU", 1.0)
    if parts_folder and r.learner_gpus > 0:
        count = max(1, min(most, int(free.get("GPU", 0) / r.learner_gpus + 1e-9)))
        threads = max(1, int(cpus // count))
        return [({"num_gpus": r.learner_gpus, "num_cpus": min(1.0, cpus / count)}, threads)] * count
    return [({"num_cpus": min(1.0, cpus)}, 1)] * max(1, min(most, int(cpus)))


def _run(config: Config, recipe: Recipe, parts_folder: str | None, todo: dict[str, Path]):
    """(address, result) of each shard, as they are done."""
    if not todo:
        return
    idle = [
        EncodeWorker.options(**options).remote(recipe, parts_folder, threads)
        for options, threads in _workers(config, parts_folder, len(todo))
    ]
    workers, waiting, running = list(idle), deque(todo.items()), {}
    try:
        while waiting or running:
            while waiting and idle:
                url, path = waiting.popleft()
                worker = idle.pop()
                running[worker.encode.remote(url, str(path))] = (url, worker)
            (done,), _ = ray.wait(list(running), num_returns=1)
            url, worker = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                raise RuntimeError(
                    f"every worker that was given {url} died, most likely for want of memory: a shard's "
                    f"rows are held until they are written; make shards smaller ({error})"
                ) from None
            idle.append(worker)
            yield url, result
    finally:
        for worker in workers:
            ray.kill(worker)


def _finish(config: Config, cache: Path, results: list[Entry | Skip], encoded: int, begun: float) -> dict[str, Any]:
    lost = [result for result in results if isinstance(result, Skip)]
    entries = [Entry(r.shard, None, {}, {r.kind: 1}) if isinstance(r, Skip) else r for r in results]
    totals = write_manifest(config, cache, entries, lost)
    if not totals["samples"]:
        raise ValueError(
            f"data.urls: none of {totals['shards']} shards held a usable sample; skipped: "
            f"{totals['reasons'] or 'nothing, they are empty'}"
        )
    order = Order([e.rows for e in entries], config.pretrain.batch_size, config.run.seed)
    return {
        **totals,
        "encoded": encoded,
        "unused": order.never_used,
        "prompts": write_prompts(config, cache),
        "seconds": time.time() - begun,
    }
