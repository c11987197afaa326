"""Where a run's records go beside its log: TensorBoard event files and Weights & Biases.

Ray's metrics need Ray, and are in ``actors/run/metric_exporters.py``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..run_directory import RunDirectory
from .observations import observations

if TYPE_CHECKING:  # it brings torch, which no exporter needs
    from ..config.sections import Telemetry

_REMEDY = {
    "tensorboardX": "telemetry.tensorboard is true, but the package tensorboardX is missing: pip install "
    "tensorboardX, or set telemetry.tensorboard=false",
    "wandb": "telemetry.wandb is set, but the package wandb is missing: pip install wandb (and `wandb login`), "
    "or set telemetry.wandb=null",
}
_FLUSH_SECONDS = 2


class Exporter(Protocol):
    """Takes each record as the run log does."""

    def tell(self, event: str, fields: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_packages(telemetry: Telemetry) -> None:
    """Raises ImportError, with the remedy, where a package is missing that the settings need. Imports none of them."""
    wanted = [*(["tensorboardX"] if telemetry.tensorboard else []), *(["wandb"] if telemetry.wandb else [])]
    for package in wanted:
        if importlib.util.find_spec(package) is None:
            raise ImportError(_REMEDY[package])


class TensorBoard:
    """Event files in ``<run>/tensorboard/<stage>``, one scalar for each metric, under its logged name.

    A "resume" begins a new file, which tells TensorBoard to drop what the stage had told of later steps.
    """

    def __init__(self, run_dir: str | Path, headline_steps: int | None = None):
        self.folder, self.headline_steps = RunDirectory(run_dir).tensorboard, headline_steps
        self.writers: dict[str, Any] = {}

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        if event == "resume":
            self._begin(fields["stage"], fields["step"] + 1)
        for seen in observations(event, fields, self.headline_steps):
            if seen.step is None or seen.name == "step":
                continue
            writer = self.writers.get(seen.stage) or self._begin(seen.stage, None)
            writer.add_scalar(seen.name, seen.value, seen.step)

    def _begin(self, stage: str, purge: int | None) -> Any:
        from tensorboardX import SummaryWriter

        if stage in self.writers:
            self.writers[stage].close()
        # A thread of the writer's puts on disk what came in; often, because a run may be killed, and someone may look.
        self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=purge, flush_secs=_FLUSH_SECONDS)
        return self.writers[stage]

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """One W&B run, named and identified by the run directory's name, so that a resumed run goes on there.

    Metrics are ``<stage>/<name>``, over a step of each stage's own.
    """

    def __init__(self, run_dir: str | Path, project: str, config: dict[str, Any], headline_steps: int | None = None):
        import wandb

        run_dir = Path(run_dir)
        self.headline_steps, self.stages = headline_steps, set()
        self.run = wandb.init(
            project=project,
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        seen = [o for o in observations(event, fields, self.headline_steps) if o.step is not None and o.name != "step"]
        if seen:
            stage = seen[0].stage
            axis = f"{stage}/step"
            if stage not in self.stages:
                self.run.define_metric(f"{stage}/*", step_metric=axis)
                self.stages.add(stage)
            self.run.log({axis: seen[0].step, **{f"{stage}/{o.name}": o.value for o in seen}})
        if event in ("alarm", "warning"):
            self.run.alert(
                title=f"{event} of {self.run.name}",
                text=str(fields.get("message", ""))[:1000],
                level="ERROR" if event == "alarm" else "WARN",
                wait_duration=300,
            )

    def close(self) -> None:
        self.run.finish()
