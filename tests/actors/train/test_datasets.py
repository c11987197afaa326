"""The stage encode and the datasets of pre-training on a real Ray: what dies, what is resumed, who reads what."""

import os
import threading
import time

import numpy as np
import psutil
import pytest
import ray
from ray.data.dataset import MaterializedDataset

from actors.cluster.join import ENVIRONMENT
from actors.data import encoder
from actors.run.log_writer import RunLogWriter
from actors.train import datasets as ingest
from fixtures.shards import jpeg, sample, write_tar
from rlproxi.config.loading import build_config
from rlproxi.data.cache import CachedShard, prompts_path, read_index
from rlproxi.data.encode import Encoder, build_recipe
from rlproxi.data.order import Order
from rlproxi.telemetry.runlog import read, series

pytestmark = pytest.mark.system

SIZES = [(40, 40), (30, 60), (60, 30)]


@pytest.fixture(scope="module")
def ray_here():
    ours = not ray.is_initialized()
    if ours:
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if ours:
        ray.shutdown()


def shard_config(folder, workers=1, steps=20, **data):
    return build_config(
        {
            "data": {"source": "shards", "urls": [str(folder)], "buckets": True, **data},
            "pretrain": {"batch_size": 8, "steps": steps},
            "resources": {"learner_workers": workers},
        }
    )


@pytest.fixture(scope="module")
def encoded(ray_here, tmp_path_factory):
    """(config, cache, what encode returned, run directory): five shards of a range of six, bad samples among them."""
    folder, run_dir = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("run")
    for n in range(5):
        good = [sample(100 * n + i, image=jpeg(*SIZES[(n + i) % 3], seed=i)) for i in range(20)]
        write_tar(folder / f"{n:05d}.tar", [*good, sample(100 * n + 50, caption=" ")])
    config = shard_config(folder / "{00000..00005}.tar")
    log = RunLogWriter.remote(str(run_dir))
    facts = encoder.encode(config, run_dir / "cache", None, log)
    ray.get(log.progress.remote("encode"))
    return config, run_dir / "cache", facts, run_dir


def test_encode_counts_and_tells_its_progress(encoded):
    config, cache, facts, run_dir = encoded
    assert {k: facts[k] for k in ("shards", "encoded", "samples", "skipped", "reasons", "unused", "prompts")} == {
        "shards": 6,
        "encoded": 5,
        "samples": 100,
        "skipped": 6,
        "reasons": {"empty caption": 5, "unreadable file": 1},
        "unused": 0,
        "prompts": 100,
    }
    steps, samples = series(read(run_dir), "encode", "samples")
    assert list(steps) == [2, 3, 4, 5, 6] and list(samples) == [20, 40, 60, 80, 100]
    assert len(prompts_path(config, cache).read_text().splitlines()) == 100


def test_a_second_run_encodes_only_what_changed(encoded, tmp_path):
    config, cache, *_ = encoded
    log = RunLogWriter.remote(str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    assert encoder.encode(config, cache, None, log)["encoded"] == 0
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")} == before
    # Another run, of one of the shards and a new one.
    urls = [read_index(config, cache)[0].shard, write_tar(tmp_path / "new.tar", [sample(i) for i in range(9)])]
    other = config.model_copy(update={"data": config.data.model_copy(update={"urls": urls})})
    facts = encoder.encode(other, cache, None, log)
    assert (facts["encoded"], facts["samples"], facts["shards"]) == (1, 29, 2)
    # The first run's lists are its own, though the cache is shared.
    assert sum(sum(e.rows.values()) for e in read_index(config, cache)) == 100


def test_data_without_a_usable_sample_or_a_whole_batch_stops_the_run(tmp_path):
    def finish(*samples):
        config = shard_config(tmp_path)
        url = write_tar(tmp_path / "0.tar", samples)
        result = Encoder(build_recipe(config, None), None).shard(url, tmp_path / "0.safetensors")
        return encoder.summarize(config, tmp_path, [result], 1, time.time())

    with pytest.raises(ValueError, match=r"none of 1 shards held a usable sample; skipped: \{'empty caption': 1\}"):
        finish(sample(0, caption=""))
    with pytest.raises(ValueError, match="no bucket fills a batch of 8"):
        finish(*(sample(i) for i in range(7)))


def test_a_killed_worker_costs_nothing_but_time(ray_here, tmp_path):
    image = jpeg(400, 300)
    urls = [write_tar(tmp_path / f"{n}.tar", [sample(i, image=image) for i in range(300)]) for n in range(4)]
    config, cache = shard_config(tmp_path), tmp_path / "cache"
    result = {}
    thread = threading.Thread(
        target=lambda: result.update(encoder.encode(config, cache, None, RunLogWriter.remote(str(tmp_path / "run"))))
    )
    thread.start()
    victim = None
    while victim is None and thread.is_alive():
        time.sleep(0.02)
        ours = psutil.Process().children(recursive=True)
        victim = next((p for p in ours if "EncodeWorker.encode" in _title(p)), None)
    assert victim is not None
    victim.kill()
    thread.join()
    assert (result["encoded"], result["samples"], result["skipped"]) == (4, 1200, 0)
    local = Encoder(build_recipe(config, None), None)
    for entry in read_index(config, cache):
        local.shard(entry.shard, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (cache / entry.file).read_bytes()
    assert sorted(e.shard for e in read_index(config, cache)) == urls


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def expected(config, cache, step):
    """The global batch of a step, straight from the files."""
    entries = [e for e in read_index(config, cache) if e.file]
    batch = Order([e.rows for e in entries], config.pretrain.batch_size, config.run.seed).batch(step)
    rows = [CachedShard(cache / entries[shard].file).row(batch.bucket, row) for shard, row in batch.rows]
    return {name: np.stack([row[name] for row in rows]) for name in ("image", "size")}, [row["caption"] for row in rows]


@pytest.mark.parametrize("read_first", [2**30, 0])
def test_two_ranks_read_the_order_from_any_step_on_streamed_or_not(encoded, monkeypatch, read_first):
    config, cache, *_ = encoded
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"learner_workers": 2})})
    monkeypatch.setattr(ingest, "READ_FIRST", read_first)
    start = 7  # in the first epoch of 12 batches, going on into the second
    datasets = [ingest.shards(config, cache, start, rank) for rank in (0, 1)]
    assert {isinstance(dataset, MaterializedDataset) for dataset in datasets} == {read_first > 0}
    ranks = [list(ingest.batches(dataset, 4)) for dataset in datasets]
    assert [len(rank) for rank in ranks] == [13, 13]
    shapes = set()
    for step, parts in enumerate(zip(*ranks), start):
        arrays, captions = expected(config, cache, step)
        for name, values in arrays.items():
            got = np.concatenate([part[name] for part in parts])
            assert got.dtype == values.dtype and np.array_equal(got, values)
        assert [c for part in parts for c in part["caption"]] == captions
        shapes.add(parts[0]["image"].shape)
    assert shapes == {(4, 16, 32, 3), (4, 32, 16, 3), (4, 32, 32, 3)}


def test_a_step_at_the_end_reads_nothing_and_nothing_encoded_is_an_error(encoded, tmp_path):
    config, cache, *_ = encoded
    assert list(ingest.batches(ingest.shards(config, cache, 20, 0), 8)) == []
    with pytest.raises(FileNotFoundError, match="nothing was encoded"):
        ingest.shards(config, tmp_path, 0, 0)
