import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlproxi.telemetry import runlog
from rlproxi.telemetry.catalogue import CATALOGUE, lookup
from rlproxi.telemetry.runlog import RunLog, ended, read, series


def metrics(log: RunLog, step: int, **values) -> None:
    log.append("metrics", stage="rl", step=step, **values)


def test_a_run_has_ended_when_its_stages_are_done():
    def stage(name, status):
        return {"event": "stage", "name": name, "status": status}

    rl, report = [stage("rl", "start"), stage("rl", "done")], [stage("report", "start"), stage("report", "done")]
    assert not ended([], ["rl"], False) and ended([], None, True)
    assert not ended(rl, ["rl", "report"], False) and not ended(rl, None, False)
    assert ended(rl, ["rl"], False) and ended([*rl, *report], ["rl", "report"], True)
    assert not ended([*rl, *report, rl[0]], ["rl", "report"], True), "it was resumed"
    assert not ended([{"event": "stage"}, {"name": ["rl"], "status": {}}], ["rl"], True), "damaged records"
    for junk in ("rl", {}, 3, [["rl"]], [None]):
        assert not ended(rl, junk, False) and ended(rl, junk, True)


def test_records_come_back_in_order_with_plain_values(tmp_path):
    with RunLog(tmp_path / "run") as log:
        log.append("stage", name="pretrain", status="start")
        metrics(
            log,
            np.int64(1),
            a=np.float32(0.5),
            b=torch.tensor(2.0),
            c=float("nan"),
            d=np.inf,
            e=[np.bool_(True)],
            f={"x": np.arange(2)},
            g=tmp_path,
            h="Größe",
        )
        log.append("stage", name="pretrain", status="done", seconds=1.5)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and all("NaN" not in line and "Infinity" not in line for line in lines)
    first, second, third = read(tmp_path / "run")
    assert first["event"] == "stage" and first["time"] > 1.6e9 and first["time"] <= third["time"]
    assert {k: second[k] for k in ["step", "a", "b", "c", "d", "e", "f", "g", "h"]} == {
        "step": 1,
        "a": 0.5,
        "b": 2.0,
        "c": None,
        "d": None,
        "e": [True],
        "f": {"x": [0, 1]},
        "g": str(tmp_path),
        "h": "Größe",
    }
    assert runlog.stage_seconds([first, second, third]) == {"pretrain": 1.5}


def test_a_bad_record_is_refused_and_leaves_nothing_behind(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(ValueError, match="'metric' is unknown; choose one of metrics"):
        log.append("metric", stage="rl", step=1)
    with pytest.raises(ValueError, match="needs stage, step"):
        log.append("metrics", stage="rl")
    with pytest.raises(ValueError, match="sets 'time' and 'event' itself"):
        log.append("note", time=3)
    with pytest.raises(TypeError, match="bad.inner is a object"):
        metrics(log, 1, bad={"inner": object()})
    assert read(tmp_path) == [] and log.path.stat().st_size == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_holds_records_back_or_is_an_error(tmp_path):
    log, strict = RunLog(tmp_path, patient=True), RunLog(tmp_path / "strict")
    metrics(log, 1)
    with open("/dev/full", "ab", buffering=0) as full:
        (log.file, mine), (strict.file, its) = (full, log.file), (full, strict.file)
        metrics(log, 2)
        metrics(log, 3)
        with pytest.raises(OSError, match="No space left"):
            metrics(strict, 1)
    log.file, strict.file = mine, its
    assert [r["step"] for r in read(tmp_path)] == [1] and len(log.held) == 2
    metrics(log, 4)
    metrics(strict, 2)
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4] and not log.held
    assert [r["step"] for r in read(tmp_path / "strict")] == [2]


def test_what_was_written_in_part_is_written_again_whole(tmp_path):
    log = RunLog(tmp_path, patient=True)
    with open(log.path, "ab", buffering=0) as file:
        log.file, mine = Short(file), log.file
        metrics(log, 1)
        metrics(log, 2)
    log.file = mine
    metrics(log, 3)
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3]
    assert len(log.path.read_bytes().splitlines()) == 5, "two torn lines, each ended by what follows"


class Short:
    """A disk with room for ten bytes of each write."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        return self.file.write(data[:10])


def test_a_torn_last_line_is_skipped_and_the_next_writer_starts_a_new_one(tmp_path):
    log = RunLog(tmp_path)
    metrics(log, 1, loss=1.0)
    metrics(log, 2, loss=2.0)
    log.close()
    whole = log.path.read_bytes()
    for cut in range(1, len(whole) - whole.index(b"\n") - 1):
        log.path.write_bytes(whole[:-cut])
        assert series(read(tmp_path), "rl", "loss")[0] in ([1], [1, 2])  # all but the newline is still a record
        with RunLog(tmp_path) as again:
            metrics(again, 3, loss=3.0)
        assert series(read(tmp_path), "rl", "loss")[1][-1] == 3.0


def test_no_log_is_no_records(tmp_path):
    assert read(tmp_path) == [] and series([], "rl", "loss") == ([], [])


def test_series_honours_resume_duplicates_and_gaps(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 6):
        metrics(log, step, loss=float(step))
        log.append("metrics", stage="pretrain", step=step, loss=-1.0)
    log.append("resume", stage="rl", step=2)
    metrics(log, 3, loss=30.0)
    metrics(log, 3, loss=31.0)
    metrics(log, 4, loss=float("nan"), kl=0.1)
    steps, values = series(read(tmp_path), "rl", "loss")
    assert steps == [1, 2, 3, 4] and values[:3] == [1.0, 2.0, 31.0] and math.isnan(values[3])
    assert series(read(tmp_path), "pretrain", "loss") == ([1, 2, 3, 4, 5], [-1.0] * 5)
    assert series(read(tmp_path), "rl", "kl") == ([4], [0.1])
    assert runlog.keys(read(tmp_path), "rl") == ["loss", "kl"]


def test_several_processes_may_append_to_one_file(tmp_path):
    program = (
        "import sys; from rlproxi.telemetry.runlog import RunLog\n"
        "log = RunLog(sys.argv[1])\n"
        "for i in range(300): log.append('note', message=sys.argv[2] * 50, i=i)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 600
    for name in "ab":
        assert [r["i"] for r in map(json.loads, lines) if r["message"] == name * 50] == list(range(300))


def test_the_catalogue_knows_exact_names_before_patterns():
    assert lookup("reward/std").name == "reward/std" and lookup("reward/attributes").name == "reward/<name>"
    assert lookup("heldout/judge").unit == "reward" and lookup("nonsense") is None and lookup("reward/a/b") is None
    assert len({m.name for m in CATALOGUE}) == len(CATALOGUE)
    assert all(m.unit and m.help.endswith(".") and m.reading.endswith(".") for m in CATALOGUE)
