"""The one writer of a run's log, what a progress bar asks, and where records go on to exporters."""

from __future__ import annotations

import ray

from rlproxi.telemetry.runlog import RunLog

from .metric_exporters import Exporters


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Scribe:
    """Appends records to ``metrics.jsonl`` in the order they arrive and remembers the newest of each stage.

    Hands each on to the exporters that the run directory's config names. Started again where its process dies: the log is
    a file, and what was on the way is asked again.
    """

    def __init__(self, run_dir: str):
        self.log = RunLog(run_dir, patient=True)
        self.newest: dict[str, dict] = {}
        self.said: list[tuple[str, str]] = []
        self.exporters = Exporters(run_dir, lambda message: self.log.append("warning", message=message))
        self.clear_stop()

    def append(self, event: str, fields: dict) -> None:
        waited = bool(self.log.held)
        self.log.append(event, **fields)
        if self.log.held and not waited:
            self.said.append(
                (
                    "warning",
                    f"{self.log.path} cannot be written, for lack of space on the disk as a rule: its records "
                    "are held back until it can",
                )
            )
        if event == "metrics":
            self.newest[fields["stage"]] = fields
        self.exporters.tell(event, fields)

    def say(self, event: str, message: str) -> None:
        """Logs a note or a warning that the user is to read at once, from wherever it comes."""
        self.said.append((event, message))
        self.append(event, {"message": message})

    def hear(self) -> list[tuple[str, str]]:
        """What was said since the last call: (note or warning, message)."""
        said, self.said = self.said, []
        return said

    def close(self) -> None:
        """Lets the exporters finish what they are at."""
        self.exporters.close()

    def progress(self, stage: str) -> dict | None:
        """The newest metrics of a stage."""
        return self.newest.get(stage)

    def stop(self, reason: str, kind: str = "") -> None:
        """Asks every role to end the run, with a plain message for the user. The first reason stays, with its kind.

        ``kind`` is for the driver: "" ends the run; for those of ``stops`` it knows a remedy.
        """
        if self.stopped is None:
            self.stopped, self.kind = reason, kind
        self.append("warning", {"message": f"run stopped: {reason}", **({"kind": kind} if kind else {})})

    def stop_reason(self) -> str | None:
        """Why the run is to end; None while it goes on."""
        return self.stopped

    def stop_kind(self) -> str:
        """The kind of ``stop_reason``; "" without one."""
        return self.kind

    def clear_stop(self) -> None:
        """Forgets the stop, so that the stage it ended can be started again."""
        self.stopped: str | None = None
        self.kind = ""
