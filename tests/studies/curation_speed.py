"""How many images one core curates in a second of its time, and what the search for duplicates costs.

    python tests/studies/curation_speed.py --images 400 --hashes 15000000

Images are scikit-image's photographs and faces as JPEGs of 512 x 512 pixels, made different by crops.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fixtures import curation as fixtures  # noqa: E402
from rlproxi.config.curation import Curate, Faces, Filter  # noqa: E402
from rlproxi.data.curation import plan, records, write  # noqa: E402
from rlproxi.data.curation.duplicates import bands, duplicate_of  # noqa: E402
from rlproxi.data.curation.examine import Examiner  # noqa: E402
from rlproxi.data.curation.faces import build_detector  # noqa: E402
from rlproxi.data.curation.phash import phash  # noqa: E402
from rlproxi.data.images import decode  # noqa: E402
from rlproxi.data.shards import read_shard  # noqa: E402


def raw_shard(folder: Path, count: int) -> Path:
    """A tar of ``count`` images, no two alike."""
    draw, samples = np.random.default_rng(0), []
    names = ("astronaut", "coffee", "chelsea", "rocket")
    for i in range(count):
        if i % 2:
            picture = fixtures.real_face(i // 2 % 100, 600)
        else:
            picture = fixtures.photograph(names[i // 2 % 4]).resize((600, 600))
        left, top = draw.integers(0, 88, 2)
        picture = picture.crop((left, top, left + 512, top + 512))
        samples.append((f"{i:09d}", fixtures.encoded(picture, quality=90), "a picture", {}))
    return fixtures.write_tar(folder / "00000.tar", samples)


def rate(name: str, work: Callable, items: Iterable) -> None:
    """Prints how many items a second ``work`` does."""
    begun, count = time.process_time(), 0
    for item in items:
        work(item)
        count += 1
    print(f"{name:<44} {count / (time.process_time() - begun):8.0f} images/s")


def steps(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = str(raw_shard(Path(folder) / "raw", count))
        samples = list(read_shard(shard))
        images = [decode(sample.image, 10**8) for sample in samples[:100]]
        rate("read a tar", lambda sample: None, read_shard(shard))
        rate("decode a JPEG of 512 x 512", lambda sample: decode(sample.image, 10**8), samples)
        rate("perceptual hash", phash, images)
        for smallest in (64, 128):
            rate(f"faces, cascade, min_size {smallest}", build_detector(Faces(min_size=smallest)), images)
        for name, settings in (
            ("size, faces (min_size 128), hash", Curate()),
            ("size, hash", Curate(faces=None)),
            ("size, faces, JPEG size as filter, hash", Curate(filters=[Filter(name="jpeg")])),
        ):
            examiner, begun = Examiner(settings), time.process_time()
            found = examiner.examine(shard)
            seconds = time.process_time() - begun
            passed = sum(record.stage is None for record in found)
            print(f"examine: {name:<35} {count / seconds:8.0f} images/s, {passed} of {count} pass")
        place, settings = records.Place(Path(folder) / "out"), Curate(faces=None, duplicates=None)
        with place.attempt():
            place.write_lines(place.records(shard), map(asdict, Examiner(settings).examine(shard)), "")
            outputs = plan.outputs(plan.survivors(place, [shard], settings), [shard], settings)
            begun = time.process_time()
            write.Writer(settings).write(outputs[0], place)
        print(f"{'write without models (captions stay)':<44} {count / (time.process_time() - begun):8.0f} images/s")


def search(count: int, distance: int) -> None:
    """Random hashes, a tenth of them copies with up to three bits flipped."""
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, count, dtype=np.uint64)
    copies = count // 10
    flips = np.bitwise_or.reduce(np.uint64(1) << draw.integers(0, 64, (3, copies), dtype=np.uint64))
    hashes[-copies:] = hashes[:copies] ^ flips
    pixels, names = draw.integers(2**16, 2**20, count, dtype=np.uint32), np.arange(count, dtype=np.int32)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = duplicate_of(hashes, pixels, names, distance)
    seconds, most = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"duplicates among {count:,} hashes, distance {distance}, {bands(count, distance)} bands: {seconds:.0f} s, "
        f"{int((found >= 0).sum()):,} found ({copies:,} planted), memory {before / 2**20:.2f} -> {most / 2**20:.2f} "
        "GiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--distance", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    __import__("cv2").setNumThreads(1)
    steps(options.images)
    search(options.hashes, options.distance)
