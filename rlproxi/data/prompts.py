"""Which caption is prompt ``index`` of the training list or of the held-out list.

Captions repeat, so the caption itself separates the two lists: a hash reserves one in sixteen for evaluation.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np

from ..config.loading import Config
from ..seeds import Purpose, rng
from . import faces


def reserved(caption: str) -> bool:
    """Whether a caption belongs to the held-out sixteenth."""
    return zlib.crc32(caption.encode()) % 16 == 0


def training_prompts(config: Config, step: int) -> tuple[list[int], list[str]]:
    """(indices in the whole run, captions) of the training prompts of iteration ``step``, none of them held out.

    A prompt of a file repeats only after all others were used. Raises ValueError for a file without usable prompts,
    FileNotFoundError for one that is missing.
    """
    each = config.rl.prompts_per_step
    indices = list(range(step * each, (step + 1) * each))
    path = _prompts_file(config)
    if path is not None:
        prompts = _without(load_prompts("data.prompts", path), _heldout_file(config), path)
        places = [divmod(i, len(prompts)) for i in indices]
        return indices, [prompts[_shuffled(config.run.seed, epoch, len(prompts))[i]] for epoch, i in places]
    source, held = faces.collection(config.run.seed, "train_prompts"), frozenset(_heldout_file(config) or ())
    return indices, [_unreserved(config, source, i, held) for i in indices]


def heldout_prompts(config: Config) -> tuple[list[int], list[str]]:
    """(indices, captions) of the prompts of every evaluation, all different.

    They are those of data.heldout_prompts, else the reserved ones, in their file's order.

    Raises as ``training_prompts``, and ValueError if there are too few.
    """
    d, wanted = config.data, config.evaluate.prompts
    captions: Sequence[str] | None = _heldout_file(config)
    if captions is None:
        path = _prompts_file(config)
        prompts = _heldout_portraits(config) if path is None else load_prompts("data.prompts", path)
        captions = [p for p in prompts if reserved(p)]
    if len(captions) < wanted:
        where = f"data.heldout_prompts = {d.heldout_prompts!r}"
        if d.heldout_prompts is None:
            where = f"the sixteenth of data.prompts = {d.prompts!r} that is reserved for evaluation"
        raise ValueError(
            f"{where} has {len(captions)} distinct prompts, and evaluate.prompts asks for {wanted}: lower "
            "evaluate.prompts, or name a longer file in data.heldout_prompts"
        )
    return list(range(wanted)), list(captions[:wanted])


def load_prompts(key: str, path: str) -> tuple[str, ...]:
    """The distinct prompts of a file, in its order: the lines of a .txt, the "prompt" of each object of a .jsonl.

    ``key``: the config key, for messages. Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    file = Path(path)
    kinds = 'a .txt file with a prompt on each line, or a .jsonl file with a "prompt" in each object'
    if not file.is_file():
        raise FileNotFoundError(f"{key} = {path!r} does not exist: name {kinds}")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{key} = {path!r} has an unknown ending: name {kinds}")
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


def _prompts_file(config: Config) -> str | None:
    """data.prompts; None for the embedded portraits."""
    if config.data.prompts is None and config.data.source == "shards":
        remedy = "run the stage encode, or name a file of prompts"
        raise ValueError(f"data.prompts is not set, and the captions of data.urls are not encoded yet: {remedy}")
    return config.data.prompts


def _heldout_file(config: Config) -> tuple[str, ...] | None:
    path = config.data.heldout_prompts
    return None if path is None else load_prompts("data.heldout_prompts", path)


@lru_cache(maxsize=4)
def _without(prompts: tuple[str, ...], held: tuple[str, ...] | None, path: str) -> tuple[str, ...]:
    out = {p for p in prompts if reserved(p)} if held is None else set(held)
    left = tuple(p for p in prompts if p not in out)
    if not left:
        raise ValueError(f"data.prompts = {path!r}: all of its {len(prompts)} prompts are held out: add others")
    return left


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return rng(seed, Purpose.PROMPTS, epoch).permutation(size)


def _unreserved(config: Config, source: int, index: int, held: frozenset[str]) -> str:
    """Portrait ``index``'s caption; if it is held out, that of the next portrait of the same line."""
    # A line of portraits for each index, far from the other lines, so that no index depends on another.
    line = (faces.portrait(source, i, config.data.hand_fraction).caption for i in count(index, 2**32))
    return next(caption for caption in line if not reserved(caption) and caption not in held)


def _heldout_portraits(config: Config) -> list[str]:
    source = faces.collection(config.run.seed, "heldout_prompts")
    every = (faces.portrait(source, i, config.data.hand_fraction).caption for i in count())
    captions: dict[str, None] = {}
    while len(captions) < config.evaluate.prompts:
        captions[next(caption for caption in every if reserved(caption))] = None
    return [*captions]
