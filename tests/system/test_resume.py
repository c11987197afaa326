"""One run, killed (SIGKILL, with its whole Ray) in every stage and resumed each time, against the unbroken one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlproxi.telemetry.runlog import read, series

pytestmark = [pytest.mark.system, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")


def _launch(arguments: list[str]) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen([sys.executable, "-m", "rlproxi.run", *arguments], cwd=ROOT, env=environment,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _kill_when(process: subprocess.Popen, reached, timeout: float = 240.0) -> None:
    """SIGKILLs the session, Ray's processes included, as soon as ``reached()``."""
    end = time.time() + timeout
    while not reached():
        assert process.poll() is None, f"ended before it was killed:\n{process.stdout.read()[-3000:]}"
        assert time.time() < end, "the point to kill at was never reached"
        time.sleep(0.02)
    # Workers have process groups of their own and would go on for seconds after the driver's.
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
    process.wait()


def _has(folder: Path, stage: str, step: int) -> bool:
    return any(r.get("stage") == stage and r["event"] == "metrics" and r["step"] >= step for r in read(folder))


def test_killed_in_every_stage_and_resumed(smoke, tmp_path):
    folder = lambda: next(iter(tmp_path.iterdir()))  # noqa: E731
    started = lambda stage: any(r["event"] == "stage" and r["name"] == stage for r in read(folder()))  # noqa: E731
    process = _launch([SMOKE, f"run.dir={tmp_path}", "pretrain.log_every=1"])
    _kill_when(process, lambda: any(tmp_path.iterdir()) and (folder() / "metrics.jsonl").exists() and started("prepare"))
    resume = ["--resume", str(folder())]
    for reached in (lambda: _has(folder(), "pretrain", 11), lambda: started("before"), lambda: _has(folder(), "rl", 3),
                    lambda: started("after")):
        _kill_when(_launch(resume), reached)
    last = _launch(resume)
    output = last.communicate(timeout=240)[0]
    assert last.returncode == 0, output[-3000:]

    records = read(folder())
    assert [r["step"] for r in records if r["event"] == "resume" and r["stage"] == "pretrain"] == [0, 10]
    assert [r["step"] for r in records if r["event"] == "resume" and r["stage"] == "rl"] == [0, 2]
    for key in ("loss", "grad_norm", "lr"):
        steps, values = series(records, "pretrain", key)
        assert list(steps) == list(range(1, 21))
        # The unbroken run logs means of ten steps.
        assert np.mean(values[10:]) == pytest.approx(smoke.series("pretrain", key)[1][-1], rel=1e-9)
    for key in ("reward/mean", "reward/attributes", "loss", "grad_norm", "kl", "advantages/zero_variance_groups"):
        assert series(records, "rl", key) == smoke.series("rl", key), key
    for tag in ("before", "after"):
        ours = json.loads((folder() / "evaluation" / f"{tag}.json").read_text())
        assert ours == smoke.evaluation(tag)
    both = [json.loads((f / "summary.json").read_text()) for f in (folder(), smoke.folder)]
    assert both[0]["heldout"] == both[1]["heldout"] and both[0]["reward"] == both[1]["reward"]
