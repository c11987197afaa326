"""The steps that need no model: hash, duplicates, faces, size; and the whole chain on photographs, without Ray."""

import json
import re
import shutil
import sys
import zlib
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from scipy.fft import dctn

from fixtures import curation as fixtures
from fixtures.onnx_writer import write_convolutions
from rlproxi.config.curation import Curate, Faces, Filter, HandDetector
from rlproxi.data.curation import faces, job, merge, pictures, plan, records, write
from rlproxi.data.curation.duplicates import duplicate_of, near_pairs
from rlproxi.data.curation.examine import Examiner
from rlproxi.data.curation.phash import distance, phash
from rlproxi.data.shards import Sample, ShardUnreadable, read_shard, write_shard
from rlproxi.errors import ConfigError
from rlproxi.files import draft
from rlproxi.pages import curation as page
from rlproxi.rewards import checked_params

CONFIG = Path(__file__).parents[2] / "configs" / "data-curate.yaml"


# -- perceptual hash ------------------------------------------------------------------------


def test_hash_is_the_cosine_transform_against_its_median():
    picture = fixtures.photograph("astronaut")
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    waves = dctn(grey, type=2)  # scipy's: same up to a factor
    order = sorted(((u, v) for u in range(32) for v in range(32)), key=lambda w: (w[0] ** 2 + w[1] ** 2, w[0]))[1:65]
    lowest = np.array([waves[u, v] for u, v in order])
    expected = int("".join("1" if bit else "0" for bit in lowest > np.median(lowest)), 2)
    assert phash(np.asarray(picture)) == expected
    assert expected.bit_count() == 32


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_hash_survives_copies_and_tells_pictures_apart(name):
    picture = fixtures.photograph(name)
    mine = phash(np.asarray(picture))
    for size in (0.5, 0.75, 1.5):
        copy = picture.resize([round(side * size) for side in picture.size], Image.Resampling.BICUBIC)
        for quality in (30, 90):
            with Image.open(BytesIO(fixtures.encoded(copy, quality=quality))) as again:
                assert distance(mine, phash(np.asarray(again))) <= 4
    brighter = np.clip(np.asarray(picture, int) * 0.8 + 30, 0, 255).astype(np.uint8)
    assert distance(mine, phash(brighter)) <= 4
    for other in {"astronaut", "coffee", "chelsea", "rocket"} - {name}:
        assert distance(mine, phash(np.asarray(fixtures.photograph(other)))) >= 20


def test_hash_of_a_flat_picture_is_zero():
    assert phash(np.full((300, 200, 3), 127, np.uint8)) == 0


# -- duplicates -----------------------------------------------------------------------------


def _planted(draw: np.random.Generator, count: int, distance_: int) -> np.ndarray:
    """Random hashes, half of them copies of others with up to a few bits more than ``distance_`` flipped."""
    hashes = draw.integers(0, 2**64, count, dtype=np.uint64)
    for i in range(count // 2, count):
        hashes[i] = hashes[draw.integers(0, i)]
        for bit in draw.choice(64, draw.integers(0, distance_ + 3), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    return hashes


@given(st.integers(0, 2**32), st.sampled_from([0, 1, 3, 4, 10, 16]))
def test_pairs_are_all_those_within_the_distance(seed, k):
    hashes = np.unique(_planted(np.random.default_rng(seed), 60, k))
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = [(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if apart[i, j] <= k]
    assert near_pairs(hashes, k).tolist() == [list(pair) for pair in expected]


def test_pairs_where_more_bands_pay(monkeypatch):
    from rlproxi.data.curation import duplicates

    hashes = np.unique(_planted(np.random.default_rng(1), 400, 4))
    expected = near_pairs(hashes, 4)
    assert len(expected) > 50
    assert duplicates.bands(400, 4) == 5 and duplicates.bands(15_000_000, 4) > 5
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    for parts in (6, 7, 9):
        monkeypatch.setattr(duplicates, "bands", lambda *_: parts)
        assert np.array_equal(near_pairs(hashes, 4), expected)


@given(st.integers(0, 2**32), st.sampled_from([0, 2, 4, 10]))
def test_kept_images_are_the_greedy_choice_whatever_the_order(seed, k):
    draw = np.random.default_rng(seed)
    hashes, pixels, names = _planted(draw, 50, k), draw.integers(1, 5, 50), draw.permutation(50)
    got = duplicate_of(hashes, pixels, names, k)
    kept: list[int] = []
    for i in sorted(range(50), key=lambda i: (-pixels[i], names[i])):
        near = [j for j in kept if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= k]
        assert got[i] == (near[0] if near else -1)
        kept += [] if near else [i]
    shuffled = draw.permutation(50)
    again = duplicate_of(hashes[shuffled], pixels[shuffled], names[shuffled], k)
    assert np.array_equal(np.where(again < 0, -1, shuffled[again]), got[shuffled])


def test_very_many_copies_of_one_picture_cost_nothing():
    """Equal hashes are one before pairs are made: 200,000 of them would make 2 * 10**10."""
    hashes = np.full(200_000, 12345, np.uint64)
    got = duplicate_of(hashes, np.arange(200_000), np.arange(200_000), 4)
    assert got[199_999] == -1 and (got[:-1] == 199_999).all()


# -- faces ----------------------------------------------------------------------------------


def test_the_cascade_finds_real_faces_and_nothing_in_other_pictures():
    detect = faces.build_detector(Faces(min_size=64))
    found = detect(np.asarray(fixtures.photograph("astronaut")))
    assert len(found) == 1 and found[0]["confidence"] > 4
    # The astronaut's eyes are near (205, 110) and (240, 110).
    assert found[0]["x"] < 200 and found[0]["x"] + found[0]["w"] > 245 and 60 < found[0]["y"] < 100
    real = [detect(np.asarray(fixtures.real_face(i))) for i in range(10)]
    assert sum(bool(one) and one[0]["confidence"] >= 4 for one in real) >= 8
    for name in ("coffee", "chelsea", "rocket", "coins"):
        assert faces.objection(detect(np.asarray(fixtures.photograph(name))), Faces(min_size=64)) is not None


def _yunet(folder: Path) -> Path:
    """A network in YuNet's layout that calls every white cell of 32 pixels a face, two cells wide and one high."""
    outputs = {}
    for name, channels in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            weight, bias = np.zeros((channels, 3, stride, stride)), np.zeros(channels)
            if stride == 32 and name in ("cls", "obj"):
                weight[:] = 1 / (3 * stride * stride * 255)
            if name == "bbox":
                bias[:] = (0.5, 0.5, np.log(2), 0)  # centre in the cell; log of width and height in cells
            outputs[f"{name}_{stride}"] = (weight, bias, stride)
    return write_convolutions(folder / "yunet.onnx", 640, outputs)


def test_yunet_by_path_in_pixels_of_the_image(tmp_path):
    detect = faces.build_detector(Faces(detector="yunet", model=str(_yunet(tmp_path))))
    image = np.zeros((320, 480, 3), np.uint8)
    image[64:96, 128:160] = 255
    assert detect(image) == [{"x": 112, "y": 64, "w": 64, "h": 32, "confidence": 1.0}]
    assert detect(np.zeros_like(image)) == []
    image = np.zeros((1280, 1280, 3), np.uint8)  # looked at in half its size
    image[128:192, 256:320] = 255
    assert detect(image) == [{"x": 224, "y": 128, "w": 128, "h": 64, "confidence": 1.0}]


def test_objections_in_words():
    face = {"x": 0, "y": 0, "w": 61, "h": 70, "confidence": 5.0}
    settings = Faces(min_size=128)
    assert faces.objection([], settings) == "no face"
    assert faces.objection([{**face, "confidence": 3.2}], settings) == "face confidence 3.2, needs 4"
    assert faces.objection([face], settings) == "face 61 px, needs 128"
    assert faces.objection([face], Faces(min_size=61)) is None
    assert faces.objection([face] * 3, Faces(min_size=61, max_faces=2)) == "3 faces, at most 2"
    assert faces.objection([face, {**face, "confidence": 1.0}], Faces(min_size=61, max_faces=1)) is None


@pytest.mark.parametrize(
    "settings, error, told",
    [
        (Faces(model="/nowhere.xml"), FileNotFoundError, "/nowhere.xml"),
        (Faces(model=__file__), ValueError, "is no cascade"),
        (Faces(detector="yunet", model="/nowhere.onnx"), FileNotFoundError, "/nowhere.onnx"),
        (Faces(detector="yunet", model=__file__), ValueError, "cannot read"),
    ],
)
def test_detector_files_that_cannot_be_used(settings, error, told):
    with pytest.raises(error, match=told):
        faces.build_detector(settings)


def test_without_opencv_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install "rlproxi\[data\]"'):
        faces.build_detector(Faces())


# -- one shard ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curation") / "raw"
    fixtures.write_mixed(folder)
    return folder


def _settings(raw: Path, **changes) -> Curate:
    return Curate(urls=[str(raw)], faces={"min_size": 64}, samples_per_shard=2, **changes)


def _run(settings: Curate, out: Path) -> merge.Statistics:
    """What the actors do, one after the other."""
    place, shards = records.Place(out), job.check(settings, out)
    examiner = Examiner(settings)
    with place.attempt():
        for shard in shards:
            mark = records.examine_fingerprint(settings, shard)
            place.write_lines(place.records(shard), map(asdict, examiner.examine(shard)), mark)
            assert records.is_done(place.records(shard), mark)
        found = plan.survivors(place, shards, settings)
        outputs = plan.outputs(found, shards, settings)
        for output in outputs:
            assert write.Writer(settings).write(output, place) == len(output)
        return merge.merge(place, shards, found, outputs, settings)


def _manifest(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({(line["shard"], line["index"]) for line in lines}) == len(lines)
    return {line["key"]: line for line in lines}


@pytest.fixture(scope="module")
def done(raw) -> tuple[Path, merge.Statistics]:
    """The curation of the two shards, for tests that only read it."""
    return raw.parent / "done", _run(_settings(raw), raw.parent / "done")


def test_every_sample_is_kept_or_explained(done):
    folder, statistics = done
    manifest = _manifest(folder)
    assert set(manifest) == set(fixtures.MIXED)
    for key, (stage, told) in fixtures.MIXED.items():
        if stage is None:
            assert (manifest[key]["status"], manifest[key]["tags"]) == ("kept", told)
        else:
            assert (manifest[key]["status"], manifest[key]["stage"]) == ("dropped", stage)
            assert told in manifest[key]["reason"]
    assert statistics.funnel() == [
        {"stage": "unreadable", "in": 14, "dropped": 3, "out": 11},
        {"stage": "size", "in": 11, "dropped": 2, "out": 9},
        {"stage": "faces", "in": 9, "dropped": 4, "out": 5},
        {"stage": "duplicates", "in": 5, "dropped": 2, "out": 3},
    ]


def test_curated_shards_hold_what_the_manifest_says(raw, done):
    folder = done[0]
    originals = {s.key: s for shard in sorted(raw.iterdir()) for s in read_shard(str(shard)) if hasattr(s, "image")}
    manifest, seen = _manifest(folder), 0
    for shard in sorted(folder.glob("*.tar")):
        for sample in read_shard(str(shard)):
            seen += 1
            source = originals[sample.meta["source"]["key"]]
            line = manifest[source.key]
            assert (line["output"], line["output_key"]) == (shard.name, sample.key)
            assert sample.image == source.image, "images are copied, not encoded again"
            assert sample.caption == sample.meta["caption"] == sample.meta["caption_original"] == source.caption
            with Image.open(BytesIO(sample.image)) as picture:
                assert picture.size == (sample.meta["width"], sample.meta["height"])
            assert int(sample.meta["phash"], 16) == phash(np.asarray(Image.open(BytesIO(sample.image))))
            assert sample.meta["faces"][0]["w"] >= 64 and sample.meta["scores"] == {}
            assert {k: sample.meta[k] for k in source.meta} == source.meta
    assert seen == 3 and [p.name for p in sorted(folder.glob("*.tar"))] == ["00000.tar", "00001.tar"]


def test_filters_by_scorers_and_their_order(raw, tmp_path):
    """The scorer 'jpeg' is minus the kilobytes of the image as a JPEG."""
    filters = [Filter(name="compact", scorer="jpeg", min=-60.0), Filter(name="busy", scorer="jpeg", max=-12.0)]
    statistics = _run(_settings(raw, filters=filters), tmp_path)
    manifest = _manifest(tmp_path)
    assert manifest["000000000"]["stage"] == "filter/compact" and "needs -60" in manifest["000000000"]["reason"]
    small = [key for key, line in manifest.items() if line.get("stage") == "filter/busy"]
    assert small and all("at most -12" in manifest[key]["reason"] for key in small)
    assert [row["stage"] for row in statistics.funnel()] == [
        "unreadable",
        "size",
        "faces",
        "filter/compact",
        "filter/busy",
        "duplicates",
    ]
    kept = [s for tar in tmp_path.glob("*.tar") for s in read_shard(str(tar))]
    assert kept and all(-60 <= s.meta["scores"]["compact"] <= -12 for s in kept)
    # Its larger copy is gone, so the smaller one stays: copies are sought among what passed.
    assert manifest["000010000"]["status"] == "kept"


def test_a_score_that_is_no_number_drops_the_sample(raw, monkeypatch):
    from rlproxi.rewards.jpeg import JPEGReward

    monkeypatch.setattr(JPEGReward, "score", lambda self, images, prompts: np.full(len(images), np.nan, np.float32))
    settings = _settings(raw, filters=[Filter(name="jpeg")])
    found = Examiner(settings).examine(job.check(settings, "/nowhere")[0])
    assert found[0].stage == "filter/jpeg" and found[0].reason == "jpeg gave no score (nan)"


def test_results_do_not_depend_on_the_batch_or_the_names_of_shards(raw, done, tmp_path):
    folder, statistics = done
    assert statistics.funnel() == _run(_settings(raw, batch=1), tmp_path / "b").funnel()
    assert _manifest(folder) == _manifest(tmp_path / "b")
    for name in ("00000.tar", "00001.tar"):
        assert (folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for old, new in (("00000", "00009"), ("00001", "00003")):
        (swapped / f"{new}.tar").write_bytes((raw / f"{old}.tar").read_bytes())
    _run(_settings(swapped), tmp_path / "c")
    kept = [{k for k, line in _manifest(one).items() if line["status"] == "kept"} for one in (folder, tmp_path / "c")]
    assert kept[0] == kept[1]


def test_hand_words_tag(raw, tmp_path):
    _run(_settings(raw, duplicates=None), tmp_path)
    manifest = _manifest(tmp_path)
    assert {k for k, line in manifest.items() if line.get("tags") == ["hands"]} == {"000000007"}  # 'Hand', in any case
    tagged = [s for tar in tmp_path.glob("*.tar") for s in read_shard(str(tar)) if s.meta["tags"]]
    assert [s.meta["hand_words"] for s in tagged] == [["hand"]]


def test_a_shard_that_changed_since_it_was_examined_is_refused(raw, tmp_path):
    settings = _settings(raw)
    _run(settings, tmp_path / "out")
    place, shards = records.Place(tmp_path / "out"), job.check(settings, tmp_path / "out")
    output = plan.outputs(plan.survivors(place, shards, settings), shards, settings)[0]
    swapped = tuple((shards[1 - shards.index(shard)], indices) for shard, indices in output.sources)
    for shard, other in zip(shards, reversed(shards)):
        place.records(shard).write_bytes((tmp_path / "out").joinpath(place.records(other)).read_bytes())
    with place.attempt(), pytest.raises(ShardUnreadable, match="has changed since it was examined"):
        write.Writer(settings).write(replace(output, sources=swapped), place)


def test_records_of_other_settings_are_not_reused(raw):
    shard = str(next(raw.iterdir()))
    marks = {
        records.examine_fingerprint(s, shard)
        for s in (_settings(raw), _settings(raw, min_size=300), _settings(raw, filters=[Filter(name="jpeg")]))
    }
    assert len(marks) == 3
    assert records.examine_fingerprint(_settings(raw, examples=1), shard) in marks


# -- the page -------------------------------------------------------------------------------


def test_the_page_is_one_file_that_fetches_nothing(done):
    statistics = done[1]
    found = {
        shard: pictures.peek(shard, wanted, 10**8)
        for shard, wanted in pictures.wanted(statistics, page.shown(statistics)).items()
    }
    html = page.render(statistics, found, "out")
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html and "<script" not in html
    assert html.count("data:image/jpeg;base64,") == 3 + 2 + 4 + 2  # all kept and dropped ones that can be shown
    assert "shorter side 200 px, needs 256" in html and "copy of 00000.tar/000000000 (512 x 512)" in html
    for name in ("shorter side, px", "largest face, px", "face confidence", "caption, words"):
        assert f"Histogram of {name}" in html
    assert "<td>damaged image</td>" in html and "21.4%" in html


def test_examples_are_the_same_whatever_the_order():
    found = [records.Record(i, f"{i}", width=10, height=10, words=1) for i in range(40)]
    chosen = []
    for order in (found, found[::-1]):
        statistics = merge.Statistics(Curate(examples=5))
        for record in order:
            statistics.drop(record, "a.tar", "size", "too small")
        chosen.append([example.index for example in statistics.examples("size")])
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 5
    assert chosen[0] == sorted(range(40), key=lambda i: zlib.crc32(f"a.tar/{i}".encode()))[:5]


# -- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"urls": []}, "curate.urls is empty"),
        ({"urls": ["/nowhere/*.tar"]}, "curate.urls: '/nowhere/.*matches no file"),
        ({"filters": [{"name": "beauty"}]}, "beauty"),
        ({"filters": [{"name": "jpeg", "params": {"quality": "high"}}]}, "quality"),
        ({"faces": {"model": "/nowhere.xml"}}, "curate.faces.model"),
        ({"caption": {"model": "/nowhere/blip"}}, "curate.caption.model"),
        ({"hands": {"detector": {"model": "./yolos"}}}, "curate.hands.detector.model"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(raw, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        job.check(Curate(**{"urls": [str(raw)], **changes}), tmp_path)


def test_output_folders_that_hold_something_else(raw, tmp_path):
    with pytest.raises(ConfigError, match="holds the raw shard 00000.tar"):
        job.check(_settings(raw), raw)
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="tars that no curation wrote"):
        job.check(_settings(raw), tmp_path)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"filters": [{"name": "jpeg"}, {"name": "jpeg"}]}, "jpeg appears twice"),
        ({"filters": [{"name": "jpeg", "min": 1.0, "max": 0.0}]}, "nothing would pass"),
        ({"faces": {"detector": "yunet"}}, "detector is 'yunet' but model is null"),
        ({"min_sise": 3}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_themselves(values, told):
    with pytest.raises(ValidationError, match=told):
        Curate(**values)


def test_a_missing_shard_is_told_apart_from_bad_samples(tmp_path):
    with pytest.raises(ShardUnreadable, match="gone.tar"):
        Examiner(Curate()).examine(str(tmp_path / "gone.tar"))


def test_what_earlier_jobs_left_is_removed(done, tmp_path):
    place = records.Place(tmp_path)
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    for name in ("00007.tar", "notes.tar", ".keep"):
        (tmp_path / name).write_bytes(b"")
    job.clear_stale(place, [plan.Output(0, (), "")])  # fewer than before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keep", "00000.tar", "manifest.jsonl", "notes.tar", "steps"]
    assert [p.name for p in place.written.iterdir()] == ["00000.jsonl"]


def _left(out: Path) -> list[str]:
    """Drafts, and folders of drafts."""
    return [p.name for p in out.rglob("*") if p.name.startswith((".", "drafts-"))]


def test_drafts_of_a_killed_run_are_removed(raw, tmp_path):
    """Whatever their random names are, and whichever file the process was writing."""
    killed = records.Place(tmp_path)
    killed.drafts.mkdir(parents=True)
    files = [killed.shard(3), killed.part(3), killed.records("a.tar"), tmp_path / "manifest.jsonl"]
    drafts = [draft(file, killed.drafts) for file in files * 20]
    for one in drafts:
        one.__enter__().write_text("half")
    assert len(_left(tmp_path)) == 81
    _run(_settings(raw), tmp_path)
    assert _left(tmp_path) == []


def test_a_worker_that_outlives_its_run_leaves_nothing(tmp_path):
    """The resumed run begins while a worker of the killed one writes, and ends before the worker does."""
    old, new = records.Place(tmp_path), records.Place(tmp_path)
    old.drafts.mkdir(parents=True)

    def samples():
        yield Sample("0", b"x", "old")
        with new.attempt():
            write_shard(new.shard(0), [Sample("0", b"x", "new")], new.drafts)
        yield Sample("1", b"x", "old")

    with pytest.raises(FileNotFoundError):
        write_shard(old.shard(0), samples(), old.drafts)
    with pytest.raises(FileNotFoundError):  # nor can it begin another file
        old.write_lines(old.records("a.tar"), [])
    assert [sample.caption for sample in read_shard(str(new.shard(0)))] == ["new"]
    assert _left(tmp_path) == []


# -- the shipped config -----------------------------------------------------------------------


def test_the_shipped_config_shows_every_default():
    values = yaml.safe_load(CONFIG.read_text())
    assert values["run"]["stages"] == ["curate"]
    assert set(values["curate"]) == set(Curate.model_fields)
    assert Curate(**values["curate"]) == Curate()


def test_the_examples_in_its_comments_are_valid():
    lines = []
    for line in CONFIG.read_text().splitlines():
        line = line.replace("  filters: []", "  filters:").replace("caption: null ", "caption: ")
        lines.append(re.sub(r"^    # (?=(- \{|model:|prompt:|max_tokens:|batch:|precision:))", "    ", line))
    settings = Curate(**yaml.safe_load("\n".join(lines))["curate"])
    assert [f.kind for f in settings.filters] == ["aesthetic", "clip"] and settings.caption.batch == 8
    for f in settings.filters:
        checked_params(f.kind, f.params)
    example = re.search(r"e\.g\. (\{model: .*\})", CONFIG.read_text()).group(1)
    assert HandDetector(**yaml.safe_load(example)).min_score == 0.3
