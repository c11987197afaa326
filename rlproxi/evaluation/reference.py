"""Real images of a run, and the comparison of an evaluation's images with them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..config.loading import Config
from ..data import faces
from ..data.prompts import heldout_prompts
from ..seeds import Purpose, rng, seed_of
from .distance import SPACES, Features, Reference
from .diversity import diversity
from .spectrum import DataSpectrum

#: Real images that the data's statistics are computed from, and the fewest that are accepted.
COUNT, LEAST = 2048, 256
#: Portraits of more pixels than this take long to draw, so fewer of them are drawn.
_QUICK = 64 * 64
_BATCH = 32


def real_images(config: Config) -> Iterator[np.ndarray]:
    """Yield real images [size, size, 3].

    Source faces has no end. Portrait i is a new drawing for held-out prompt i modulo their number: it has what the
    caption says, and chance decides the rest. It has no hand where the caption names none, as in all captions of the
    data. Source shards gives the readable images of data.urls in order, fitted to the square as for training. Their
    captions are not the held-out prompts.
    """
    return _portraits(config) if config.data.source == "faces" else _photographs(config)


def _portraits(config: Config) -> Iterator[np.ndarray]:
    prompts = heldout_prompts(config)[1]
    source = seed_of(config.run.seed, Purpose.REFERENCE)
    drawn = (
        portrait_of(caption, rng(source, turn, place))
        for turn in itertools.count()
        for place, caption in enumerate(prompts)
    )
    while True:
        yield from faces.render(list(islice(drawn, _BATCH)), config.data.size)


def portrait_of(caption: str, draw: np.random.Generator) -> faces.Portrait:
    """Return a portrait as ``caption`` says, the rest by ``draw``; no hand unless the caption names one."""
    attributes = faces.draw_attributes(draw, hand_fraction=0) | faces.parse_caption(caption)
    return faces.Portrait(attributes, caption, draw.random(7))


def _photographs(config: Config) -> Iterator[np.ndarray]:
    from ..data.addresses import list_shards
    from ..data.buckets import build_fit
    from ..data.images import BadImage, decode
    from ..data.shards import Sample, read_shard

    d = config.data
    fit = build_fit(d.size, False, d.crop, config.run.seed)
    for item in itertools.chain.from_iterable(map(read_shard, list_shards(d.urls))):
        if isinstance(item, Sample):
            with contextlib.suppress(BadImage):  # the stage encode counts them
                yield fit(decode(item.image, d.max_pixels), item.key)[0]


def _batches(images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    while batch := list(islice(images, _BATCH)):
        yield np.stack(batch)


class Comparison:
    """Diversity, distance to data and spectrum of a run's evaluations, which all have the same number of images.

    The data's statistics are computed at the first call and kept, in about a second for portraits of 32 x 32. Without
    them no result has a distance, and ``note`` says what is missing and why.

    Attributes:
        data: the same figures of as many real images, none of which are the reference's: {"images", "distance",
            "spectrum", "diversity" (source faces alone, whose captions have many portraits)}. {} before the first call,
            and where the data hold too few images.
    """

    def __init__(self, config: Config, spaces: dict[str, Features] = SPACES):
        self.config, self.spaces = config, spaces
        self.reference: Reference | None = None
        self.spectrum = DataSpectrum()
        self.data: dict = {}
        self.note: str | None = None
        self._prepared, self._lock = False, threading.Lock()

    def __call__(self, images: np.ndarray) -> dict:
        """Return {"diversity", "distance": {"total", "layout", "texture"}, "spectrum": ``DataSpectrum.compare``}.

        images: uint8 [P * S, H, W, 3], prompt-major. Without statistics of the data there is diversity alone.
        """
        found: dict = {"diversity": diversity(images, self.config.evaluate.samples)}
        size = (self.config.data.size,) * 2
        if images.shape[1:3] != size:
            self.note = f"no distance to data: images are {images.shape[1]} x {images.shape[2]}, data.size is {size[0]}"
            return found
        with self._lock:  # calls may come from several threads, and the statistics are computed once
            if not self._prepared:
                self._prepare(len(images))
                self._prepared = True
        if self.reference is not None:
            found["distance"] = self.reference.distance(images)
            found["spectrum"] = self.spectrum.compare(images)
        return found

    def _prepare(self, images: int) -> None:
        d, real, count = self.config.data, real_images(self.config), COUNT
        if d.source == "faces":
            count = min(COUNT, max(LEAST, COUNT * _QUICK // d.size**2))
        try:
            reference = Reference(self.spectrum.seen(_batches(islice(real, count))), self.spaces)
            if reference.images < LEAST:
                raise ValueError(f"data.urls hold {reference.images} readable images, {LEAST} are needed")
        except Exception as error:  # a storage has errors of its own, and an evaluation must not end the run
            self.note = f"no distance to data: {' '.join(str(error).split())}"
            return
        self.reference = reference
        own = list(islice(real, images))
        if len(own) < images:  # the figures of another number of images would mislead
            self.note = f"no distance of real images: data.urls hold {len(own)} beside the reference, not {images}"
            return
        self.data = {
            "images": images,
            "distance": reference.distance(np.stack(own)),
            "spectrum": self.spectrum.compare(np.stack(own)),
        }
        if d.source == "faces":
            # Portraits go round the prompts: sample-major to prompt-major.
            samples = self.config.evaluate.samples
            rounds = np.stack(own).reshape(samples, images // samples, *own[0].shape)
            self.data["diversity"] = diversity(rounds.swapaxes(0, 1).reshape(images, *own[0].shape), samples)
