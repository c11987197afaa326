"""The one writer of a run's log. It also answers what progress bars ask, and hands records on to exporters."""

from __future__ import annotations

from typing import Any

import ray

from rlproxi.telemetry.runlog import RunLog

from ..rl.stops import Cause, Stop
from .metric_exporters import Exporters


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RunLogWriter:
    """Appends records to ``metrics.jsonl`` in the order they arrive and remembers the newest of each stage.

    Ray restarts it when its process dies: the log is a file, and calls that were under way are made again.

    It holds the run's first stop, because every role and rank has its handle and it answers at once. The supervisor
    notices a stop that a restart loses, because the role that stopped is silent.
    """

    def __init__(self, run_dir: str):
        self.log = RunLog(run_dir, patient=True)
        self.newest: dict[str, dict[str, Any]] = {}
        self.announced: list[tuple[str, str]] = []
        self.exporters = Exporters(run_dir, lambda message: self.log.append("warning", message=message))
        self.stopped: Stop | None = None

    def append(self, event: str, fields: dict[str, Any]) -> None:
        """Logs a record. Where the disk is full, announces once that records are held back."""
        waited = bool(self.log.held)
        self.log.append(event, **fields)
        if self.log.held and not waited:
            message = f"{self.log.path} cannot be written (is the disk full?): its records are held back until it can"
            self.announced.append(("warning", message))
        if event == "metrics":
            self.newest[fields["stage"]] = fields
        self.exporters.tell(event, fields)

    def warn(self, message: str) -> None:
        """Logs a warning."""
        self.append("warning", {"message": message})

    def announce(self, event: str, message: str) -> None:
        """Logs a note or a warning that the driver also prints."""
        self.announced.append((event, message))
        self.append(event, {"message": message})

    def take_announcements(self) -> list[tuple[str, str]]:
        """(note or warning, message) of each announcement since the last call."""
        announced, self.announced = self.announced, []
        return announced

    def close(self) -> None:
        """Lets the exporters finish their work."""
        self.exporters.close()

    def progress(self, stage: str) -> dict[str, Any] | None:
        """The newest metrics of a stage; None before its first."""
        return self.newest.get(stage)

    def stop(self, reason: str, cause: Cause = Cause.ENDED) -> None:
        """Asks every role to end the run, with a message for the user. The first stop stays until it is cleared."""
        if self.stopped is None:
            self.stopped = Stop(reason, cause)
        self.append("warning", {"message": f"run stopped: {reason}", **({"kind": cause.value} if cause.value else {})})

    def stop_state(self) -> Stop | None:
        """Why the run stops; None while it goes on."""
        return self.stopped

    def clear_stop(self) -> None:
        """Forgets the stop, so that the stage it ended can be started again."""
        self.stopped = None
