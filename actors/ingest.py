"""What pre-training reads, as Ray Datasets."""

from __future__ import annotations

import numpy as np
import ray

from rlproxi.algorithms.prepare import collection
from rlproxi.config import Config
from rlproxi.data import faces


def portraits(config: Config, start: int, rank: int) -> ray.data.Dataset:
    """The portraits of one rank from optimizer step ``start`` on, in order: columns image, caption."""
    p, world = config.pretrain, config.resources.learner_workers
    share = p.batch_size // world
    source = collection(config.run.seed, "pretrain")

    def draw(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step, row = np.divmod(rows["id"] + start * share, share)
        index = step * p.batch_size + rank * share + row
        images, captions, _ = faces.batch(source, index, config.data.size, config.data.hand_fraction)
        return {"image": images, "caption": np.array(captions)}

    count = (p.steps - start) * share
    dataset = ray.data.range(count, override_num_blocks=max(1, count // 512)).map_batches(draw, batch_size=None)
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    # Drawn before training begins: portraits are small (3 kB) and quick (0.5 ms), while a Data executor that
    # streams beside each rank held its interpreter lock and took three quarters of its speed.
    return dataset.materialize()
