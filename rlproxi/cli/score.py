"""``rlproxi score``: score images that already exist."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..rewards import RewardError, build, checked_params, facts, parameters, provenance
from ..rewards.api import batches, find_images, read_prompts, score_batches
from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, or folders with images in them and below")
    add("--reward", required=True, metavar="NAME", help="a registered scorer, for example hpsv2")
    add("--checkpoint", metavar="FILE", help="its weights: short for --param checkpoint=FILE (or path=)")
    add("--param", action="append", default=[], metavar="KEY=VALUE", help="another of its parameters, as YAML")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--prompt", metavar="TEXT", help="one prompt for all images")
    words.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt for each image in order (.txt, .json, .jsonl), or a folder with the HPSv2 benchmark's; default: "
        "the .txt file beside each image",
    )
    add("--batch", type=at_least(1), default=32, metavar="N", help="images scored at once (default 32)")
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the scores here")
    out.add_argument("--csv", type=Path, metavar="FILE", help="also write the scores here")


def command(arguments: argparse.Namespace) -> int:
    """Print a score for each image, and their mean; write the files asked for. Returns 0.

    The scorer is loaded last. Raises ValueError, or an OSError, for what the user can correct.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the rlproxi script, unlike python -m, would not find the user's modules here
    params = scorer_parameters(arguments.reward, arguments.param, arguments.checkpoint)
    files = find_images(arguments.images)
    prompts, groups = prompts_for(files, arguments.prompt, arguments.prompts)
    plan = batches(files, arguments.batch)
    for out in filter(None, (arguments.json, arguments.csv)):
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder, expected a file to write")
        out.parent.mkdir(parents=True, exist_ok=True)
    scorer = build(arguments.reward, params)
    try:
        scores = score_batches(scorer, arguments.reward, files, prompts, plan, progress=True)
    except RewardError as error:
        raise ValueError(str(error)) from None
    print_table(files, scores, groups)
    rows = [(str(file), prompt, str(score)) for file, prompt, score in zip(files, prompts, scores, strict=True)]
    if arguments.json:
        # The scorer's parameters are left out, because they may hold secrets.
        value = {"reward": arguments.reward, "scorer": provenance(scorer), **summary(scores)}
        if groups:
            value["styles"] = by_group(scores, groups)
        value["scores"] = [{"file": file, "prompt": prompt, "score": float(score)} for file, prompt, score in rows]
        text = json.dumps(value, indent=1, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("file", "prompt", "score"), *rows])
    return 0


def scorer_parameters(name: str, given: Sequence[str], checkpoint: str | None) -> dict[str, Any]:
    """The scorer's parameters from ``--param key=value`` and ``--checkpoint``, which fills in the one that it says.

    Raises ValueError for an unknown scorer and for parameters that it does not take.
    """
    from ..config.loading import apply_override

    takes, known = parameters(name), facts(name)
    params: dict[str, Any] = {}
    for text in given:
        apply_override(params, text)
    if checkpoint is not None:
        key = known.checkpoint_parameter or next(iter(known.file_parameters), None)
        if key is None:
            raise ValueError(f"reward {name!r} takes no checkpoint; it takes {', '.join(takes) or 'no parameters'}")
        if key in params:
            raise ValueError(f"--checkpoint and --param {key}= are the same parameter of reward {name!r}")
        params[key] = checkpoint
    return checked_params(name, params)


def prompts_for(files: Sequence[Path], text: str | None, source: str | None) -> tuple[list[str], list[str] | None]:
    """(the prompt of each image, the benchmark style of each image or None).

    ``text`` is the prompt of all images. Else the prompts are read from ``source``, in the order of the images, or by
    STYLE/NUMBER.jpg where it is a folder with the HPSv2 benchmark. Given neither, each image has its prompt in the .txt
    file beside it (img2dataset's layout).
    """
    if text is not None:
        return [text] * len(files), None
    if source is None:
        return [_sidecar(file) for file in files], None
    prompts = read_prompts(source)
    if isinstance(prompts, dict):
        return [_of_benchmark(file, prompts) for file in files], [_style(file) for file in files]
    if len(prompts) != len(files):
        raise ValueError(f"{source} has {len(prompts)} prompts and there are {len(files)} images")
    return prompts, None


def _sidecar(file: Path) -> str:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise FileNotFoundError(
            f'{file} has no prompt: give --prompt ("" for a reward that reads none), --prompts, '
            f"or a {beside.name} beside it"
        )
    try:
        return beside.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt {beside} is not UTF-8: {error}") from None


def _style(file: Path) -> str:
    return file.absolute().parent.name


def _of_benchmark(file: Path, prompts: dict[str, list[str]]) -> str:
    style = _style(file)
    if style not in prompts:
        raise ValueError(f"{file} lies in no folder of a style: expected {', '.join(prompts)}")
    if not (file.stem.isascii() and file.stem.isdigit() and int(file.stem) < len(prompts[style])):
        raise ValueError(f"{file} is not named by the number of a prompt: expected 0 to {len(prompts[style]) - 1}")
    return prompts[style][int(file.stem)]


def summary(scores: np.ndarray) -> dict[str, Any]:
    """Mean, standard error of the mean (None for a single image) and count."""
    exact = scores.astype(np.float64)
    error = float(exact.std(ddof=1) / np.sqrt(len(exact))) if len(exact) > 1 else None
    return {"mean": float(exact.mean()), "standard_error": error, "count": len(exact)}


def by_group(scores: np.ndarray, groups: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """The summary of each benchmark style."""
    styles = list(groups or ())
    return {name: summary(scores[[style == name for style in styles]]) for name in dict.fromkeys(styles)}


def print_table(files: Sequence[Path], scores: np.ndarray, groups: Sequence[str] | None) -> None:
    """``score  file`` for each image, then a line for each style and one for all."""
    shown = [f"{score:.4f}" for score in scores]
    width = max(len("score"), *map(len, shown))
    print(f"{'score':>{width}}  file")
    for text, file in zip(shown, files, strict=True):
        print(f"{text:>{width}}  {file}")
    for name, found in {**by_group(scores, groups), "all": summary(scores)}.items():
        error = "" if found["standard_error"] is None else f", standard error {found['standard_error']:.4f}"
        label = "" if name == "all" else f"{name}: "
        print(f"{label}mean {found['mean']:.4f}{error}, {found['count']} image{'s' * (found['count'] != 1)}")
