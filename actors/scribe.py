"""The one writer of a run's log, and what a progress bar asks."""

from __future__ import annotations

import ray

from rlproxi.telemetry.runlog import RunLog


@ray.remote(num_cpus=0)
class Scribe:
    """Appends records to ``metrics.jsonl`` in the order they arrive and remembers the newest of each stage."""

    def __init__(self, run_dir: str):
        self.log = RunLog(run_dir)
        self.newest: dict[str, dict] = {}
        self.stopped: str | None = None

    def append(self, event: str, fields: dict) -> None:
        self.log.append(event, **fields)
        if event == "metrics":
            self.newest[fields["stage"]] = fields

    def progress(self, stage: str) -> dict | None:
        """The newest metrics of a stage."""
        return self.newest.get(stage)

    def stop(self, reason: str) -> None:
        """Asks every role to end the run, with a plain message for the user. The first reason stays."""
        self.stopped = self.stopped or reason
        self.log.append("warning", message=f"run stopped: {reason}")

    def stop_reason(self) -> str | None:
        return self.stopped
