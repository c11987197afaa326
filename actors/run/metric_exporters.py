"""The run-log actor's exporters: Ray's metrics and ``rlproxi.telemetry.exporters``. A fault in one ends no run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry import exporters
from rlproxi.telemetry.catalogue import Metric, prometheus_name
from rlproxi.telemetry.observations import Observation, observations, zeros

#: Bounds of a histogram's buckets in seconds, from 0.1 to 10,000, ten to each power of ten. Ray hands on the middle of
#: a bucket in the place of a value, so that even a mean is only exact to 12%.
BOUNDARIES = [round(10 ** (i / 10), 3) for i in range(-10, 41)]


class RayMetrics:
    """The catalogue's metrics through ``ray.util.metrics``, with the labels run and stage and the metric's own <part>.

    A counter is a Ray gauge that holds the sum: Ray's own counters refuse 0, and a series that begins with its first
    event shows Prometheus no increase. A restarted log actor counts from 0 again, which PromQL takes for a restart.
    """

    def __init__(self, run: str, headline_steps: int | None = None):
        self.run, self.headline_steps = run, headline_steps
        self.made: dict[str, Any] = {}
        self.sums: dict[tuple, float] = {}
        self.totals: dict[tuple, float] = {}
        self._tell(zeros())

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the numbers of a record."""
        self._tell(observations(event, fields, self.headline_steps))

    def close(self) -> None:
        """Nothing: Ray drops the series soon after the process."""

    def _tell(self, seen: list[Observation]) -> None:
        for o in seen:
            labels = o.labels(self.run)
            if o.metric.kind == "histogram":
                self._made(o.metric).observe(o.value, labels)
            else:
                self._made(o.metric).set(self.summed(o) if o.metric.kind == "counter" else o.value, labels)

    def summed(self, o: Observation) -> float:
        """The sum of a counter. The total of an actor that was restarted begins at 0 again, and is added to the sum."""
        key = (o.metric.name, o.stage, o.part)
        before = self.totals.get(key, 0.0) if o.metric.total else 0.0
        self.totals[key] = o.value
        self.sums[key] = self.sums.get(key, 0.0) + (o.value - before if o.value >= before else o.value)
        return self.sums[key]

    def _made(self, metric: Metric) -> Any:
        from ray.util.metrics import Gauge, Histogram

        name = prometheus_name(metric)
        if name not in self.made:
            text, labels = f"{metric.help} {metric.reading}", metric.labels
            histogram = metric.kind == "histogram"
            self.made[name] = Histogram(name, text, BOUNDARIES, labels) if histogram else Gauge(name, text, labels)
        return self.made[name]


class Exporters:
    """The exporters that the run's config names. One that fails is dropped, and ``warn`` takes the reason."""

    def __init__(self, run_dir: str, warn: Callable[[str], None]):
        self.warn = warn
        self.active: dict[str, exporters.Exporter] = {}
        self._guard("the config", lambda: self._open(Path(run_dir)))

    def _open(self, run_dir: Path) -> None:
        file = RunDirectory(run_dir).config
        if not file.is_file():
            return  # a part of a run that works by itself
        # Read without its schema, which would bring torch into the run-log actor's process.
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        telemetry = config.get("telemetry") or {}
        steps = (config.get("sampler") or {}).get("num_inference_steps")
        if telemetry.get("prometheus"):
            self._start("Ray's metrics", lambda: RayMetrics(run_dir.name, steps))
        if telemetry.get("tensorboard"):
            self._start("TensorBoard", lambda: exporters.TensorBoard(run_dir, steps))
        if telemetry.get("wandb"):
            self._start("W&B", lambda: exporters.WeightsAndBiases(run_dir, telemetry["wandb"], config, steps))

    def _start(self, name: str, make: Callable[[], exporters.Exporter]) -> None:
        self._guard(name, lambda: self.active.update({name: make()}))

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """Hands a record on to every exporter."""
        for name, exporter in list(self.active.items()):
            self._guard(name, partial(exporter.tell, event, fields))

    def close(self) -> None:
        """Lets every exporter finish its work."""
        for name in list(self.active):
            self._guard(name, self.active.pop(name).close)

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.active.pop(name, None)
            self.warn(f"telemetry: {name} gets no more records: {type(error).__name__}: {error}")
