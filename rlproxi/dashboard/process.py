"""The live page of a running run. Its server process starts when somebody opens the page."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

#: How many ports are tried after one that is taken, and how often a server is started that keeps ending.
MORE_PORTS, STARTS = 50, 3


def bind(host: str, port: int, more: int = MORE_PORTS) -> socket.socket:
    """A socket that listens at host:port, or at one of the ``more`` ports after it. Raises OSError if none is free."""
    six = ":" in host
    for candidate in range(port, min(port + more, 65535) + 1):
        try:
            family = socket.AF_INET6 if six else socket.AF_INET
            return socket.create_server((host, candidate), family=family, backlog=64, dualstack_ipv6=six)
        except OSError as error:
            failed = error
    raise OSError(failed.errno, f"cannot listen at {host}:{port}: {failed.strerror}")


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket at ``host``."""
    return host in ("localhost", "::1") or host.startswith("127.")


class PageProcess:
    """The live page of a running run: a socket that listens at once, and a server that starts with the first visitor.

    The server runs at nice 10, and takes the socket over. It ends with ``close`` and with this process, because it
    watches a pipe. ``server`` is the newest one, None before the first visitor. ``warn`` is called once with a message
    if it cannot be started or keeps ending. Raises OSError if no port is free.
    """

    def __init__(self, run_dir: Path, host: str, port: int, warn: Callable[[str], None]):
        self.run_dir, self.host, self.warn = run_dir, host, warn
        self.listener = bind(host, port)
        self.url = address(self.listener)
        self.server: subprocess.Popen[bytes] | None = None
        self._wake_read, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._wait, name="dashboard-page", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        status = None
        for _ in range(STARTS):
            ready = select.select([self.listener.fileno(), self._wake_read], [], [])[0]
            if self._wake_read in ready:
                return
            try:
                self.server = self._start()
            except OSError as error:
                return self._give_up(str(error))
            while (status := self.server.poll()) is None:
                if select.select([self._wake_read], [], [], 2.0)[0]:
                    return
        self._give_up(f"its server ended {STARTS} times, last with status {status}")

    def _give_up(self, reason: str) -> None:
        self.listener.close()
        self.warn(f"no live page at {self.url}: {reason}; the run goes on: rlproxi dashboard {self.run_dir} shows it")

    def _start(self) -> subprocess.Popen[bytes]:
        root, file = str(Path(__file__).parents[2]), self.listener.fileno()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        return subprocess.Popen(
            [sys.executable, "-m", "rlproxi.dashboard.server", str(self.run_dir), self.host, str(file)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[file],
            start_new_session=True,  # Ctrl-C is for the run, whose last records should still be shown
        )

    def close(self) -> None:
        """Stop listening and end the server, if there is one."""
        os.write(self._wake, b"x")
        self._thread.join(5)
        self.listener.close()
        if self.server is not None and self.server.stdin is not None:
            self.server.stdin.close()
            try:
                self.server.wait(5)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        for end in (self._wake_read, self._wake):
            os.close(end)
