"""Prompts by name: which caption is prompt ``index`` of the training or of the held-out list.

Captions are few enough to repeat, so the two lists are kept apart by the caption itself: one in sixteen, chosen
by a hash, is reserved for evaluation and never trained on by RL. The embedded portraits have endless captions;
a file of prompts (data.prompts) is gone through in a new order each time, and may have a held-out file beside it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..config.loading import Config
from ..seeds import Purpose, rng
from . import faces


def reserved(caption: str) -> bool:
    """Whether a caption belongs to the held-out sixteenth."""
    return zlib.crc32(caption.encode()) % 16 == 0


def training_prompts(config: Config, step: int) -> tuple[list[int], list[str]]:
    """The prompts of one iteration, (indices, captions): the next ones each time, none of them held out.

    An index is the prompt's place in the whole run. From a file no prompt comes twice before all have come.

    Raises ValueError naming a file that holds no usable prompts, FileNotFoundError one that is missing.
    """
    count = config.rl.prompts_per_step
    indices = list(range(step * count, (step + 1) * count))
    if _from_file(config):
        prompts = _training_list(config)
        return indices, [
            prompts[_shuffled(config.run.seed, i // len(prompts), len(prompts))[i % len(prompts)]] for i in indices
        ]
    source, held = faces.collection(config.run.seed, "train_prompts"), frozenset(_heldout_file(config) or ())
    return indices, [_unreserved(config, source, i, held) for i in indices]


def heldout_prompts(config: Config) -> tuple[list[int], list[str]]:
    """The fixed prompts of every evaluation, (indices, captions), all different: those of data.heldout_prompts, else
    the reserved ones, in their file's order. More of them begin with the same ones.

    Raises as ``training_prompts``, and ValueError where there are fewer than evaluate.prompts.
    """
    d, wanted = config.data, config.evaluate.prompts
    if d.heldout_prompts is None and not _from_file(config):
        captions = _heldout_portraits(config)
    else:
        captions = _heldout_file(config) or [p for p in load_prompts("data.prompts", d.prompts) if reserved(p)]
    if len(captions) < wanted:
        where = (
            f"data.heldout_prompts = {d.heldout_prompts!r} has"
            if d.heldout_prompts is not None
            else f"the sixteenth of data.prompts = {d.prompts!r} that is reserved for evaluation has"
        )
        raise ValueError(
            f"{where} {len(captions)} distinct prompts, and evaluate.prompts asks for {wanted}: lower "
            "evaluate.prompts, or name a longer file in data.heldout_prompts"
        )
    return list(range(wanted)), list(captions[:wanted])


def load_prompts(key: str, path: str) -> tuple[str, ...]:
    """The distinct prompts of a file, in its order: the lines of a .txt, the "prompt" of each object of a .jsonl.

    Empty lines are passed over. ``key``: the config's, for errors. Raises FileNotFoundError, or ValueError naming the
    file and the line: not UTF-8, no object with a prompt, or nothing at all.
    """
    file = Path(path)
    kinds = 'a .txt file with a prompt on each line, or a .jsonl file with a "prompt" in each object'
    if not file.is_file():
        raise FileNotFoundError(f"{key} = {path!r} does not exist: name {kinds}")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{key} = {path!r} is of no known kind: name {kinds}")
    facts = file.stat()
    return _parsed(key, str(file), facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4)
def _parsed(key: str, path: str, mtime: int, size: int) -> tuple[str, ...]:
    prompts = tuple(dict.fromkeys(_lines(key, path)))
    if not prompts:
        raise ValueError(f"{key} = {path!r} holds no prompt: write one on each line")
    return prompts


def _lines(key: str, path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                if text and path.endswith(".jsonl"):
                    text = _prompt(json.loads(text))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise ValueError(f"{key} = {path!r}, line {number}: {error}") from None
            if text:
                yield text


def _prompt(value: object) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('expected an object with a non-empty "prompt", for example {"prompt": "a red hat"}')
    prompt.encode()  # JSON can spell half of a surrogate pair, which is no text: a UnicodeEncodeError is a ValueError
    return prompt.strip()


def _from_file(config: Config) -> bool:
    if config.data.prompts is None and config.data.source == "shards":
        raise ValueError(
            "data.prompts is not set, and the captions of data.urls are known only after they are "
            "encoded: run the stage encode, or name a file of prompts"
        )
    return config.data.prompts is not None


def _heldout_file(config: Config) -> tuple[str, ...] | None:
    path = config.data.heldout_prompts
    return None if path is None else load_prompts("data.heldout_prompts", path)


def _training_list(config: Config) -> tuple[str, ...]:
    path = config.data.prompts
    return _without(load_prompts("data.prompts", path), _heldout_file(config), path)


@lru_cache(maxsize=4)
def _without(prompts: tuple[str, ...], held: tuple[str, ...] | None, path: str) -> tuple[str, ...]:
    out = {p for p in prompts if reserved(p)} if held is None else set(held)
    left = tuple(p for p in prompts if p not in out)
    if not left:
        raise ValueError(
            f"data.prompts = {path!r} has {len(prompts)} prompts, and all of them are held out: add others"
        )
    return left


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return rng(seed, Purpose.PROMPTS, epoch).permutation(count)


def _unreserved(config: Config, source: int, index: int, held: frozenset[str]) -> str:
    """Portrait ``index``'s caption; where it is held out, that of the next portrait of its own line."""
    attempt = 0
    while True:
        # A line of portraits for each index, far from the other lines, so that no index depends on another.
        caption = faces.portrait(source, index + attempt * 2**32, config.data.hand_fraction).caption
        if not reserved(caption) and caption not in held:
            return caption
        attempt += 1


def _heldout_portraits(config: Config) -> list[str]:
    source = faces.collection(config.run.seed, "heldout_prompts")
    captions: list[str] = []
    index = 0
    while len(captions) < config.evaluate.prompts:
        caption = faces.portrait(source, index, config.data.hand_fraction).caption
        if reserved(caption) and caption not in captions:
            captions.append(caption)
        index += 1
    return captions
