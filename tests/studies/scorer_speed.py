"""Images/s and memory of the scorers at their published sizes, with random weights (speed does not depend on them).

    PYTHONPATH=. python tests/studies/scorer_speed.py [--scorers hpsv2,clip,imagereward] [--images 8]
        [--size 512] [--precision float32] [--threads 2]

Loads each scorer from a checkpoint in its published format, written to a temporary folder (up to 4 GB), and scores
one group: square images, one prompt. Prints a JSON line for each; ``memory_gb`` is the process's largest resident
size on a CPU (each scorer in a process of its own), and torch's peak allocation on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from crosscheck import imagereward as authors

from fixtures import clip as clip_fixtures
from fixtures import clip_models
from rlproxi.rewards import build


def random_weights(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}


def hpsv2(folder: Path) -> dict:
    torch.save(
        {"state_dict": random_weights(clip_fixtures.open_clip_layout(clip_fixtures.VIT_H_14))}, folder / "hps.pt"
    )
    return {"checkpoint": str(folder / "hps.pt"), "tokenizer": str(clip_models.save_tokenizer(folder / "tokenizer"))}


def clip(folder: Path) -> dict:
    """ViT-L/14, whose image tower is also the aesthetic predictor's."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 768,
    }
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
        "projection_dim": 768,
        "bos_token_id": clip_fixtures.VOCABULARY - 2,
        "eos_token_id": clip_fixtures.VOCABULARY - 1,
    }
    CLIPModel(CLIPConfig(projection_dim=768, vision_config=tower, text_config=text)).save_pretrained(folder)
    clip_models.save_tokenizer(folder)
    return {"clip": str(folder)}


def imagereward(folder: Path) -> dict:
    torch.save(random_weights(authors.published_shapes(authors.PUBLISHED)), folder / "ImageReward.pt")
    words = [*authors.WORDS, *(f"word{i}" for i in range(30522))][:30522]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return {"checkpoint": str(folder / "ImageReward.pt"), "tokenizer": str(folder)}


MAKERS = {"hpsv2": hpsv2, "clip": clip, "imagereward": imagereward}


def measure(name: str, options: argparse.Namespace) -> dict:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        # The weights are written by another process, whose memory is not ours.
        text = subprocess.run(
            [sys.executable, __file__, "--write", name, folder], check=True, capture_output=True, text=True
        ).stdout
        params = json.loads(text.splitlines()[-1])
        scorer = build(name, {**params, "precision": options.precision, "micro_batch": options.images})
        images = np.random.default_rng(0).integers(0, 256, (options.images, options.size, options.size, 3), np.uint8)
        prompts = ["a photo of a cat, highly detailed"] * options.images
        seconds = []
        for _ in range(4):
            begun = time.perf_counter()
            scorer.score(images, prompts)
            seconds.append(time.perf_counter() - begun)
        gpu = scorer.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "scorer": name,
        "device": torch.cuda.get_device_name() if gpu else f"{options.threads} CPU threads",
        "precision": options.precision,
        "images": options.images,
        "size": options.size,
        "images_per_second": round(options.images / min(seconds[1:]), 3),
        "memory_gb": round(memory / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scorers", default=",".join(MAKERS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print(json.dumps(MAKERS[options.write[0]](Path(options.write[1]))))
    elif options.one:
        print(json.dumps(measure(options.one, options)))
    else:
        for name in options.scorers.split(","):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name], check=True)


if __name__ == "__main__":
    main()
