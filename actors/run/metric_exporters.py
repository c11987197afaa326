"""The scribe's exporters: Ray's metrics, and those of ``rlproxi.telemetry.exporters``. A fault in one ends no run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry import exporters
from rlproxi.telemetry.catalogue import Metric, prometheus_name
from rlproxi.telemetry.observations import Observation, observations, zeros

#: Seconds from 0.1 to 10,000, ten to a power of ten. Ray hands on the middle of a bucket in the place of a value, so
#: even a mean is only as exact as they are: 12%.
BOUNDARIES = [round(10 ** (i / 10), 3) for i in range(-10, 41)]


class RayMetrics:
    """The catalogue's metrics through ``ray.util.metrics``, with the labels run and stage and the metric's own <part>.

    A counter is a Ray gauge that holds the sum: Ray's own counters refuse 0, and a series that begins with its first
    event shows Prometheus no increase. A new scribe counts from 0 again, which PromQL takes for a restart, as it is.
    """

    def __init__(self, run: str, headline_steps: int | None = None):
        self.run, self.headline_steps = run, headline_steps
        self.made: dict[str, Any] = {}
        self.sums: dict[tuple, float] = {}
        self.told: dict[tuple, float] = {}
        self._tell(zeros())

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        self._tell(observations(event, fields, self.headline_steps))

    def close(self) -> None:
        """Nothing: Ray drops the series soon after the process."""

    def _tell(self, seen: list[Observation]) -> None:
        for o in seen:
            labels = o.labels(self.run)
            if o.metric.kind == "histogram":
                self._made(o.metric).observe(o.value, labels)
            else:
                self._made(o.metric).set(self._sum(o) if o.metric.kind == "counter" else o.value, labels)

    def _sum(self, o: Observation) -> float:
        """What a counter has come to. One of totals falls back when what counts was restarted: it begins anew."""
        key = (o.metric.name, o.stage, o.part)
        before = self.told.get(key, 0.0) if o.metric.total else 0.0
        self.told[key] = o.value
        self.sums[key] = self.sums.get(key, 0.0) + (o.value - before if o.value >= before else o.value)
        return self.sums[key]

    def _made(self, metric: Metric) -> Any:
        from ray.util.metrics import Gauge, Histogram

        name = prometheus_name(metric)
        if name not in self.made:
            kind = Gauge if metric.kind != "histogram" else Histogram
            more = {"boundaries": BOUNDARIES} if metric.kind == "histogram" else {}
            self.made[name] = kind(name, f"{metric.help} {metric.reading}", tag_keys=metric.labels, **more)
        return self.made[name]


class Exporters:
    """All that the run's config asks for, each on its own: one that fails is dropped, and ``warn`` is told why."""

    def __init__(self, run_dir: str, warn: Callable[[str], None]):
        self.warn = warn
        self.active: dict[str, exporters.Exporter] = {}
        self._guard("the config", lambda: self._open(Path(run_dir)))

    def _open(self, run_dir: Path) -> None:
        file = RunDirectory(run_dir).config
        if not file.is_file():
            return  # no run: a part of one that works by itself
        # Read as it is, every key being in it: the schema would bring torch into the scribe's process.
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        telemetry = config.get("telemetry") or {}
        steps = (config.get("sampler") or {}).get("num_inference_steps")
        wanted: dict[str, Callable[[], exporters.Exporter]] = {}
        if telemetry.get("prometheus"):
            wanted["Ray's metrics"] = lambda: RayMetrics(run_dir.name, steps)
        if telemetry.get("tensorboard"):
            wanted["TensorBoard"] = lambda: exporters.TensorBoard(run_dir, steps)
        if telemetry.get("wandb"):
            wanted["W&B"] = lambda: exporters.WeightsAndBiases(run_dir, telemetry["wandb"], config, steps)
        for name, make in wanted.items():
            self._guard(name, lambda: self.active.update({name: make()}))

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        for name in list(self.active):
            self._guard(name, lambda: self.active[name].tell(event, fields))

    def close(self) -> None:
        for name in list(self.active):
            self._guard(name, lambda: self.active.pop(name).close())

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.active.pop(name, None)
            self.warn(f"telemetry: {name} is not told any more: {type(error).__name__}: {error}")
