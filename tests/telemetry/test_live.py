"""Reading a run directory while it grows: exact where it can be, bounded always, and nothing in the files ends it."""

import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlproxi.telemetry import gallery, runlog, timeline
from rlproxi.telemetry.live import LiveRun
from rlproxi.telemetry.live import files as live_files
from rlproxi.telemetry.live.curve import BUCKETS, TAIL, Curve
from rlproxi.telemetry.live.digest import KEPT_EVENTS, KEPT_GALLERIES, MAX_SERIES
from rlproxi.telemetry.live.files import NotThere, Timeline
from rlproxi.telemetry.live.hub import Hub
from rlproxi.telemetry.live.lines import Lines, spread
from rlproxi.telemetry.live.run import totals
from rlproxi.telemetry.runlog import RunLog

ROOT = Path(__file__).parents[2]


def settle(run: LiveRun) -> LiveRun:
    """Reads until there is nothing more."""
    for _ in range(1000):
        run.advance(5.0)
        if run.complete:
            return run
    raise AssertionError("never complete")


def opened(path) -> LiveRun:
    run = LiveRun(path)
    run.open()
    return settle(run)


# -- one curve --------------------------------------------------------------------------------

values = st.one_of(st.none(), st.floats(-1e6, 1e6))


@given(st.lists(values, max_size=300), st.sampled_from([2, 4, 10]))
def test_buckets_hold_the_points_that_were_added(points, limit):
    series = Curve(limit, tail=7)
    for step, value in enumerate(points):
        series.add(step, value)
    assert len(series) <= limit
    assert list(series.tail) == list(enumerate(points))[-7:]
    edges = list(zip(series.first, series.last))
    assert [e for first, last in edges for e in range(first, last + 1)] == list(range(len(points)))
    for i, (first, last) in enumerate(edges):
        inside = [v for v in points[first : last + 1] if v is not None]
        assert series.size[i] == last - first + 1 and series.count[i] == len(inside)
        if inside:
            assert series.low[i] == min(inside) and series.high[i] == max(inside)
            assert series.total[i] == pytest.approx(sum(inside), abs=1e-6)


@given(st.integers(0, 120), st.integers(-1, 130))
def test_a_cut_drops_what_lies_behind_it_and_tells_when_a_bucket_is_in_the_way(count, at):
    series = Curve(8)
    for step in range(count):
        series.add(step, float(step))
    before = list(zip(series.first, series.last))
    exact = series.cut(at)
    assert not series.last or series.last[-1] <= at
    assert all(step <= at for step, _ in series.tail)
    assert exact == (not any(first <= at < last for first, last in before))
    series.add(at + 1, -5.0)
    assert series.tail[-1] == (at + 1, -5.0) and len(series) <= 8


def test_a_small_curve_is_exact_and_the_last_of_two_records_of_a_step_wins():
    series = Curve()
    for step, value in [(1, 0.1), (2, None), (4, 0.4), (4, 0.5), (2, 0.2), (3, 0.3)]:
        series.add(step, value)
    assert series.buckets() == {"stride": 1, "x": [1, 2, 3, 4], "y": [0.1, 0.2, 0.3, 0.5]}


# -- lines ------------------------------------------------------------------------------------


def test_lines_are_followed_by_offset_and_a_torn_one_waits(tmp_path):
    file = tmp_path / "log"
    lines = Lines(file)
    assert lines.read() is None and lines.size() == 0
    file.write_bytes(b"one\ntwo\nth")
    assert lines.read() == [(0, b"one"), (4, b"two")] and lines.read() is None
    with open(file, "ab") as more:
        more.write(b"ree\n\nfour\n")
    assert lines.read() == [(8, b"three"), (15, b"four")]
    file.write_bytes(b"new\n")  # shorter: another file
    assert lines.read() == [(0, b"new")] and lines.again == 1


def test_an_endless_line_is_passed_over_and_not_kept(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(b"a\n" + b"x" * 5_000_000 + b"\nb\n")
    lines, found, held = Lines(file, limit=1 << 16), [], 0
    for _ in range(40):
        found += lines.read() or []
        held = max(held, len(lines.rest))
    assert [line for _, line in found] == [b"a", b"", b"b"] and held <= 1 << 16


def test_a_sample_of_a_file_covers_its_whole_range_with_whole_lines(tmp_path):
    file = tmp_path / "log"
    rows = [f"{i:07d} {'x' * (i % 60)}" for i in range(200_000)]
    file.write_text("\n".join(rows) + "\n")
    found = [line.decode() for line in spread(file, 300, file.stat().st_size)]
    numbers = [int(line[:7]) for line in found]
    assert found == [rows[n] for n in numbers] and numbers == sorted(set(numbers))
    assert numbers[0] == 0 and numbers[-1] == 199_999
    gaps = np.diff(numbers)
    assert len(numbers) >= 300 and gaps.max() < 200_000 / 300 * 1.5


# -- a run --------------------------------------------------------------------------------------


def write(log: RunLog, steps, stage="rl", **more):
    for step in steps:
        log.append("metrics", stage=stage, step=step, **{"reward/mean": step / 1000, **more})


def test_curves_events_and_progress_of_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {algorithm: r0}\nrl: {steps: 20}\npretrain: {steps: 9}\n")
    with RunLog(tmp_path) as log:
        log.append("stage", name="rl", status="start")
        log.append("resume", stage="rl", step=0)
        write(log, range(1, 11), text="words", flag=True, many=[1, 2], huge=10**400)
        log.append(
            "evaluation",
            stage="rl",
            tag="before",
            step=0,
            steps=3,
            heldout={"judge": {"mean": 0.5, "sem": 0.01, "missing": 2}},
            train={"a": {"mean": 0.4, "sem": 0.0}},
            details={"judge": {"hat": 0.9}},
            diversity=0.2,
            distance={"total": 1.5},
        )
        log.append("samples", stage="rl", step=10, file="samples/000010.json")
        log.append("warning", message="x" * 5000)
    run = opened(tmp_path)
    found = run.snapshot()
    json.dumps(found, allow_nan=False)
    assert set(found["curves"]["rl"]) == {"reward/mean", "huge"}
    assert found["curves"]["rl"]["reward/mean"] == {
        "stride": 1,
        "x": [*range(1, 11)],
        "y": [i / 1000 for i in range(1, 11)],
    }
    assert found["curves"]["rl"]["huge"]["y"] == [None] * 10
    assert {name: c["y"] for name, c in found["curves"]["evaluation@3"].items()} == {
        "heldout/judge": [0.5],
        "heldout/judge/sem": [0.01],
        "train/a": [0.4],
        "train/a/sem": [0.0],
        "details/judge/hat": [0.9],
        "diversity": [0.2],
        "distance/total": [1.5],
    }
    assert found["galleries"] == [10] and len(found["events"]["warning"][0]["message"]) == 600
    assert found["events"]["resume"][0]["restart"] is False
    assert found["exact"] and found["read"] == 1.0 and found["malformed"] == 0
    progress = found["progress"]
    assert (progress["stage"], progress["step"], progress["total"], progress["done"]) == ("rl", 10, 20, False)
    assert progress["eta"] == pytest.approx(10 * progress["seconds_per_step"])
    assert totals(run.config()[1]) == {"pretrain": 9, "rl": 20}


def test_news_are_what_has_come_since(tmp_path):
    with RunLog(tmp_path) as log:
        write(log, [1, 2])
        run = opened(tmp_path)
        assert run.advance() == []
        write(log, [3])
        log.append("alarm", stage="rl", step=3, message="look", best=1)
        first = run.advance()
        assert first[0] == ["points", "rl", 3, {"reward/mean": 0.003}]
        assert first[1][0] == "event" and first[1][1]["message"] == "look"
        log.append("resume", stage="rl", step=1)
        write(log, [2])
        cut, points = run.advance()
        assert cut[:3] == ["cut", "rl", 1] and cut[3]["restart"] and points[2] == 2
        (tmp_path / "evaluation").mkdir()
        assert run.advance() == [["evaluations"]]
        write(log, range(3, 2000))
        changes = run.advance()
        assert changes is None or run.advance() is None or not run.complete  # too many to tell one by one
        assert settle(run).snapshot()["curves"]["rl"]["reward/mean"]["x"][-1] == 1999


@pytest.mark.parametrize(
    "cuts", [[(900, 100)], [(3000, 2990), (3500, 17), (2000, 16)], [(5000, 0)], [(2500, 2499)] * 3]
)
def test_a_resumed_run_is_what_the_run_log_says_it_is(tmp_path, cuts):
    """Against runlog.series, which holds everything: also where a resume goes back into merged points."""
    rng = random.Random(0)
    with RunLog(tmp_path) as log:
        step = 0
        for until, back in cuts:
            while step < until:
                step += 1
                log.append("metrics", stage="rl", step=step, v=rng.random())
            log.append("resume", stage="rl", step=back)
            step = back
        for later in range(step + 1, step + 1200):
            log.append("metrics", stage="rl", step=later, v=rng.random())
    run = opened(tmp_path)
    steps, wanted = runlog.series(runlog.read(tmp_path), "rl", "v")
    curve, shown = run.digest.curves["rl"]["v"], run.snapshot()
    assert shown["exact"] and curve.first[0] == steps[0] and curve.last[-1] == steps[-1]
    assert list(curve.tail) == list(zip(steps, wanted))[-TAIL:][-len(curve.tail) :] and len(curve.tail) >= min(
        TAIL, 1100
    )
    at = {step: value for step, value in zip(steps, wanted)}
    for first, last, size, total in zip(curve.first, curve.last, curve.size, curve.total):
        inside = [at[s] for s in range(first, last + 1) if s in at]
        assert size == len(inside) and total == pytest.approx(sum(inside))


def test_what_is_no_record_is_survived_and_counted(tmp_path):
    with RunLog(tmp_path) as log:
        write(log, [1])
    bad = [
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"event": 5}',
        b'{"event": "metrics", "stage": "rl"}',
        b'{"event": "metrics", "stage": 3, "step": 2}',
        b'{"event": "metrics", "stage": "rl", "step": true}',
        b'{"event": "resume", "stage": "rl", "step": "2"}',
        b"[" * 100_000,
        b'{"event":"metrics","stage":"rl","step":1e3}',
        b'{"event": "metrics", "stage": "rl", "step": ' + b"9" * 5000 + b"}",
        b"x" * 2_000_000,
        b'{"event": "evaluation", "steps": {}, "step": []}',
        b'{"event": "stage", "name": ["rl"], "status": 1, "time": 1e999}',
    ]
    good = [
        b'{"event": "metrics", "stage": "rl", "step": 3, "reward/mean": NaN, "time": "now"}',
        b'{"event": "unheard of"}',
        b'{"event": "evaluation", "steps": {}, "step": 1}',
        b'{"event": "evaluation", "stage": [], "steps": 3, "step": 1, "heldout": [1], '
        b'"train": {"a": {"b": {"c": {"d": 1}}}}}',
        b'{"event": "stage", "name": "rl", "status": "start", "time": 1e999}',
        b'{"event": "warning", "message": null}',
    ]
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join([*bad, *good]) + b'\n{"event": "metrics", "stage": "rl", "st')
    run = opened(tmp_path)
    found = run.snapshot()
    json.dumps(found, allow_nan=False)
    assert found["malformed"] == len(bad)
    assert found["curves"]["rl"]["reward/mean"] == {"stride": 1, "x": [1, 3], "y": [0.001, None]}
    with RunLog(tmp_path) as log:  # ends the torn line
        write(log, [4])
    run.advance()
    assert run.snapshot()["malformed"] == len(bad) + 1
    assert run.snapshot()["curves"]["rl"]["reward/mean"]["x"] == [1, 3, 4]


def test_a_log_that_is_replaced_is_read_anew(tmp_path):
    with RunLog(tmp_path) as log:
        write(log, range(1, 50))
    run = opened(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with RunLog(tmp_path) as log:
        write(log, [7])
    assert run.advance() is None
    assert settle(run).snapshot()["curves"]["rl"]["reward/mean"]["x"] == [7]


def test_what_is_kept_is_bounded(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for i in range(3000):
            file.write(
                json.dumps({"event": "metrics", "stage": f"s{i}", "step": 1, f"name{i}": 1.0, "y" * 500: 1}) + "\n"
            )
            file.write(json.dumps({"event": "warning", "message": f"number {i}", "time": i}) + "\n")
            file.write(json.dumps({"event": "samples", "stage": "rl", "step": i, "file": "x"}) + "\n")
    found = opened(tmp_path).snapshot()
    assert sum(map(len, found["curves"].values())) == MAX_SERIES and found["refused"] > 0
    assert len(found["events"]["warning"]) == KEPT_EVENTS and found["counts"]["warning"] == 3000
    assert len(found["galleries"]) <= KEPT_GALLERIES and found["galleries"][0] == 0 and found["galleries"][-1] == 2999


BIG = r"""
import json, re, sys, time
begun = time.perf_counter(), time.process_time()
from pathlib import Path
from rlproxi.telemetry.live import LiveRun
run = LiveRun(Path(sys.argv[1]))
run.open()
first = json.loads(json.dumps(run.snapshot(), allow_nan=False))
opened = time.perf_counter() - begun[0], time.process_time() - begun[1]
end = time.process_time() + float(sys.argv[2])
while not run.complete and time.process_time() < end:
    run.advance(1.0)
last = run.snapshot()
# Not getrusage: its peak outlives exec, so a process begun by a large one begins with that one's.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
curve = {key: value for key, value in last["curves"]["rl"]["v0"].items() if key != "tail"}
print(json.dumps({"opened": opened, "cpu": time.process_time() - begun[1], "complete": run.complete,
                  "first": first["curves"]["rl"]["v0"], "exact": [first["exact"], last["exact"]], "last": curve,
                  "size": len(json.dumps(last)), "mib": peak,
                  "heavy": sorted({"torch", "ray", "numpy", "PIL"} & set(sys.modules))}))
"""


def long_log(folder: Path, count: int) -> None:
    """``count`` records of five curves, v0 = step."""
    tails = [", ".join(f'"v{k}": {math.sin(i * k):.6f}' for k in range(1, 5)) for i in range(499)]
    with open(folder / "metrics.jsonl", "w", buffering=1 << 20) as file:
        for i in range(1, count + 1):
            file.write(
                f'{{"time": {1.7e9 + i}, "event": "metrics", "stage": "rl", "step": {i}, "v0": {i}, '
                f"{tails[i % 499]}}}\n"
            )


# The time is held where it is asked for: beside other tests the machine, not the page, would be measured.
@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.exhaustive)])
def test_a_long_log_opens_in_two_seconds_and_300_mb(tmp_path, count):
    long_log(tmp_path, count)
    answer = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path), "120"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert not told["heavy"]
    if count == 1_000_000:
        assert min(told["opened"]) < 2.0, told["opened"]
    x, y = told["first"]["x"], told["first"]["y"]
    assert told["first"]["first"][0] == 1 and x[-1] == count and max(np.diff(x)) < count / 100
    assert np.allclose(y, (np.array(x) + np.array(told["first"]["first"])) / 2, atol=count / 200)
    assert told["mib"] < 300 and told["size"] < 2_000_000
    assert told["complete"] and told["exact"] == [False, True]
    last = told["last"]
    assert last["first"][0] == 1 and last["x"][-1] == count and len(last["x"]) <= BUCKETS
    # Every record has been seen: the means of consecutive numbers are known.
    assert np.allclose(last["y"], (np.array(last["first"]) + np.array(last["x"])) / 2, rtol=1e-5)


# -- other files ----------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path):
    """A run with a gallery and an evaluation as the run writes them."""
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 8, 6, 3), dtype=np.uint8)
    gallery.write(
        folder,
        10,
        9,
        [
            gallery.GalleryGroup(
                "a <b>hat</b>",
                3,
                images[:4],
                np.array([0.1, np.nan, 0.9, 0.5]),
                {"judge": np.array([0.1, np.nan, 0.9, 0.5])},
            )
        ],
    )
    np.savez_compressed(folder / "samples" / "before-N3.npz", images=images, heldout=np.arange(12, dtype=np.float32))
    (folder / "evaluation" / "before.json").write_text(
        json.dumps(
            {
                "tag": "before",
                "iteration": 0,
                "prompts": ["p", "q", "r"],
                "samples": 4,
                "headline_steps": 3,
                "by_steps": {"3": {}, "5": {}},
            }
        )
    )
    return folder, images


def test_a_gallery_as_the_run_writes_it(run_dir):
    folder, images = run_dir
    (group,) = live_files.gallery(folder, 10)
    assert group["prompt"] == "a <b>hat</b>" and group["rewards"] == [0.1, None, 0.9, 0.5]
    assert (group["best"], group["worst"], group["picture"]) == (2, 0, True)
    picture = np.array(Image.open(io.BytesIO(live_files.gallery_picture(folder, 10, 0))))
    assert (picture == np.concatenate(list(images[:4]), 1)).all()
    for step, number in ((11, 0), (10, 1), (10, -1), (-1, 0)):
        with pytest.raises(NotThere):
            live_files.gallery_picture(folder, step, number)


def test_pictures_of_an_evaluation_are_its_prompts_samples(run_dir):
    folder, images = run_dir
    (entry,) = live_files.evaluations(folder)
    assert entry["steps"] == [3] and entry["prompts"] == ["p", "q", "r"] and entry["samples"] == 4
    data = live_files.evaluation_picture(folder, "before", 3, 2)
    assert (np.array(Image.open(io.BytesIO(data))) == np.concatenate(list(images[8:]), 1)).all()
    assert live_files.evaluation_scores(folder, "before", 3, 2) == [8.0, 9.0, 10.0, 11.0]
    for tag, steps, prompt in (
        ("before", 3, 3),
        ("before", 5, 0),
        ("after", 3, 0),
        ("../run/before", 3, 0),
        ("", 3, 0),
    ):
        with pytest.raises(NotThere):
            live_files.evaluation_picture(folder, tag, steps, prompt)
        with pytest.raises(NotThere):
            live_files.evaluation_scores(folder, tag, steps, prompt)


def both(folder):
    return live_files.evaluation_picture(folder, "before", 3, 0), live_files.evaluation_scores(folder, "before", 3, 0)


def test_damaged_and_hostile_archives_are_refused(run_dir):
    folder, _ = run_dir
    file = folder / "samples" / "before-N3.npz"
    whole = file.read_bytes()
    hostile = {
        "pickled": {"images": np.array([{}] * 12, object), "heldout": np.zeros(12)},
        "floats": {"images": np.zeros((12, 2, 2, 3)), "heldout": np.zeros(12)},
        "columns": {"images": np.asfortranarray(np.zeros((12, 2, 2, 3), np.uint8)), "heldout": np.zeros(12)},
        "no scores": {"images": np.zeros((12, 2, 2, 3), np.uint8)},
    }
    for arrays in hostile.values():
        np.savez(file, **arrays)
        with pytest.raises(NotThere):
            both(folder)
    for data in (b"", b"PK\x03\x04", whole[:200], whole[:-30], whole[:300] + b"\0" * 40 + whole[340:]):
        file.write_bytes(data)
        with pytest.raises(NotThere):
            both(folder)


def test_nothing_outside_the_run_directory_is_read(run_dir, tmp_path):
    folder, _ = run_dir
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    samples = folder / "samples"
    (samples / "link.png").symlink_to(secret)
    os.mkfifo(samples / "pipe.png")
    (samples / "text.png").write_text("no picture")
    for image in (
        "../secret.png",
        "samples/../../secret.png",
        str(secret),
        "samples/link.png",
        "samples/pipe.png",
        5,
        None,
        "config.yaml",
        "samples/text.png",
        "samples/",
        "samples/\0.png",
        "samples/missing.png",
    ):
        (samples / "000020.json").write_text(json.dumps({"groups": [{"image": image, "rewards": [1]}]}))
        with pytest.raises(NotThere):
            live_files.gallery_picture(folder, 20, 0)
    (samples / "000030.json").symlink_to(tmp_path / "outside.json")
    (tmp_path / "outside.json").write_text('{"groups": []}')
    with pytest.raises(NotThere):
        live_files.gallery(folder, 30)
    (folder / "evaluation" / "after.json").symlink_to(tmp_path / "outside.json")
    assert [entry["tag"] for entry in live_files.evaluations(folder)] == ["before"]


def test_the_timeline_is_the_newest_iterations(tmp_path):
    follow = Timeline(tmp_path, iterations=3)
    assert follow.read() == []
    for step in range(1, 6):
        timeline.append(tmp_path, "rl", step, [timeline.Span("rollout", 0, "sample", 100.0 + step, 0.5)])
    assert [line["step"] for line in follow.read()] == [3, 4, 5]
    assert follow.read()[-1]["spans"] == [("rollout", 0, "sample", 105.0, 0.5)]
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write(
            '{"stage": "rl", "step": 6, "spans": [[1]]}\nnot json\n'
            '{"stage": "rl", "step": 7, "spans": [["a", "b", "c", "d", 1]]}\n'
        )
    timeline.append(tmp_path, "rl", 5, [timeline.Span("learner", 1, "train", 107.0, 0.5)])  # resumed
    assert [(line["step"], line["spans"][0][0]) for line in follow.read()] == [
        (3, "rollout"),
        (4, "rollout"),
        (5, "learner"),
    ]
    assert [line["step"] for line in Timeline(tmp_path, tail=300).read()][-1] == 5


# -- several runs -----------------------------------------------------------------------------------


def test_a_hub_numbers_the_news_of_its_runs(tmp_path):
    logs = {name: RunLog(tmp_path / name) for name in "ab"}
    for log in logs.values():
        write(log, [1])
    hub = Hub([tmp_path])
    assert {run["id"] for run in hub.listing()} == {"a", "b"}
    cursor = hub.snapshot("a")["cursor"]
    hub.snapshot("b")
    hub.close()  # from here on the test takes the steps
    for name, step in (("a", 2), ("b", 5), ("a", 3)):
        write(logs[name], [step])
        hub.step()
    now, news = hub.after(cursor, {"a"})
    told = [json.loads(text)["changes"] for _, text in news]
    assert [change[2] for changes in told for change in changes if change[0] == "points"] == [2, 3]
    assert hub.after(news[0][0], {"a"})[1] == news[1:] and hub.after(now, {"a", "b"}) == (now, [])
    for lost in ("", "x", "other-1", f"{hub.boot}-999999", f"{hub.boot}--1"):
        assert hub.after(lost, {"a"}) == (now, None)
    with pytest.raises(KeyError):
        hub.snapshot("../a")


def test_a_hub_refuses_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Hub([tmp_path / "no"])
    with pytest.raises(FileNotFoundError, match="is not a run directory and holds none"):
        Hub([tmp_path])
