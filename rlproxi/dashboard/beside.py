"""The live page beside a run: a socket that waits, and a server process only once somebody looks.

What the run pays for a page that nobody opens is one listening socket and one sleeping thread.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

#: Ports tried behind one that is taken, and how often a server that ended is started anew.
MORE_PORTS, STARTS = 50, 3


def bind(host: str, port: int, more: int = MORE_PORTS) -> socket.socket:
    """A socket listening at host:port, or at one of the ``more`` ports behind it. OSError where none can be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, min(port + more, 65535) + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(64)
            return listener
        except OSError as error:
            listener.close()
            failed = error
    raise OSError(failed.errno, f"{host}:{port} cannot be listened at: {failed.strerror}")


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at ``host``."""
    return host in ("localhost", "::1") or host.startswith("127.")


class Beside:
    """Listens at once; the first connection starts ``python -m rlproxi.dashboard.server`` at nice 10, which takes
    the socket over.

    The server ends with ``close`` and with this process, however that ends: it watches a pipe. Raises OSError where no
    port can be had.

    Args:
        warn: told, once, when the server cannot be started or keeps ending.
    """

    def __init__(self, run_dir: Path, host: str, port: int, warn: Callable[[str], None]):
        self.run_dir, self.host, self.warn = run_dir, host, warn
        self.listener = bind(host, port)
        self.url = address(self.listener)
        self._wake_read, self._wake = os.pipe()
        self._server: subprocess.Popen | None = None
        self._thread = threading.Thread(target=self._wait, name="dashboard-beside", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        for _ in range(STARTS):
            ready = select.select([self.listener, self._wake_read], [], [])[0]
            if self._wake_read in ready:
                return
            try:
                self._server = self._start()
            except OSError as error:
                return self._give_up(str(error))
            if self._ended():
                return
        self._give_up(f"its server ended {STARTS} times, last with status {self._server.returncode}")

    def _ended(self) -> bool:
        """Waits until the server has ended (False) or is to be ended (True)."""
        while self._server.poll() is None:
            if select.select([self._wake_read], [], [], 2.0)[0]:
                return True
        return False

    def _give_up(self, reason: str) -> None:
        self.listener.close()
        self.warn(
            f"no live page at {self.url}: {reason}; the run goes on, and rlproxi dashboard {self.run_dir} shows it"
        )

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        command = [
            sys.executable,
            "-m",
            "rlproxi.dashboard.server",
            str(self.run_dir),
            "--host",
            self.host,
            "--fd",
            str(self.listener.fileno()),
            "--until-stdin-ends",
            "--nice",
            "10",
        ]
        # A session of its own: Ctrl-C is for the run, whose last records should still be seen.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[self.listener.fileno()],
            start_new_session=True,
        )

    def close(self) -> None:
        """Ends the server, where there is one."""
        os.write(self._wake, b"x")
        self._thread.join(5)
        self.listener.close()
        if self._server is not None:
            self._server.stdin.close()
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        for end in (self._wake_read, self._wake):
            os.close(end)
