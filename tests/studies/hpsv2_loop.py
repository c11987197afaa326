"""How much faster batched scoring is than the hpsv2 package's own loop, on the same weights and machine.

    PYTHONPATH=. python tests/studies/hpsv2_loop.py [--images 64] [--group 8] [--repeats 3] [--model ViT-B-32]

in the environment of tests/crosscheck/clip_family.py. Weights are random (a network's speed does not depend on them),
the images 512x512. Prints one JSON object. ``ratio`` is the package's time over ours:

- one_by_one: ``hpsv2.img_score.score`` for each image, as the package's README does; it reads its weights each time.
- by_prompt: one call for each prompt with all its images, which reads its weights once for each prompt.
- no_reload: the package's loop over images with the weights kept, which it does not offer.

All of them include what turns a PIL image (theirs) or a uint8 array (ours) into the network's input. Compared in
float32, one after the other in each repeat; the median of the repeats counts. ``cpu_ratio`` is that of the processor
time of this process: it is what to look at when the machine is not idle and the device is a CPU.
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
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "crosscheck")]
from clip_family import import_hpsv2  # noqa: E402

from rlproxi.rewards.hpsv2 import HPSv21  # noqa: E402


class Package:
    """The package's scoring function, given a model of another size under the name it asks for."""

    def __init__(self, model_name: str, folder: Path):
        self.img_score, self.open_clip = import_hpsv2()
        torch.manual_seed(0)
        self.model, _, self.transform = self.open_clip.create_model_and_transforms(
            model_name,
            None,
            precision="amp",
            device=self.img_score.device,
            light_augmentation=True,
            aug_cfg={},
            output_dict=True,
        )
        self.model.eval()
        self.file = str(folder / "weights.pt")
        torch.save({"state_dict": self.model.state_dict()}, self.file)
        self.img_score.model_dict.update(model=self.model, preprocess_val=self.transform)
        self.vocabulary = self.open_clip.tokenizer.default_bpe()

    def one_by_one(self, images, prompts) -> list[float]:
        return [self.img_score.score(image, prompt, cp=self.file)[0] for image, prompt in zip(images, prompts)]

    def by_prompt(self, images, prompts) -> list[float]:
        groups: dict[str, list] = {}
        for image, prompt in zip(images, prompts):
            groups.setdefault(prompt, []).append(image)
        return [
            score for prompt, group in groups.items() for score in self.img_score.score(group, prompt, cp=self.file)
        ]

    @torch.no_grad()
    def no_reload(self, images, prompts) -> list[float]:
        device, scores = self.img_score.device, []
        for image, prompt in zip(images, prompts):
            out = self.model(self.transform(image)[None].to(device), self.open_clip.tokenize([prompt]).to(device))
            scores.append((out["image_features"] @ out["text_features"].T).item())
        return scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="images of each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-32", help="one of open_clip's model configs")
    parser.add_argument("--micro-batch", type=int, default=32)
    options = parser.parse_args()

    arrays = np.random.default_rng(0).integers(0, 256, (options.images, 512, 512, 3), np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    prompts = [
        f"a painting of {i // options.group} boats on a lake, number {i // options.group}"
        for i in range(options.images)
    ]
    with tempfile.TemporaryDirectory() as folder:
        package = Package(options.model, Path(folder))
        ours = HPSv21(
            package.file,
            package.vocabulary,
            device=str(package.img_score.device),
            precision="float32",
            micro_batch=options.micro_batch,
        )
        ways = {
            "ours": lambda: ours.score(arrays, prompts),
            **{
                name: lambda name=name: getattr(package, name)(images, prompts)
                for name in ("one_by_one", "by_prompt", "no_reload")
            },
        }
        ours.score(arrays[:2], prompts[:2])
        package.no_reload(images[:2], prompts[:2])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
        answers = {}
        for _ in range(options.repeats):
            for name, way in ways.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                answers[name] = np.asarray(way(), np.float64)
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    cpu_median = {name: statistics.median(times) for name, times in cpu_seconds.items()}
    print(
        json.dumps(
            {
                "model": options.model,
                "images": options.images,
                "group": options.group,
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "torch": torch.__version__,
                "images_per_second": {name: round(options.images / value, 2) for name, value in median.items()},
                "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
                "cpu_seconds": {name: [round(t, 2) for t in times] for name, times in cpu_seconds.items()},
                "ratio": {name: round(value / median["ours"], 2) for name, value in median.items() if name != "ours"},
                "cpu_ratio": {
                    name: round(v / cpu_median["ours"], 2) for name, v in cpu_median.items() if name != "ours"
                },
                "largest_difference": max(float(np.abs(answers[name] - answers["ours"]).max()) for name in ways),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
