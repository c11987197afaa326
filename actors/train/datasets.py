"""The data of pre-training as Ray Datasets, one for each rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from rlproxi.config.loading import Config
from rlproxi.data import faces
from rlproxi.data.cache import CachedShard, read_index
from rlproxi.data.faces import collection
from rlproxi.data.order import Order

# On the terminal Ray Data's messages would break into the progress bars; its log file keeps them.
for _handler in logging.getLogger("ray.data").handlers:
    if isinstance(_handler, logging.StreamHandler):
        _handler.setLevel(logging.WARNING)
# It would warn that there are no progress bars.
logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)

#: Bytes of a dataset, all ranks together, up to which it is read before training begins.
READ_FIRST = 2**30
#: Bytes of a reading task's result, and how many such tasks a rank runs ahead of its training.
TASK_BYTES, TASKS = 32 * 2**20, 2


def portraits(config: Config, start: int, rank: int) -> ray.data.Dataset:
    """The portraits of one rank from optimizer step ``start`` on, in order: columns image, caption."""
    p, world = config.pretrain, config.resources.learner_workers
    share = p.batch_size // world
    source = collection(config.run.seed, "pretrain")

    def draw(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step, row = np.divmod(rows["id"] + start * share, share)
        index = step * p.batch_size + rank * share + row
        images, captions, _ = faces.batch(
            source, index, config.data.size, config.data.hand_fraction, config.data.degraded
        )
        return {"image": images, "caption": np.array(captions)}

    count = (p.steps - start) * share
    dataset = ray.data.range(count, override_num_blocks=max(1, count // 512)).map_batches(draw, batch_size=None)
    # Drawn before training begins: a Data executor that streams beside a rank takes three quarters of its speed.
    return _in_order(dataset).materialize()


def shards(config: Config, cache: Path, start: int, rank: int) -> ray.data.Dataset:
    """The encoded samples of one rank from optimizer step ``start`` on, in ``Order``'s order, epoch after epoch.

    Columns: image uint8 [h, w, 3] or latents float32 [c, h, w]; caption; size int32 [4]; with cached text text_states
    float16 [L, D], text_pooled float32 [P], text_mask uint8 [L]. Only rows of one step have one shape: use ``batches``.

    Raises FileNotFoundError where nothing was encoded for this config, ValueError where no bucket fills a batch.
    """
    p, world = config.pretrain, config.resources.learner_workers
    entries = [e for e in read_index(config, cache) if e.file]
    files = [str(Path(cache) / str(e.file)) for e in entries]
    order = Order([e.rows for e in entries], p.batch_size, config.run.seed)

    def read(steps: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for step in steps["id"]:
            batch = order.batch(int(step) + start)
            yield _stack([_open(files[shard]).row(batch.bucket, row) for shard, row in batch.share(rank, world)])

    count, step_bytes = max(0, p.steps - start), _step_bytes(entries, files, p.batch_size // world)
    steps = max(1, min(TASK_BYTES // step_bytes, -(-count // TASKS)))
    blocks = max(1, -(-count // steps))
    numbers, pool = ray.data.range(count, override_num_blocks=blocks), ray.data.TaskPoolStrategy(min(TASKS, blocks))
    # A task only copies from a file: a fraction of a core, so that it finds a place beside the ranks.
    dataset = _in_order(numbers.map_batches(read, batch_size=steps, num_cpus=0.25, compute=pool))
    if count * step_bytes * world <= READ_FIRST:
        return dataset.materialize()
    # Every rank runs an executor of its own, and each believes that the object store is its own.
    limit = ray.data.ExecutionResources.for_limits(object_store_memory=3 * TASKS * max(TASK_BYTES, step_bytes))
    dataset.context.execution_options.resource_limits = limit
    return dataset


def batches(dataset: Any, share: int, prefetch: int = 4) -> Iterator[dict[str, np.ndarray]]:
    """The batches of ``share`` rows of ``portraits`` or ``shards``, or of Ray Train's shard of one: a dense array for
    each column."""
    for batch in dataset.iter_batches(batch_size=share, prefetch_batches=prefetch):
        # Where a block holds rows of several shapes, Ray gives an object for each row, also if a batch's are alike.
        objects = {name for name, column in batch.items() if column.dtype == object and name != "caption"}
        yield {name: np.stack(list(column)) if name in objects else column for name, column in batch.items()}


def _in_order(dataset: ray.data.Dataset) -> ray.data.Dataset:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


@lru_cache(maxsize=64)
def _open(path: str) -> CachedShard:
    return CachedShard(Path(path))


def _stack(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    found = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in ("caption", "key")}
    if "latents" in found:
        found["latents"] = found["latents"].astype(np.float32)
    return {**found, "caption": np.array([row["caption"] for row in rows], dtype=object)}


def _step_bytes(entries: list[Any], files: list[str], share: int) -> int:
    """About how large one step's rows are, from the first row there is."""
    file, bucket = next((f, b) for e, f in zip(entries, files, strict=True) for b in e.rows)
    columns = _stack([_open(file).row(bucket, 0)])
    return share * sum(column.nbytes for name, column in columns.items() if name != "caption")
