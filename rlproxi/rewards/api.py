"""Scoring images that already exist: files, PIL images or arrays, of any sizes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .base import Scorer, checked_scores
from .registry import build

#: Files that a folder is searched for.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

#: The four styles of the HPSv2 benchmark (Wu et al., arXiv 2306.09341), each a JSON list of 800 prompts as published.
BENCHMARK_STYLES = ("anime", "concept-art", "paintings", "photo")

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def score_images(
    scorer: str | Scorer,
    images: Any,
    prompts: str | Sequence[str],
    *,
    batch: int = 32,
    progress: bool = False,
    **params,
) -> np.ndarray:
    """Scores images and keeps their order.

    Images of one size are scored together, ``batch`` at a time, and only these are in memory. As the scorers' authors
    do, every image is made ``convert("RGB")``, which drops an alpha channel, and EXIF rotations are not applied.

    Args:
        scorer: a scorer, or its name (registered, or package.module:Class), from which and ``params`` it is built.
        images: uint8 [B, H, W, 3]; a folder or a file; or a list of files, PIL images and uint8 [H, W, 3] arrays.
        prompts: one for all images, or one for each.
        batch: images in one call of the scorer.
        progress: show a progress bar on stderr if there is more than one batch.

    Returns:
        float32 [B], higher is better.

    Raises:
        ValueError, FileNotFoundError: an image cannot be read, the number of prompts is wrong, or the scorer cannot be
            built.
        RewardError: the scorer failed, or returned something that is no score.
    """
    items = _items(images)
    prompts = [prompts] * len(items) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(items):
        raise ValueError(f"{len(prompts)} prompts for {len(items)} images; give one for each, or one text for all")
    plan = batches(
        items, batch
    )  # before the scorer loads: it reads every file's header, and finds one that is no image
    if isinstance(scorer, str):
        return score_batches(build(scorer, params), scorer, items, prompts, plan, progress)
    if params:
        raise ValueError(f"{', '.join(params)}: parameters are for a scorer that is given by name")
    return score_batches(scorer, type(scorer).__name__, items, prompts, plan, progress)


Item = Path | Image.Image | np.ndarray


def batches(items: Sequence[Item], batch: int) -> list[list[int]]:
    """The indices of images that are scored together: at most ``batch`` of one size. Raises ValueError."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(items):
        by_size.setdefault(_size(item), []).append(i)
    return [same[k : k + batch] for same in by_size.values() for k in range(0, len(same), batch)]


def score_batches(
    scorer: Scorer,
    name: str,
    items: Sequence[Item],
    prompts: Sequence[str],
    plan: list[list[int]],
    progress: bool = False,
) -> np.ndarray:
    """Scores float32 [B] in the order of ``items``; ``name`` is for errors and the bar. See ``score_images``."""
    from tqdm import tqdm

    scores = np.zeros(len(items), np.float32)
    with tqdm(total=len(items), desc=name, unit="image", disable=not progress or len(plan) < 2) as bar:
        for chosen in plan:
            pixels = np.stack([_pixels(items[i]) for i in chosen])
            scores[chosen] = checked_scores(scorer, name, pixels, [prompts[i] for i in chosen])
            bar.update(len(chosen))
    return scores


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The files among ``paths``, and all images in and below the folders, ordered by path with 2.png before 10.png.

    Raises FileNotFoundError for a missing path or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
            if not inside:
                raise FileNotFoundError(f"folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            found += sorted(inside, key=lambda p: [_natural(part) for part in p.parts])
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"image {path} does not exist")
    return found


def read_prompts(path: str | Path) -> list[str] | dict[str, list[str]]:
    """Prompts from a file, or style -> prompts from a folder with the HPSv2 benchmark.

    A .txt file has one prompt on each line; .json is a list of texts; each line of .jsonl is a text or an object with
    "prompt" or "caption". A folder holds some of anime.json, concept-art.json, paintings.json and photo.json; image
    00012.jpg of a style belongs to its prompt 12, counted from 0.

    Raises FileNotFoundError, or ValueError naming the file and the place in it.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / f"{style}.json" for style in BENCHMARK_STYLES]
        if not any(file.is_file() for file in files):
            raise FileNotFoundError(f"folder {path} has none of {', '.join(file.name for file in files)}")
        return {file.stem: _encodable(file, _list(file, _text(file))) for file in files if file.is_file()}
    readers = {".txt": _lines, ".json": _list, ".jsonl": _records}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts {path}: expected a folder or a file that ends in {', '.join(readers)}")
    return _encodable(path, readers[path.suffix.lower()](path, _text(path)))


def _encodable(path: Path, prompts: list[str]) -> list[str]:
    """The prompts, if all are valid Unicode: JSON can hold half of a surrogate pair, which no tokenizer takes."""
    for number, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts {path}: entry {number} (counted from 0) is no text: {error.reason}") from None
    return prompts


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"prompts {path} do not exist")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path} are not UTF-8: {error}") from None


def _lines(path: Path, text: str) -> list[str]:
    # splitlines() would also split at characters like U+2028, which a prompt may hold.
    lines = [line.strip() for line in text.rstrip().split("\n")]
    blank = [i for i, line in enumerate(lines, 1) if not line]
    if blank:
        raise ValueError(f"prompts {path}: line {blank[0]} is blank; use .json where a prompt is empty on purpose")
    return lines


def _list(path: Path, text: str) -> list[str]:
    value = _json(text, str(path))
    if not isinstance(value, list):
        raise ValueError(f"prompts {path} hold a {type(value).__name__}, expected a list of texts")
    wrong = [i for i, item in enumerate(value) if not isinstance(item, str)]
    if wrong:
        raise ValueError(
            f"prompts {path}: entry {wrong[0]} (counted from 0) is a {type(value[wrong[0]]).__name__}, expected a text"
        )
    return value


def _records(path: Path, text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        value = _json(line, f"{path} line {number}")
        if isinstance(value, dict):
            value = value.get("prompt", value.get("caption"))
        if not isinstance(value, str):
            raise ValueError(
                f"prompts {path}: line {number} is neither a text nor an object with 'prompt' or 'caption'"
            )
        prompts.append(value)
    return prompts


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also for a number of too many digits
        raise ValueError(f"prompts {where} are not JSON: {error}") from None


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key by which 'a10' comes after 'a9'."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def _items(images: Any) -> Sequence[Item]:
    """A list of paths, PIL images and arrays. Raises ValueError with the index of an item that is none of these."""
    if isinstance(images, (str, Path)):
        return find_images([images])
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]")
        return list(images)
    items = [Path(item) if isinstance(item, str) else item for item in images]
    for i, item in enumerate(items):
        array = isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3
        if not (array or isinstance(item, (Path, Image.Image))):
            raise ValueError(f"image {i} is a {type(item).__name__}, expected a path, a PIL image or uint8 [H, W, 3]")
    return items


def _size(item: Item) -> tuple[int, int]:
    """(width, height); a file's header is enough."""
    if isinstance(item, np.ndarray):
        return item.shape[1], item.shape[0]
    with _opened(item) as image:
        return image.size


def _pixels(item: Item) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if isinstance(item, np.ndarray):
        return item
    with _opened(item) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _opened(item: Path | Image.Image) -> Iterator[Image.Image]:
    """The image of a file, or the image itself. Raises FileNotFoundError, or ValueError where it cannot be read."""
    if isinstance(item, Image.Image):
        yield item
        return
    if not item.is_file():
        raise FileNotFoundError(f"image {item} does not exist")
    try:
        with Image.open(item) as image:
            yield image
    except _UNREADABLE as error:
        raise ValueError(f"image {item} cannot be read: {error}") from None
