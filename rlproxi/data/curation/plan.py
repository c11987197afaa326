"""The plan after all raw shards are examined: which samples stay, and which curated shard each goes into."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...config.curation import Curate
from .duplicates import duplicate_of
from .records import Place, examine_fingerprint, fingerprint, load_records


@dataclass(frozen=True)
class Survivors:
    """The samples that passed the steps of single images, in the order (shard, index): 28 bytes each."""

    shard: np.ndarray  # int32, the position in the list of raw shards
    index: np.ndarray  # int32, the position in the shard
    phash: np.ndarray  # uint64
    pixels: np.ndarray  # uint32
    duplicate: np.ndarray  # int64, which of these samples is kept instead of this one, else -1


def survivors(place: Place, shards: Sequence[str], settings: Curate) -> Survivors:
    """Read all records and find the duplicates over all shards."""
    columns = {"shard": array("i"), "index": array("i"), "phash": array("Q"), "pixels": array("I")}
    names = array("i")
    for number, shard in enumerate(shards):
        alive = [r for r in load_records(place.records(shard)) if r.stage is None]
        columns["shard"].extend([number] * len(alive))
        columns["index"].extend(r.index for r in alive)
        columns["phash"].extend(r.hash for r in alive)
        columns["pixels"].extend((r.width or 0) * (r.height or 0) for r in alive)
        # Ranks of names: by the order of shards, and within a shard by key, whatever its position in the file.
        by_name = sorted(range(len(alive)), key=lambda i: (alive[i].key, alive[i].index))
        names.extend((np.argsort(by_name) + len(names)).tolist())
    arrays = {name: np.frombuffer(column, column.typecode) for name, column in columns.items()}
    duplicate = np.full(len(names), -1)
    if settings.duplicates and len(names):
        ranks = np.frombuffer(names, "i")
        duplicate = duplicate_of(arrays["phash"], arrays["pixels"], ranks, settings.duplicates.distance)
    return Survivors(**arrays, duplicate=duplicate)


@dataclass(frozen=True)
class Output:
    """One curated shard: ``sources`` are (raw shard, indices in it), in the order in which they are written."""

    number: int
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    fingerprint: str  # of all that the content depends on, so that a resumed job knows which shards are done

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.sources)


def outputs(found: Survivors, shards: Sequence[str], settings: Curate) -> list[Output]:
    """The curated shards: the kept samples in the order (raw shard, index), ``samples_per_shard`` in each."""
    kept, plans = np.flatnonzero(found.duplicate < 0), []
    for number, start in enumerate(range(0, len(kept), settings.samples_per_shard)):
        part = kept[start : start + settings.samples_per_shard]
        source, index = found.shard[part], found.index[part]
        sources = [(shards[shard], tuple(index[source == shard].tolist())) for shard in np.unique(source)]
        mark = fingerprint(
            number,
            settings.model_dump(mode="json", include={"caption", "hands"}),
            [(shard, indices, examine_fingerprint(settings, shard)) for shard, indices in sources],
        )
        plans.append(Output(number, tuple(sources), mark))
    return plans
