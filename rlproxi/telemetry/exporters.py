"""Exporters of a run's records to TensorBoard and Weights & Biases; the one to Ray's metrics is in ``actors/run``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..run_directory import RunDirectory
from .observations import observations

if TYPE_CHECKING:  # the config imports torch, which no exporter needs
    from ..config.sections import Telemetry


class Exporter(Protocol):
    """A place where each record of the run log goes too."""

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """Export one record."""

    def close(self) -> None:
        """Write what is buffered, and end."""


def check_packages(telemetry: Telemetry) -> None:
    """Raise ImportError, with the remedy, where the settings need a missing package. No package is imported."""
    needed = [
        ("tensorboard", "tensorboardX", telemetry.tensorboard, "false"),
        ("wandb", "wandb", telemetry.wandb, "null"),
    ]
    for key, package, wanted, without in needed:
        if wanted and importlib.util.find_spec(package) is None:
            problem = f"telemetry.{key} is set, but the package {package} is missing"
            raise ImportError(f"{problem}: pip install {package}, or set telemetry.{key}={without}")


class TensorBoard:
    """Event files in ``<run>/tensorboard/<stage>``, with one scalar for each metric under its logged name.

    A "resume" begins a new file, which makes TensorBoard drop the stage's values of later steps.
    """

    def __init__(self, run_dir: str | Path, headline_steps: int | None = None):
        self.folder, self.headline_steps = RunDirectory(run_dir).tensorboard, headline_steps
        self.writers: dict[str, Any] = {}

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """Export one record."""
        if event == "resume":
            self._begin(fields["stage"], fields["step"] + 1)
        for seen in observations(event, fields, self.headline_steps):
            if seen.step is not None and seen.name != "step":
                writer = self.writers.get(seen.stage) or self._begin(seen.stage, None)
                writer.add_scalar(seen.name, seen.value, seen.step)

    def _begin(self, stage: str, purge: int | None) -> Any:
        from tensorboardX import SummaryWriter

        if stage in self.writers:
            self.writers[stage].close()
        # The writer's thread flushes often, because a run may be killed and people look while it runs.
        self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=purge, flush_secs=2)
        return self.writers[stage]

    def close(self) -> None:
        """Close the event files."""
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """One W&B run. Its name and id are the run directory's name, so that a resumed run goes on there.

    Metrics are ``<stage>/<name>``, over the stage's own steps. Alarms and warnings become alerts.
    """

    def __init__(self, run_dir: str | Path, project: str, config: dict[str, Any], headline_steps: int | None = None):
        import wandb

        run_dir = Path(run_dir)
        self.headline_steps = headline_steps
        self.stages: set[str] = set()
        named = {"name": run_dir.name, "id": run_dir.name, "dir": str(run_dir)}
        settings = wandb.Settings(console="off", silent=True)
        self.run = wandb.init(project=project, config=config, resume="allow", settings=settings, **named)

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """Export one record."""
        seen = [o for o in observations(event, fields, self.headline_steps) if o.step is not None and o.name != "step"]
        if seen:
            stage = seen[0].stage
            axis = f"{stage}/step"
            if stage not in self.stages:
                self.run.define_metric(f"{stage}/*", step_metric=axis)
                self.stages.add(stage)
            self.run.log({axis: seen[0].step, **{f"{stage}/{o.name}": o.value for o in seen}})
        if event in ("alarm", "warning"):
            title, text = f"{event} of {self.run.name}", str(fields.get("message", ""))[:1000]
            self.run.alert(title, text, level="ERROR" if event == "alarm" else "WARN", wait_duration=300)

    def close(self) -> None:
        """Finish the W&B run."""
        self.run.finish()
