"""``rlproxi sample``: draw a grid of images from a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT")
    add("--model", required=True, metavar="DIR", help="a run directory or a model folder")
    add("--steps", type=at_least(1), metavar="N", help="number of proximal steps (default: the model's)")
    add("--guidance", type=float, metavar="W", help="guidance scale; 1 is none (default: the model's)")
    seed = "the first image's seed; the next ones count up, alike for every prompt (default 0)"
    add("--seed", type=at_least(0), default=0, metavar="S", help=seed)
    add("--count", type=at_least(1), default=4, metavar="K", help="images of each prompt (default 4)")
    out = "one row for each prompt (default sample.png)"
    add("--out", type=Path, default=Path("sample.png"), metavar="FILE.png", help=out)
    add("--scale", type=at_least(1), default=8, metavar="X", help="enlargement (default 8)")


def command(options: argparse.Namespace) -> int:
    """Write a grid: one row for each prompt, one column for each seed. Returns 0."""
    if options.out.suffix.lower() != ".png":  # known before the model is loaded
        raise ValueError(f"--out {options.out} must end in .png")
    # Heavy imports wait until the arguments are known to be good.
    from ..evaluation.images import grid, save_png
    from ..models.pipeline import TextToImage

    model = TextToImage.from_pretrained(options.model)
    for prompt in options.prompts:
        unknown = model.text.unknown_words(prompt)
        if unknown:
            print(f"warning: this model has no token for {', '.join(unknown)}", file=sys.stderr)
    prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
    seeds = [options.seed + i for i in range(options.count)] * len(options.prompts)
    images = model(prompts, options.steps, options.guidance, seeds)
    print(save_png(grid(images, options.count, options.scale), options.out))
    return 0
