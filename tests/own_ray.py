"""Rays of a test's own: another folder and other ports than any Ray of this machine, and none of its processes left."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from ray.util import get_node_ip_address

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
#: Overrides of configs/smoke.yaml that leave every stage in it, and little work in each.
SMALL = ["prepare.text_steps=5", "prepare.classifier_steps=5", "prepare.samples=64", "pretrain.steps=4", "evaluate.every=0",
         "evaluate.prompts=4", "evaluate.steps=[4]", "telemetry.dashboard=false"]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


def _listens(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(2)
        return one.connect_ex(("127.0.0.1", port)) == 0


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without what points to another Ray. Workers find the checkout's packages, and `python` is this one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**kept, "PATH": path, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_agent_register_timeout_ms": "120000",  # a busy machine starts nodes slowly
            "PYTHONPATH": str(ROOT), **more}


class OwnRay:
    """``ray start --head`` in a folder and on ports of its own. A context manager; ``environment`` is for its clients.

    Args:
        arguments: more of `ray start`. environment: more variables, for the head and for clients.
        autoscaling: an autoscaler's config, for Ray's provider of fake nodes (processes on this machine). Ray's
            AutoscalingCluster does the same, but begins and ends with `ray stop`, which ends every Ray of the machine,
            and reads a file that the package lacks (2.60).
    """

    def __init__(self, *arguments: str, environment: dict[str, str] = {}, autoscaling: dict | None = None):
        self.arguments, self.autoscaling = arguments, autoscaling
        self.environment = clean_environment(**environment)

    def __enter__(self) -> "OwnRay":
        for left in (2, 1, 0):
            self._launch()
            try:
                self.wait_for(lambda: "Ray runtime started" in self.log.read_text(errors="replace"), 180)
                self.wait_for(lambda: _listens(int(self.dashboard.rpartition(":")[2])), 120)
                return self
            except BaseException as error:
                self.close()
                # On a busy machine `ray start` gives up after 30 s, which cannot be changed.
                if not left or not isinstance(error, AssertionError):
                    raise

    def _launch(self) -> None:
        # A short path: sockets lie below it, and their names are limited to about 100 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="own-ray-"))
        port, dashboard, client, agent = free_ports(4)
        self.address, self.dashboard = f"{get_node_ip_address()}:{port}", f"http://127.0.0.1:{dashboard}"
        self.clients = {**self.environment, "RAY_ADDRESS": self.address}
        command = [RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={self.folder}",
                   f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
                   f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0",
                   "--object-store-memory=300000000", *self.arguments]
        if self.autoscaling is not None:
            config = self.folder / "autoscaling.json"
            provider = {**self.autoscaling["provider"], "gcs_address": self.address}
            config.write_text(json.dumps({**self.autoscaling, "provider": provider}))
            command.append(f"--autoscaling-config={config}")
        self.log = self.folder / "head.log"
        with open(self.log, "wb") as log:
            self.head = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log,
                                         start_new_session=True)

    def __exit__(self, *_) -> None:
        self.close()

    def wait_for(self, reached, seconds: float) -> float:
        """Seconds until ``reached()``. An AssertionError with the head's words where it ends or takes too long."""
        begun = time.time()
        while not reached():
            said = self.log.read_text(errors="replace")[-3000:]
            assert self.head.poll() is None, f"the head ended:\n{said}"
            assert time.time() < begun + seconds, f"not within {seconds:g} s; the head says:\n{said}"
            time.sleep(0.2)
        return time.time() - begun

    def processes(self) -> list[psutil.Process]:
        """Every live process of this Ray: of the head's session, or with the folder in its command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.head.pid or str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
        return [p for p in found if p.pid != os.getpid()]

    def python(self, code: str, **options) -> subprocess.CompletedProcess:
        """Runs a few lines in a driver of their own."""
        return subprocess.run([sys.executable, "-c", code], env=self.clients, cwd=ROOT, text=True, capture_output=True,
                              timeout=options.pop("timeout", 120), **options)

    def close(self) -> None:
        for _ in range(20):
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not left:
                break
            psutil.wait_procs(left, timeout=1)
        self.head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
