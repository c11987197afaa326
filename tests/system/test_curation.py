"""Curation on real Ray: from a config to shards, killed and resumed, and with workers that die."""

import json
import shutil
from pathlib import Path

import pytest

from fixtures import curation as fixtures
from fixtures import curation_models
from fixtures.run_processes import kill_when, launch
from rlproxi.data.shards import read_shard
from rlproxi.run import main
from rlproxi.telemetry.runlog import read

pytestmark = [pytest.mark.system, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "data-curate.yaml")


def _manifest(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def _run(base: Path, raw: Path, *overrides: str, code: int = 0) -> Path:
    """The stage through the front door, in this process; returns the folder of the output."""
    assert (
        main(
            [
                CONFIG,
                f"run.dir={base / 'runs'}",
                f"curate.urls=[{raw}]",
                f"curate.out={base / 'out'}",
                "curate.faces.min_size=64",
                *overrides,
            ]
        )
        == code
    )
    return base / "out"


def test_from_photographs_to_shards(ray_session, tmp_path):
    fixtures.write_mixed(tmp_path / "raw")
    out = _run(tmp_path, tmp_path / "raw", "curate.samples_per_shard=2")
    lines = {line["key"]: line for line in _manifest(out)}
    for key, (stage, told) in fixtures.MIXED.items():
        assert lines[key].get("stage") == stage
        assert told in lines[key]["reason"] if stage else lines[key]["tags"] == told
    summary = json.loads((out / "curation.json").read_text())
    assert (summary["samples"], summary["kept"], summary["raw_shards"], summary["shards"]) == (14, 3, 2, 2)
    assert [row["out"] for row in summary["funnel"]] == [11, 9, 5, 3]
    assert [sum(1 for _ in read_shard(str(out / f"0000{i}.tar"))) for i in (0, 1)] == [2, 1]
    assert (out / "curation.html").read_text().count("data:image/jpeg") == 11
    records = read(next((tmp_path / "runs").iterdir()))
    for stage in ("curate/examine", "curate/write"):
        steps = [r["step"] for r in records if r.get("stage") == stage]
        assert steps[-1] == 100 and steps == sorted(set(steps))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, list[str]]:
    """Twelve raw shards of four real faces, some of them copies of others, and overrides that make many steps."""
    base = tmp_path_factory.mktemp("many")
    for number in range(12):
        faces = [fixtures.real_face((number * 3 + i) % 40, 256 + 8 * number) for i in range(4)]
        samples = [(f"{number:05d}{i:04d}", fixtures.encoded(face), "a face", None) for i, face in enumerate(faces)]
        fixtures.write_tar(base / "raw" / f"{number:05d}.tar", samples)
    blip = curation_models.save_blip(base / "blip")
    return base / "raw", [
        f"curate.caption={{model: {blip}, max_tokens: 6, precision: float32}}",
        "curate.samples_per_shard=1",
        "curate.workers=1",
    ]


@pytest.mark.parametrize("stages", [("written",), pytest.param(("examined", "written"), marks=pytest.mark.exhaustive)])
def test_killed_and_resumed(stages, ray_session, many, tmp_path, monkeypatch):
    raw, overrides = many
    # Examining lasts long enough to be killed only where that is asked for.
    function = "fixtures.curation_functions:" + ("slow_brightness" if "examined" in stages else "brightness")
    bright = f"{{name: bright, scorer: python, min: 80, params: {{function: '{function}'}}}}"
    overrides = [*overrides, f"curate.filters=[{bright}]"]
    whole = _run(tmp_path / "whole", raw, *overrides)

    out, runs = tmp_path / "out", tmp_path / "runs"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    examined, written = out / "steps" / "examined", out / "steps" / "written"
    count = lambda folder: len(list(folder.glob("[0-9]*.jsonl")))  # noqa: E731
    ages = lambda folder: {p.name: p.stat().st_mtime_ns for p in folder.glob("[0-9]*.jsonl")}  # noqa: E731
    start = [
        CONFIG,
        f"run.dir={runs}",
        f"curate.urls=[{raw}]",
        f"curate.out={out}",
        "curate.faces.min_size=64",
        *overrides,
    ]
    resume, before = lambda: ["--resume", str(next(runs.iterdir()))], {}
    process = launch(start)
    if "examined" in stages:
        kill_when(process, lambda: count(examined) >= 3)
        before = ages(examined)
        assert 3 <= len(before) < 12 and not (out / "manifest.jsonl").exists()
        process = launch(resume())

    kill_when(process, lambda: count(written) >= 3)
    assert count(examined) == 12 and ages(examined).items() >= before.items(), "no shard was examined twice"
    before = ages(written)
    total = len(list(whole.glob("*.tar")))
    assert 3 <= len(before) < total

    last = launch(resume())
    output = last.communicate(timeout=240)[0]
    assert last.returncode == 0, output[-3000:]
    assert ages(written).items() >= before.items(), "no shard was written twice"
    assert _manifest(out) == _manifest(whole)
    assert sorted(p.name for p in out.glob("*.tar")) == sorted(p.name for p in whole.glob("*.tar"))
    for tar in out.glob("*.tar"):
        assert tar.read_bytes() == (whole / tar.name).read_bytes()
    sources = [sample.meta["source"]["key"] for tar in sorted(out.glob("*.tar")) for sample in read_shard(str(tar))]
    assert len(sources) == len(set(sources)) == total, "no sample twice"
    assert not [p for p in out.rglob(".*") if p.is_file()], "no drafts are left"
    assert sorted(p.name for p in (out / "steps").iterdir()) == ["examined", "written"], "no attempt's folder is left"


def test_a_worker_that_dies_repeats_its_shard(ray_session, many, tmp_path):
    raw, marker = tmp_path / "raw", tmp_path / "died"
    for n in range(3):
        captions = [f"die {marker}" if (n, i) == (1, 2) else "a face" for i in range(4)]
        samples = [
            (f"{n}{i:04d}", fixtures.encoded(fixtures.real_face(4 * n + i)), caption, None)
            for i, caption in enumerate(captions)
        ]
        fixtures.write_tar(raw / f"{n}.tar", samples)
    scorer = (
        "curate.filters=[{name: bright, scorer: python, params: {function: 'fixtures.curation_functions:die_once'}}]"
    )
    first = _run(tmp_path / "first", raw, scorer)
    assert marker.exists(), "the worker was killed"
    second = _run(tmp_path / "second", raw, scorer)
    assert _manifest(first) == _manifest(second) and len(_manifest(first)) == 12
    assert (first / "00000.tar").read_bytes() == (second / "00000.tar").read_bytes()


def test_what_cannot_work_ends_with_words(ray_session, many, tmp_path, capsys):
    raw = many[0]
    _run(tmp_path, raw, "curate.caption={model: /nowhere/blip}", code=2)
    assert "curate.caption.model: '/nowhere/blip'" in capsys.readouterr().err
    _run(tmp_path, raw, "curate.workers=1000", code=2)
    assert "curate.workers 1000 x num_cpus 1 asks for 1000 CPUs" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    _run(tmp_path, raw, f"curate.caption={{model: {broken}}}", code=2)
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_shard_that_cannot_be_opened(ray_session, many, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("00000.tar", "00002.tar"):
        shutil.copy(many[0] / name, raw / name)
    urls = f"curate.urls=[{raw}/{{00000..00002}}.tar]"
    _run(tmp_path, raw, f"curate.urls=['{raw}/{{00000..00002}}.tar']", code=2)
    told = capsys.readouterr().err
    assert "1 of 3 shards cannot be read" in told and "00001.tar" in told and "curate.unreadable=skip" in told
    out = _run(tmp_path, raw, urls.replace("[", "['").replace("]", "']"), "curate.unreadable=skip")
    assert {Path(line["shard"]).name for line in _manifest(out)} == {"00000.tar", "00002.tar"}
    assert json.loads((out / "curation.json").read_text())["unreadable_shards"] == [str(raw / "00001.tar")]
