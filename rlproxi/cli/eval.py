"""``rlproxi eval``: compare models and samplers at each number of steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation import frontier
from ..evaluation.drawers import NAMES
from .arguments import add_precision, at_least, counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, named as ``frontier.Options`` names them."""
    parser.description = (
        "Reward, diversity, distance to data and seconds an image against the number of steps. Models that share a "
        "LABEL are runs of one method: the intervals are over them and over --seeds."
    )
    add = parser.add_argument
    models = "run directories, model folders, or diffusers folders (drawn from by their own pipeline)"
    add("models", nargs="+", metavar="[LABEL=]MODEL[+LORA][@SAMPLER]", help=models)
    steps = "1,2,4,6,8,10,16,20,50"
    add("--steps", type=counts, default=counts(steps), metavar="N,N,...", help=f"(default {steps})")
    samplers = f"each model by each of: {', '.join(NAMES)} (default: the model's own)"
    add("--samplers", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=samplers)
    data = "prompts, rewards and data (default: the first model that is a run directory)"
    add("--config", metavar="RUN_DIR|FILE", help=data)
    add("--seeds", type=at_least(1), default=1, metavar="K", help="draws of the noise (default 1)")
    add("--prompts", type=at_least(1), metavar="P", help="held-out prompts (default: the config's)")
    add("--samples", type=at_least(2), metavar="S", help="samples of each prompt (default: the config's)")
    add("--guidance", type=float, metavar="W", help="guidance scale (default: each model's)")
    add("--batch", type=at_least(1), default=64, metavar="B", help="images of one sampler call (default 64)")
    add("--device", metavar="D", help="(default: a GPU where there is one)")
    add_precision(parser)
    add("--reach", metavar="LABEL@N", help="also print at how many steps each reaches this one's reward")
    out = "earlier measurements are kept there and not repeated (default frontier)"
    add("--out", type=Path, default=Path("frontier"), metavar="DIR", help=out)


def command(options: argparse.Namespace) -> int:
    """Measure, and write a table, a CSV and a plot into ``--out``. Returns 0."""
    return frontier.command(frontier.Options(**vars(options)))
