"""Runs as processes of their own, to be killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlproxi.telemetry.runlog import read

ROOT = Path(__file__).parents[1]


def launch(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """``python -m rlproxi.run`` in a session of its own, with a Ray of its own unless ``environment`` names one."""
    environment = environment or {**os.environ, "RAY_ADDRESS": "local"}  # not one that another test has started
    return subprocess.Popen([sys.executable, "-m", "rlproxi.run", *arguments], cwd=ROOT, env=environment,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(process: subprocess.Popen, reached, timeout: float = 240.0) -> None:
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


def has_step(folder: Path, stage: str, step: int) -> bool:
    """Whether a stage has logged metrics of ``step`` or a later one."""
    return any(r.get("stage") == stage and r["event"] == "metrics" and r["step"] >= step for r in read(folder))
