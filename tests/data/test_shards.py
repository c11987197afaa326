"""Shards as webdataset writes them, whole and damaged in every way that was thought of."""

import io
import tarfile
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.shards import jpeg, sample, write_tar
from rlproxi.data.addresses import list_shards
from rlproxi.data.shards import Sample, Skip, read_shard, write_shard


def read(path):
    items = list(read_shard(str(path)))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Skip)]


@pytest.fixture
def good(tmp_path):
    return write_tar(tmp_path / "00000.tar", [sample(i) for i in range(5)])


def test_what_webdataset_wrote_is_read_in_order(good):
    samples, skips = read(good)
    assert not skips and [s.key for s in samples] == [f"{i:09d}" for i in range(5)]
    assert [s.caption for s in samples] == [f"picture number {i}" for i in range(5)]
    assert [s.image for s in samples] == [jpeg(seed=i) for i in range(5)]
    assert samples[3].meta == {"key": "000000003", "status": "success", "width": 32}


def test_webdataset_reads_what_we_write(tmp_path):
    written = [Sample(f"a/{i:05d}", jpeg(seed=i), f"café {i}", {"n": i} if i else {}) for i in range(3)]
    assert write_shard(tmp_path / "x.tar", iter(written)) == 3
    assert read(tmp_path / "x.tar") == (written, [])
    theirs = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False))
    assert [(t["__key__"], t["jpg"], t["txt"].decode()) for t in theirs] == [
        (s.key, s.image, s.caption) for s in written
    ]


def test_writing_is_repeatable_whole_and_keeps_the_kind_of_image(tmp_path):
    from fixtures.shards import encoded, smooth

    images = [encoded(smooth(8, 8), kind) for kind in ("PNG", "WEBP", "JPEG")]
    samples = [Sample(str(i), image, "x") for i, image in enumerate(images)]
    for name in "ab":
        write_shard(tmp_path / name, samples)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as archive:
        assert [n for n in archive.getnames() if not n.endswith("txt")] == ["0.png", "1.webp", "2.jpg"]

    def breaking():
        yield samples[0]
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a", breaking())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("key", ["", "a.b", "a/", "/a", ".x", "./a"])
def test_keys_the_layout_cannot_hold_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="cannot be a key"):
        write_shard(tmp_path / "x.tar", [Sample(key, b"x", "x")])
    with pytest.raises(ValueError, match="'k' comes twice"):
        write_shard(tmp_path / "x.tar", [Sample("k", b"x", "x")] * 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad, kind",
    [
        (sample(1, caption=" \n"), "empty caption"),
        (sample(1, txt=None), "no caption"),
        (sample(1, jpg=None), "no image"),
        (sample(1, image=b""), "empty image"),
        (sample(1, caption=b"caf\xe9"), "caption is not UTF-8"),
        (sample(1, json=["a", "list"]), "json is not an object"),
        (sample(1, json=None, **{"JSON": b"{cut"}), "json is not readable"),
        (sample(0), "duplicate key"),
    ],
)
def test_one_bad_sample_is_a_skip_with_its_reason(tmp_path, bad, kind):
    path = write_tar(tmp_path / "x.tar", [sample(0), bad, sample(2)])
    samples, skips = read(path)
    assert [s.key for s in samples] == ["000000000", "000000002"]
    assert [(s.shard, s.key, s.kind) for s in skips] == [(path, bad["__key__"], kind)]


def test_other_members_and_hidden_files_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in [
            ("./", None),
            ("./._0.jpg", b"?"),
            ("./0.jpg", jpeg()),
            ("./0.seg.png", b"mask"),
            ("./0.npy", b"x"),
            ("./0.txt", b"\xef\xbb\xbfone\n"),
            ("README", b"x"),
            ("./1.txt", b"two"),
            ("./1.PNG", b"x"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            archive.addfile(info, io.BytesIO(data or b""))
    samples, skips = read(tmp_path / "x.tar")
    assert [(s.key, s.caption, s.image) for s in samples] == [("0", "one", jpeg()), ("1", "two", b"x")] and not skips


def test_a_compressed_tar_reads_alike(good, tmp_path):
    import gzip

    (tmp_path / "z.tar.gz").write_bytes(gzip.compress(Path(good).read_bytes()))
    assert read(tmp_path / "z.tar.gz") == read(good)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "z.tar.gz").read_bytes()[:-400])
    samples, skips = read(tmp_path / "cut.tar.gz")
    assert [s.kind for s in skips] == ["damaged tar"] and len(samples) < 5


def members(path):
    """(where a member's data ends, its name) of a whole tar."""
    with tarfile.open(path) as archive:
        return [(info.offset_data + info.size, info.name) for info in archive]


@settings(max_examples=40)
@given(data=st.data())
def test_a_tar_cut_at_any_byte_gives_the_samples_before_it_and_says_so(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    path = write_tar(folder / "x.tar", [sample(i) for i in range(4)])
    whole, content = read(path)[0], Path(path).read_bytes()
    ends = members(path)
    last = -(-ends[-1][0] // 512) * 512  # zeros follow
    length = data.draw(st.one_of(st.integers(0, last + 511), st.sampled_from([at for at, _ in ends])))
    (folder / "x.tar").write_bytes(content[:length])
    samples, skips = read(path)
    assert [s.kind for s in skips if not s.key] == ["damaged tar"]
    # webdataset writes jpg, json, txt: a sample that has its caption is whole.
    assert samples == whole[: len(samples)]
    assert len(samples) >= sum(at <= length - 512 for at, name in ends if name.endswith("txt"))
    assert all(s.kind == "no caption" for s in skips if s.key)


@settings(max_examples=40)
@given(at=st.integers(0, 12_000), junk=st.binary(min_size=1, max_size=2000))
def test_random_bytes_anywhere_are_never_an_exception_and_never_silent_about_lost_samples(tmp_path_factory, at, junk):
    folder = tmp_path_factory.mktemp("junk")
    path = write_tar(folder / "x.tar", [sample(i) for i in range(4)])
    content = bytearray(Path(path).read_bytes())
    content[at : at + len(junk)] = junk
    (folder / "x.tar").write_bytes(content)
    samples, skips = read(path)
    # Inside an image the bytes are the image's own affair; a sample that is gone leaves a Skip.
    assert len(samples) == 4 or skips
    assert all(s.reason for s in skips)


def test_a_hole_of_zeros_is_not_taken_for_the_end(good):
    content = bytearray(Path(good).read_bytes())
    with tarfile.open(good) as archive:
        starts = [i.offset for i in archive]
    content[starts[6] : starts[6] + 1024] = bytes(1024)
    Path(good).write_bytes(content)
    samples, skips = read(good)
    assert len(samples) == 2 and [s.reason for s in skips] == [
        "damaged tar: the rest of it is lost (data after the end-of-archive mark)"
    ]


def test_a_file_that_is_not_there_empty_or_no_tar_is_one_skip(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"hello " * 1000)
    for name, kind in [
        ("none.tar", "unreadable file"),
        ("none.parquet", "unreadable file"),
        ("empty.tar", "damaged tar"),
        ("text.tar", "damaged tar"),
    ]:
        samples, (skip,) = read(tmp_path / name)
        assert not samples and (skip.key, skip.kind) == ("", kind), name
    assert read("nowhere://x.tar")[1][0].kind == "unreadable file"


def test_a_storage_that_fails_on_the_way_is_told_from_a_damaged_file(monkeypatch):
    fs = fsspec.filesystem("memory")
    with fs.open("/flaky/x.tar", "wb") as file, webdataset.TarWriter(file) as writer:
        for i in range(40):
            writer.write(sample(i))

    class Flaky(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 30_000:
                raise ConnectionError("reset by peer")
            return super().read(size)

    monkeypatch.setattr(type(fs), "open", lambda self, path, mode: Flaky(self.store[path].getvalue()))
    samples, skips = read("memory://flaky/x.tar")
    assert samples and [s.reason for s in skips] == ["unreadable file: ConnectionError: reset by peer"]


# -- parquet --------------------------------------------------------------------------------


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_rows_are_samples(tmp_path, nested):
    images = [jpeg(seed=i) for i in range(3)]
    column = [{"bytes": i, "path": None} for i in images] if nested else images
    path = parquet(tmp_path / "x.parquet", image=column, text=["a", "b", "c"], score=[0.5, 1.0, 2.0], thumb=[b"x"] * 3)
    samples, skips = read(path)
    assert not skips and [(s.key, s.image, s.caption, s.meta) for s in samples] == [
        (f"{i:09d}", images[i], "abc"[i], {"score": 2.0**i / 2}) for i in range(3)
    ]


def test_bad_parquet_rows_and_files_are_skips(tmp_path):
    path = parquet(
        tmp_path / "x.parquet",
        key=["a.0", "b", "c", "b"],
        jpg=[jpeg(), None, jpeg(), jpeg()],
        caption=["good", "no image", " ", "twice"],
    )
    samples, skips = read(path)
    assert [s.key for s in samples] == ["a_0"]
    assert [(s.key, s.kind) for s in skips] == [("b", "no image"), ("c", "empty caption"), ("b", "duplicate key")]
    (skip,) = read(parquet(tmp_path / "y.parquet", url=["x"], caption=["y"]))[1]
    assert skip.reason == "no such column: none of image, jpg, jpeg, png, webp among url, caption"
    content = Path(path).read_bytes()
    for damaged in (content[:-20], content[:40] + bytes(200) + content[240:], b"PAR1"):
        (tmp_path / "x.parquet").write_bytes(damaged)
        samples, skips = read(path)
        assert len(samples) <= 1 and skips[-1].kind == "damaged parquet"


# -- addresses ------------------------------------------------------------------------------


def test_list_shards_expands_files_folders_globs_and_ranges(tmp_path):
    names = ["00000.tar", "00001.tar", "00003.tar", "00000.parquet", "rows.parquet", "00000_stats.json"]
    for name in names:
        (tmp_path / name).touch()
    path = lambda *names: [str(tmp_path / n) for n in names]  # noqa: E731
    every = path("00000.tar", "00001.tar", "00003.tar", "rows.parquet")
    assert list_shards([str(tmp_path)]) == every == list_shards([f"{tmp_path}/*", f"{tmp_path}/00001.tar"])
    # A metadata table beside its tar is no shard, unless it is asked for by name; a gap in a range is reported later.
    assert list_shards([f"{tmp_path}/00000.parquet"]) == path("00000.parquet")
    assert list_shards([f"{tmp_path}/{{00000..00002}}.tar"]) == path("00000.tar", "00001.tar", "00002.tar")
    assert list_shards([f"{tmp_path}/000{{0..0}}{{0..1}}*", f"{tmp_path}/0000?.tar"]) == every[:3]


@pytest.mark.parametrize("url", ["none.tar", "*.tar", "{00..09}.tar", "sub", "", "sub/{0..3}.tar"])
def test_what_matches_nothing_is_named(tmp_path, url):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="matches no file") as error:
        list_shards([f"{tmp_path}/{url}"])
    assert repr(f"{tmp_path}/{url}") in str(error.value)


def test_bad_addresses_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ends before it begins"):
        list_shards([f"{tmp_path}/{{9..1}}.tar"])
    with pytest.raises(ValueError, match="not an address that fsspec can open"):
        list_shards(["nowhere://x.tar"])

    def absent(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError, match=r"'s3://bucket/\*\.tar' needs a package .*: Install s3fs"):
        list_shards(["s3://bucket/*.tar"])


def test_remote_shards_read_like_local_ones(good):
    fs = fsspec.filesystem("memory")
    for name in ("00000.tar", "00001.tar"):
        fs.pipe(f"/remote/set/{name}", Path(good).read_bytes())
    urls = ["memory:///remote/set/00000.tar", "memory:///remote/set/00001.tar"]
    for pattern in ("memory://remote/set", "memory://remote/set/*.tar", "memory://remote/set/{00000..00001}.tar"):
        assert list_shards([pattern]) == urls
    assert read(urls[1])[0] == read(good)[0]
    with pytest.raises(ValueError, match="matches no file"):
        list_shards(["memory://remote/other/{0..3}.tar"])
