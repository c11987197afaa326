"""What Ray Serve costs a scorer: images/s of the reward service against scoring in this process.

    PYTHONPATH=. python tests/studies/reward_service.py [--groups 24] [--size 256] [--repeats 3]

One HPSv2 scorer of ViT-B-32's size with random weights, one replica, one thread on each side, groups of 8 images, a
request for each group, all sent at once as the conductor does. Both sides take turns in each repeat; the medians
count. Prints one JSON object; ``ratio`` is the service's images/s over those in process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from fixtures import clip as clip_fixtures
from fixtures import clip_models

B32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": clip_fixtures.VOCABULARY, "width": 512, "heads": 8, "layers": 12},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--size", type=int, default=256, help="images are squares of this side")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    import ray
    import torch

    from actors.cluster import join as cluster
    from actors.rewards import service as reward_service
    from rlproxi.config.loading import build_config
    from rlproxi.rewards import build

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    params = {
        "checkpoint": str(clip_models.save_open_clip(folder / "weights.pt", B32)),
        "precision": "float32",
        "tokenizer": str(clip_models.save_tokenizer(folder / "tokenizer")),
    }
    rewards = build_config(
        {"rewards": {"train": [{"name": "hpsv2", "params": params, "num_cpus": 1}], "heldout": []}}
    ).rewards
    scorer = build("hpsv2", params)
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 256, (8, options.size, options.size, 3), np.uint8) for _ in range(options.groups)]
    prompts = [f"a photo of {i} red cats" for i in range(options.groups)]

    cluster.connect()
    client = reward_service.RewardClient(rewards, reward_service.deploy(rewards, "bench"))

    async def serve() -> list[np.ndarray]:
        return await asyncio.gather(*(client.score("hpsv2", g, p) for g, p in zip(groups, prompts)))

    def here() -> list[np.ndarray]:
        return [scorer.score(g, [p] * len(g)) for g, p in zip(groups, prompts)]

    async def measure() -> dict:
        assert np.allclose(await serve(), here(), atol=1e-5)
        times: dict[str, list[float]] = {"service": [], "in_process": []}
        for _ in range(options.repeats):
            begun = time.perf_counter()
            await serve()
            times["service"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            here()
            times["in_process"].append(time.perf_counter() - begun)
        rates = {name: 8 * options.groups / statistics.median(values) for name, values in times.items()}
        return {**rates, "ratio": rates["service"] / rates["in_process"], "times": times}

    print(json.dumps(asyncio.run(measure()), indent=1))
    ray.shutdown()


if __name__ == "__main__":
    main()
