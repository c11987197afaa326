"""The stage ``encode``: a pool of workers turns shards into files of the cache, those that are not there yet."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from rlproxi.config.loading import Config
from rlproxi.data.addresses import list_shards
from rlproxi.data.cache import Entry, cached_file, source_version, write_manifest, write_prompts
from rlproxi.data.encode import Encoder, Recipe, build_recipe, entry
from rlproxi.data.order import Order
from rlproxi.data.shards import UNREADABLE, ShardUnreadable, Skip

from .workers import Progress, WorkerPool

#: Seconds to wait before each new try to read a shard whose storage failed.
PAUSES = (1, 5, 20)


class EncodeWorker:
    """An actor with one device, or one CPU core, that encodes shards."""

    def __init__(self, recipe: Recipe, parts_folder: str | None, threads: int):
        import torch

        # Results depend on the number of threads.
        torch.set_num_threads(1)
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self.encoder = Encoder(recipe, parts_folder, device, threads)

    def encode(self, url: str, path: str) -> Entry | Skip:
        """Encode one shard into ``path``; return a Skip if its storage fails at every try."""
        if Path(path).is_file():  # written by a worker that died before it could answer
            return entry(url, Path(path))
        pauses = iter(PAUSES)
        while True:
            try:
                return self.encoder.shard(url, Path(path))
            except ShardUnreadable as error:
                pause = next(pauses, None)
                if pause is None:
                    return Skip(url, "", str(error))
                time.sleep(pause)


def encode(config: Config, cache: Path, parts_folder: str | None, log: Any) -> dict[str, Any]:
    """Encode the shards of ``data.urls`` that are not in ``cache``; write the run's manifest and prompts. Blocks.

    ``cache``, and ``parts_folder`` with vae/ and text encoders, are folders that all nodes share. Without the latter
    pixels are cached.

    Returns {"shards", "encoded" (shards encoded by this call), "samples", "skipped", "reasons" (kind -> count),
    "unused" (samples in buckets too small for a batch), "prompts", "seconds"}.

    Raises ValueError or FileNotFoundError, before any work, for addresses, keys or folders that cannot be used.
    Raises ValueError if there is no usable sample or no full batch, RuntimeError naming a shard that kills its workers.
    """
    begun = time.time()
    cache = Path(cache)
    recipe = build_recipe(config, parts_folder)
    urls = list_shards(config.data.urls)
    with ThreadPoolExecutor(16) as pool:  # remote storages answer slowly, but many at once
        files = dict(zip(urls, pool.map(lambda url: _file(cache, url, recipe), urls), strict=True))
    found: dict[str, Entry | Skip] = {}
    todo: dict[str, tuple[str, str]] = {}
    samples = skipped = 0
    for url, file in files.items():
        if isinstance(file, Path) and not file.is_file():
            todo[url] = url, str(file)
            continue
        found[url] = entry(url, file) if isinstance(file, Path) else file
        read, lost = _counts(found[url])
        samples, skipped = samples + read, skipped + lost
    progress = Progress(log, "encode", done=len(found), samples=samples, skipped=skipped)
    places = [(options, (recipe, parts_folder, n)) for options, n in _workers(config, parts_folder, len(todo))]
    with WorkerPool(EncodeWorker, places) as workers:
        for url, result in workers.run("encode", todo):
            found[url] = result
            samples, skipped = _counts(result)
            progress.add(samples=samples, skipped=skipped)
    return summarize(config, cache, [found[url] for url in urls], len(todo), begun)


def _file(cache: Path, url: str, recipe: Recipe) -> Path | Skip:
    try:
        return cached_file(cache, url, source_version(url), recipe.fingerprint)
    except (OSError, ValueError) as error:
        return Skip(url, "", f"{UNREADABLE}: {type(error).__name__}: {' '.join(str(error).split())}")


def _counts(result: Entry | Skip) -> tuple[int, int]:
    """(samples, skipped samples) of a shard."""
    return (0, 1) if isinstance(result, Skip) else (sum(result.rows.values()), sum(result.skipped.values()))


def _workers(config: Config, parts_folder: str | None, most: int) -> list[tuple[dict[str, float], int]]:
    """(Ray options, threads) of each worker: one per share of a GPU if networks run on GPUs, else one per free CPU."""
    r, free = config.resources, ray.available_resources()
    cpus = free.get("CPU", 1.0)
    if parts_folder and r.learner_gpus > 0:
        count = max(1, min(most, int(free.get("GPU", 0) / r.learner_gpus + 1e-9)))
        threads = max(1, int(cpus // count))
        return [({"num_gpus": r.learner_gpus, "num_cpus": min(1.0, cpus / count)}, threads)] * count
    return [({"num_cpus": min(1.0, cpus)}, 1)] * max(1, min(most, int(cpus)))


def summarize(config: Config, cache: Path, results: list[Entry | Skip], encoded: int, begun: float) -> dict[str, Any]:
    """Write the run's manifest and prompts, and return and raise as ``encode``, from the ``results`` of all shards.

    ``encoded`` of them are new. The stage began at ``begun``, unix seconds.
    """
    lost = [result for result in results if isinstance(result, Skip)]
    entries = [Entry(r.shard, None, {}, {r.kind: 1}) if isinstance(r, Skip) else r for r in results]
    totals = write_manifest(config, cache, entries, lost)
    if not totals["samples"]:
        skips = totals["reasons"] or "nothing, they are empty"
        raise ValueError(f"data.urls: none of {totals['shards']} shards held a usable sample; skipped: {skips}")
    unused = Order([e.rows for e in entries], config.pretrain.batch_size, config.run.seed).never_used
    prompts = write_prompts(config, cache)
    return {**totals, "encoded": encoded, "unused": unused, "prompts": prompts, "seconds": time.time() - begun}
