"""From shards to cached files, without Ray: what is in them, what is skipped, what makes a file another one."""

import json

import numpy as np
import pytest
import torch

from fixtures import tiny_checkpoints
from fixtures.shards import jpeg, png_chunk, png_header, sample, write_tar
from rlproxi.config.loading import build_config
from rlproxi.data.buckets import build_fit
from rlproxi.data.cache import (
    CachedShard,
    cached_file,
    captions,
    first_samples,
    manifest_path,
    parse_size,
    prompts_path,
    read_index,
    source_version,
    write_manifest,
    write_prompts,
)
from rlproxi.data.encode import Encoder, build_recipe, entry, identity
from rlproxi.data.images import decode
from rlproxi.data.shards import ShardUnreadable, Skip

SIZES = [(40, 40), (30, 60), (60, 30), (40, 52)]


def shard_config(tmp_path, **data):
    return build_config({"data": {"source": "shards", "urls": [str(tmp_path)], **data}})


def write(tmp_path, name="00000.tar", count=12, extra=()):
    samples = [sample(i, image=jpeg(*SIZES[i % 4], seed=i)) for i in range(count)]
    return write_tar(tmp_path / name, [*samples, *extra])


def run(config, url, path, parts=None, **options):
    return Encoder(build_recipe(config, parts), parts, **options).shard(url, path)


def test_a_cached_shard_holds_every_sample_as_its_own_computation_gives_it(tmp_path):
    url = write(tmp_path)
    found = run(shard_config(tmp_path, buckets=True), url, tmp_path / "c.safetensors", threads=2)
    fit = build_fit(32, True, "center", 0, 1, 8)
    cached = CachedShard(tmp_path / "c.safetensors")
    assert cached.counts() == found.rows == {(16, 32): 3, (24, 40): 3, (32, 16): 3, (32, 32): 3}
    assert not found.skipped and found.shard == url and found.file == "c.safetensors"
    keys = set()
    for bucket, count in cached.counts().items():
        for row in range(count):
            got = cached.row(bucket, row)
            number = int(got["key"])
            pixels, facts = fit(decode(jpeg(*SIZES[number % 4], seed=number), 10**6), got["key"])
            assert np.array_equal(got["image"], pixels) and got["size"].tolist() == list(facts)
            assert got["caption"] == f"picture number {number}"
            keys.add(number)
    assert keys == set(range(12)) and sorted(cached.captions()) == sorted(f"picture number {i}" for i in range(12))


def test_every_kind_of_bad_sample_is_skipped_counted_and_listed(tmp_path):
    bad = [
        sample(90, caption=" "),
        sample(91, image=jpeg(200, 200)[:-900]),
        sample(92, image=b"<html>"),
        sample(93, image=png_header(20_000, 20_000) + png_chunk(b"IDAT", b"")),
        sample(94, txt=None),
        sample(95, caption=b"\xff\xfe"),
        sample(3),
        sample(96, json=[1]),
    ]
    config = shard_config(tmp_path, max_pixels=10**6)
    urls = [write(tmp_path, extra=bad), str(tmp_path / "gone.tar")]
    cache = tmp_path / "cache"
    first = run(config, urls[0], cache / "a.safetensors")
    kinds = {
        "empty caption": 1,
        "damaged image": 1,
        "unknown image format": 1,
        "image too large": 1,
        "no caption": 1,
        "caption is not UTF-8": 1,
        "duplicate key": 1,
        "json is not an object": 1,
    }
    assert first.rows == {(32, 32): 12} and first.skipped == kinds
    assert entry(urls[0], cache / "a.safetensors") == first
    with pytest.raises(ShardUnreadable, match="unreadable file: FileNotFoundError"):
        run(config, urls[1], cache / "b.safetensors")
    assert [p.name for p in cache.iterdir()] == ["a.safetensors"]

    lost = Skip(urls[1], "", "unreadable file: gone")
    totals = write_manifest(config, cache, [first, type(first)(urls[1], None, {}, {lost.kind: 1})], [lost])
    assert totals == {"shards": 2, "samples": 12, "skipped": 9, "reasons": {**kinds, "unreadable file": 1}}
    head, *lines = map(json.loads, manifest_path(config, cache).read_text().splitlines())
    assert head == totals and len(lines) == 2 + 9
    assert {(line["shard"], line["key"]) for line in lines[2:]} == {
        (urls[0], f"{n:09d}") for n in (90, 91, 92, 93, 94, 95, 3, 96)
    } | {(urls[1], "")}
    assert next(line for line in lines[2:] if line["key"] == f"{93:09d}")["reason"].startswith("image too large: ")
    index = read_index(config, cache)
    assert index[0] == first and (index[1].file, index[1].rows) == (None, {})


def test_latents_and_text_are_what_the_checkpoint_gives(tmp_path):
    from rlproxi.models.autoencoder import Autoencoder
    from rlproxi.models.loading import load_encoder

    parts = str(tiny_checkpoints.sdxl(tmp_path / "sdxl"))
    (tmp_path / "data").mkdir()
    url = write(tmp_path / "data", count=10)
    config = build_config(
        {"data": {"source": "shards", "urls": [url], "size": 64, "cache_text": True}, "model": {"init": parts}}
    )
    run(config, url, tmp_path / "c.safetensors", parts)
    cached = CachedShard(tmp_path / "c.safetensors")
    vae, text = Autoencoder.from_pretrained(parts), load_encoder(parts)
    fit = build_fit(64, False, "center", 0)
    for row in (0, 8, 9):  # of the first batch, and of the last, which is not full
        got = cached.row((64, 64), row)
        pixels, _ = fit(decode(jpeg(*SIZES[row % 4], seed=row), 10**6), "")
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        reference = vae.encode(x)[0].numpy()
        assert got["latents"].dtype == np.float16 and np.allclose(got["latents"], reference, rtol=2e-3, atol=2e-3)
        assert np.abs(reference).max() > 0.1
        states = text.encode([got["caption"]])
        assert np.allclose(got["text_states"], states.states[0], rtol=2e-3, atol=2e-3)
        assert np.allclose(got["text_pooled"], states.pooled[0], atol=1e-6)
        assert np.array_equal(got["text_mask"], states.mask[0]) and "image" not in got


def test_what_float16_cannot_hold_is_skipped(tmp_path):
    from rlproxi.models.autoencoder import Autoencoder

    url = write(tmp_path, count=3)
    encoder = Encoder(build_recipe(shard_config(tmp_path), None), None)
    vae = Autoencoder(tiny_checkpoints.vae(scaling_factor=1e9))
    encoder.autoencoder = vae
    assert encoder.shard(url, tmp_path / "c.safetensors").skipped == {"latents beyond float16": 3}


def test_a_files_name_says_all_that_its_rows_depend_on(tmp_path):
    url = write(tmp_path)
    parts = tiny_checkpoints.sdxl(tmp_path / "sdxl")

    def name(**data):
        init = {"model": {"init": str(parts)}} if data.pop("init", False) else {}
        config = build_config(
            {
                "run": {"seed": data.pop("seed", 0)},
                **init,
                "data": {"source": "shards", "urls": [url], "size": 64, **data},
            }
        )
        return cached_file(tmp_path, url, source_version(url), build_recipe(config, init and str(parts)).fingerprint)

    names = [
        name(),
        name(size=128),
        name(buckets=True),
        name(crop="random"),
        name(crop="random", seed=1),
        name(max_pixels=5),
        name(init=True),
        name(init=True, cache_text=True),
    ]
    assert len(set(names)) == len(names) and all(n.name.startswith("00000-") for n in names)
    assert name() == name(seed=1) and name() == names[0]  # a centre crop knows no seed
    before = identity(parts, text=True), identity(parts, text=False)
    file = next((parts / "text_encoder_2").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert identity(parts, text=True) != before[0] and identity(parts, text=False) == before[1]
    write(tmp_path, count=13)
    assert name() != names[0]


def test_keys_that_do_not_fit_each_other_are_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match="data.cache_text is true, but the model works on pixels"):
        build_recipe(shard_config(tmp_path, cache_text=True), None)
    with pytest.raises(FileNotFoundError, match="vae"):
        build_recipe(shard_config(tmp_path), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing was encoded .* stage encode"):
        read_index(shard_config(tmp_path), tmp_path)


def test_prompts_are_distinct_captions_and_a_fair_sample_of_many(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [
            sample(i, caption=c)
            for i, c in enumerate(["two\nlines", "two lines", *(f"caption {i % 50}" for i in range(70))])
        ],
    )
    config = shard_config(tmp_path)
    found = run(config, str(tmp_path / "0.tar"), tmp_path / "0.safetensors")
    write_manifest(config, tmp_path, [found], [])
    assert len(list(captions(config, tmp_path))) == 72
    assert write_prompts(config, tmp_path) == 51
    every = prompts_path(config, tmp_path).read_text().splitlines()
    assert sorted(every) == sorted(["two lines", *(f"caption {i}" for i in range(50))])
    assert write_prompts(config, tmp_path, limit=20) == 20
    some = prompts_path(config, tmp_path).read_text().splitlines()
    assert some == every[:20]  # whatever the order they were met in


def test_first_samples_come_from_every_shard_and_one_bucket(tmp_path):
    config = shard_config(tmp_path, buckets=True)
    sizes = [(40, 40), (30, 60), (40, 40), (40, 40)]
    entries = []
    for n in range(3):
        samples = [sample(i, image=jpeg(*size, seed=10 * n + i)) for i, size in enumerate(sizes)]
        url = write_tar(tmp_path / f"{n}.tar", samples)
        entries.append(run(config, url, tmp_path / f"{n}.safetensors"))
    write_manifest(config, tmp_path, entries, [])
    samples = first_samples(config, tmp_path, 4)
    assert samples.shape == (4, 3, 32, 32) and samples.dtype == np.float32
    fit = build_fit(32, True, "center", 0)
    rows = [(0, 0), (0, 2), (1, 0), (1, 2)]  # two of each shard, until there are enough
    for got, (n, i) in zip(samples, rows):
        pixels = fit(decode(jpeg(40, 40, 10 * n + i), 10**6), "")[0]
        assert np.allclose(got, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert len(first_samples(config, tmp_path, 100)) == 9


def test_a_damaged_or_missing_cached_file_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match="x.safetensors is damaged .* delete it and encode again"):
        CachedShard(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="y.safetensors is gone from the cache"):
        CachedShard(tmp_path / "y.safetensors")
    assert parse_size("16x32") == (16, 32)


def test_an_empty_shard_is_an_empty_file(tmp_path):
    found = run(shard_config(tmp_path), write_tar(tmp_path / "0.tar", []), tmp_path / "0.safetensors")
    assert found.rows == {} and found.skipped == {} and list(CachedShard(tmp_path / "0.safetensors").captions()) == []
