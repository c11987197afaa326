"""Checks before a curation begins, and the removal of what earlier jobs left."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...config.curation import Curate
from ...errors import ConfigError
from ...rewards import checked_params
from ..addresses import list_shards
from . import faces, models
from .captions import KEY as CAPTION_KEY
from .hands import KEY as HANDS_KEY
from .plan import Output
from .records import Place


def check(settings: Curate, out: str | os.PathLike) -> list[str]:
    """The raw shards, sorted. Raises ConfigError, with the key and the remedy, for settings that cannot work."""
    if not settings.urls:
        raise ConfigError("curate.urls is empty: name at least one tar or parquet file, folder or glob")
    try:
        shards = list_shards(settings.urls)
        for f in settings.filters:
            checked_params(f.kind, f.params)
        if settings.faces:
            faces.build_detector(settings.faces)  # takes milliseconds; no other model is loaded
        if settings.caption:
            models.check_name(settings.caption.model, CAPTION_KEY)
        if settings.hands and settings.hands.detector:
            models.check_name(settings.hands.detector.model, HANDS_KEY)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise ConfigError(f"curate: {str(error).replace('data.urls', 'curate.urls')}") from None
    _check_out(Path(out), shards)
    return shards


def _check_out(out: Path, shards: Sequence[str]) -> None:
    for shard in map(Path, shards):
        if shard.resolve().parent == out.resolve():
            raise ConfigError(f"curate.out: {str(out)!r} holds the raw shard {shard.name}; choose another folder")
    if out.is_dir() and not Place(out).examined.is_dir() and any(out.glob("*.tar")):
        raise ConfigError(f"curate.out: {str(out)!r} holds tars that no curation wrote; choose an empty folder")


def clear_stale(place: Place, plans: Sequence[Output]) -> None:
    """Remove curated shards beyond ``plans``, which earlier jobs with other settings or raw shards wrote."""
    names = {place.shard(plan.number).name for plan in plans}
    for path in place.out.iterdir():
        if re.fullmatch(r"\d{5}\.tar", path.name) and path.name not in names:
            place.part(int(path.stem)).unlink(missing_ok=True)
            path.unlink()
