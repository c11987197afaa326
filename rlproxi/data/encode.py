"""Encoding of one shard into its cached file: decoding, fitting to a bucket, and optionally latents and text states."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ..config.loading import Config
from .buckets import Fit, Size, build_fit
from .cache import CachedShard, Entry, Rows, digest
from .images import BadImage, decode
from .shards import Sample, Skip, read_whole_shard

#: Rows of a batch, all of one bucket, for the networks.
BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """Everything that rows depend on besides their shard."""

    fit: Fit
    max_pixels: int  # of ``decode``
    text: bool  # whether text states are cached
    weights: str  # ``identity`` of the autoencoder and text encoders; "" for pixels

    @property
    def fingerprint(self) -> str:
        """A hash of the recipe."""
        values = asdict(self)
        return digest(values.pop("fit") | values)


def build_recipe(config: Config, parts_folder: str | None) -> Recipe:
    """The recipe of a run. ``parts_folder``: a folder with vae/ and text encoders; None caches pixels.

    Raises FileNotFoundError or ValueError naming a part that is missing or unusable, or the key that needs it.
    """
    from ..models.folders import ModelFolder

    d, m = config.data, config.model
    if parts_folder is None and d.cache_text:
        remedy = "set it to false, or name a checkpoint in model.init or model.encoders"
        raise ValueError(f"data.cache_text is true, but the model works on pixels with its built-in encoder: {remedy}")
    factor = ModelFolder.at(parts_folder).latents.factor if parts_folder else 1
    # The bucket's step covers the sizes of a published network.
    levels = 1 if m.init else m.patch * (2 ** (len(m.channels) - 1) if m.kind == "unet" else 1)
    fit = build_fit(d.size, d.buckets, d.crop, config.run.seed if d.crop == "random" else 0, factor, factor * levels)
    if any(math.gcd(*size) % factor for size in fit.sizes):
        raise ValueError(f"data.size {d.size} is not a multiple of {factor}, the factor of the autoencoder: change it")
    weights = identity(parts_folder, d.cache_text) if parts_folder else ""
    return Recipe(fit, d.max_pixels, d.cache_text, weights)


def identity(folder: str, text: bool) -> str:
    """A hash of the weights and settings in vae/, and with ``text`` also of the text encoders' folders.

    It does not depend on where the folder is. Of a large file it covers the size and 64 pieces.
    """
    kinds = ("vae", "text_encoder*", "tokenizer*") if text else ("vae",)
    parts = sorted(part for kind in kinds for part in Path(folder).glob(kind))
    found = hashlib.blake2b(digest_size=16)
    for file in (f for part in parts for f in sorted(part.rglob("*")) if f.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size}".encode())
        with open(file, "rb") as data:
            for place in range(64):
                data.seek(place * size // 64)
                found.update(data.read(min(2**16, size)))
    return found.hexdigest()


class Encoder:
    """Encodes shards on one device. ``threads`` of them decode; Pillow releases the interpreter's lock."""

    def __init__(self, recipe: Recipe, parts_folder: str | None, device: str = "cpu", threads: int = 1):
        self.recipe, self.device, self.threads = recipe, device, threads
        self.autoencoder = self.text = None
        if parts_folder:
            from ..models.autoencoder import Autoencoder

            self.autoencoder = Autoencoder.from_pretrained(parts_folder, batch_size=BATCH).to(device)
            if recipe.text:
                from ..models.loading import load_encoder

                self.text = load_encoder(parts_folder)
                # The built-in encoder holds its model beside its tokenizer; a stack of encoders has `to` itself.
                getattr(self.text, "model", self.text).to(device)

    def shard(self, url: str, path: Path) -> Entry:
        """Encode one shard into ``path``. Raises ShardUnreadable if the storage fails, and then writes nothing."""
        rows = Rows()
        pending: dict[Size, list[dict]] = {}
        for item in self._pixels(url):
            if isinstance(item, Skip):
                rows.skips.append(item)
                continue
            bucket = item["image"].shape[:2]
            pending.setdefault(bucket, []).append(item)
            if len(pending[bucket]) == BATCH:
                self._flush(url, rows, bucket, pending.pop(bucket))
        for bucket, items in pending.items():
            self._flush(url, rows, bucket, items)
        rows.save(path, url)
        return entry(url, path)

    def _pixels(self, url: str) -> Iterator[dict | Skip]:
        """The shard's samples as pixels of a bucket, in order; the threads decode a few at a time."""
        items = read_whole_shard(url)
        with ThreadPoolExecutor(self.threads) as pool:
            while some := list(islice(items, 8 * self.threads)):
                yield from pool.map(lambda item: item if isinstance(item, Skip) else self._one(url, item), some)

    def _one(self, url: str, sample: Sample) -> dict | Skip:
        try:
            image, size = self.recipe.fit(decode(sample.image, self.recipe.max_pixels), sample.key)
        except BadImage as error:
            return Skip(url, sample.key, str(error))
        return {"image": image, "size": np.array(size, np.int32), "caption": sample.caption, "key": sample.key}

    @torch.no_grad()
    def _flush(self, url: str, rows: Rows, bucket: Size, items: list[dict]) -> None:
        if self.autoencoder is not None:
            x = torch.from_numpy(np.stack([item.pop("image") for item in items])).to(self.device)
            latents = self.autoencoder.encode(x.permute(0, 3, 1, 2).float() / 127.5 - 1).half().cpu().numpy()
            for item, value in zip(items, latents, strict=True):
                item["latents"] = value
        if self.text is not None:
            text = self.text.encode([item["caption"] for item in items])
            columns = {"text_states": text.states.half(), "text_pooled": text.pooled, "text_mask": text.mask.byte()}
            for name, values in columns.items():
                for item, value in zip(items, values.cpu().numpy(), strict=True):
                    item[name] = value
        for item in items:
            odd = next((n for n in ("latents", "text_states") if n in item and not np.isfinite(item[n]).all()), None)
            if odd:
                rows.skips.append(Skip(url, item["key"], f"{odd} beyond float16"))
            else:
                rows.add(bucket, **item)


def entry(url: str, path: Path) -> Entry:
    """The entry of a shard, read from its cached file."""
    cached = CachedShard(path)
    skipped = Counter(Skip(url, key, reason).kind for key, reason in cached.skips())
    return Entry(url, path.name, cached.counts(), dict(skipped))
