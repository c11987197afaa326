"""A reward's gradient in the learner's process, or behind Ray Serve: what the way there and back costs.

    PYTHONPATH=. python tests/studies/gradient_service.py [--repeats 5]

For each batch of images the same ``RewardGradients`` is asked in this process and in a replica that answers with scores
and d reward / d image, both float32 as training needs them, one request at a time, for the learner waits for each. Both
sides have one thread and take turns; medians count. ``way`` is the time of a request that is answered with the images
themselves.
"""

from __future__ import annotations

import argparse
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
#: name -> (scorer, images, side)
CASES = {
    "attributes, 32 images of 32 px": ("attributes", 32, 32),
    "HPSv2 of ViT-B-32's size, 8 images of 256 px": ("hpsv2", 8, 256),
    "HPSv2 of ViT-B-32's size, 8 images of 512 px": ("hpsv2", 8, 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats

    import ray
    import torch
    from ray import serve

    from actors.cluster import join as cluster
    from rlproxi.config.sections import Reward
    from rlproxi.rewards.attributes import AttributeClassifier
    from rlproxi.rewards.gradients import RewardGradients

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    AttributeClassifier(32, 32).save(folder / "reward.safetensors")
    params = {
        "attributes": {"path": str(folder / "reward.safetensors")},
        "hpsv2": {
            "checkpoint": str(clip_models.save_open_clip(folder / "weights.pt", B32)),
            "precision": "float32",
            "tokenizer": str(clip_models.save_tokenizer(folder / "tokenizer")),
        },
    }
    cluster.connect()

    @serve.deployment(ray_actor_options={"num_cpus": 1})
    class Service:
        def __init__(self, reward: Reward):
            torch.set_num_threads(1)
            self.gradients = RewardGradients.build([reward], None, True, "cpu")

        def ascend(self, x: np.ndarray, prompts: list[str]) -> tuple[np.ndarray, dict]:
            found = self.gradients(torch.from_numpy(np.array(x)), prompts)
            return found.ascent.numpy(), {name: value.numpy() for name, value in found.scores.items()}

        def echo(self, x: np.ndarray) -> np.ndarray:
            return x

    for name, (kind, count, side) in CASES.items():
        reward = Reward(name=kind, params=params[kind])
        handle = serve.run(Service.bind(reward), name=kind, route_prefix=None)
        gradients = RewardGradients.build([reward], None, True, "cpu")
        x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        prompts = ["a man with red hair and a blue hat"] * count
        ways = {
            "in_process": lambda: gradients(x, prompts).ascent.numpy(),
            "service": lambda: handle.ascend.remote(x.numpy(), prompts).result()[0],
            "way": lambda: handle.echo.remote(x.numpy()).result(),
        }
        a, b = ways["in_process"](), ways["service"]()
        assert np.isfinite(a).all() and a.shape == b.shape and np.abs(a).max() > 0
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, ask in ways.items():
                begun = time.perf_counter()
                ask()
                times[way].append(time.perf_counter() - begun)
        found = {way: statistics.median(values) for way, values in times.items()}
        print(
            json.dumps(
                {
                    "case": name,
                    "megabytes_each_way": round(x.numel() * 4 / 1e6, 2),
                    **{f"{way}_ms": round(1000 * value, 1) for way, value in found.items()},
                    "service_over_in_process": round(found["service"] / found["in_process"], 3),
                }
            ),
            flush=True,
        )
        serve.delete(kind)
    ray.shutdown()


if __name__ == "__main__":
    main()
