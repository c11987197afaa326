"""The Grafana dashboard, generated from the catalogue: one panel for each entry."""

from __future__ import annotations

import json
from typing import Any

from .alerts import ALERTS
from .catalogue import CATALOGUE, SECTIONS, Metric, series

_UNITS = {"1": "short", "s": "s", "bytes": "bytes", "share": "percentunit"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
#: Rows that are open when the dashboard is opened.
_OPEN = ("Rewards", "Policy", "Speed", "Faults")
_RUN = '{run=~"$run"}'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def queries(metric: Metric) -> list[tuple[str, str]]:
    """Return (PromQL, legend) of each line in a metric's panel, over all processes of the dashboard's ``$run``."""
    name = series(metric.name)
    by = ", ".join(metric.labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels if label != "stage")
    if metric.kind == "counter":
        return [
            (f"sum by ({by}) (increase({name}{_RUN}[5m]))", f"{legend} in 5 min"),
            (f"sum by ({by}) ({name}{_RUN})", f"{legend} in all"),
        ]
    if metric.kind == "histogram":
        buckets = f"sum by ({by}, le) (rate({name}_bucket{_RUN}[5m]))"
        average = f"sum by ({by}) (rate({name}_sum{_RUN}[5m])) / sum by ({by}) (rate({name}_count{_RUN}[5m]))"
        quantiles = [(f"histogram_quantile({q}, {buckets})", f"{legend} {q:.0%}") for q in (0.5, 0.95)]
        return [(average, f"{legend} mean"), *quantiles]
    return [(f"max by ({by}) ({name}{_RUN})", f"{legend} {{{{stage}}}}")]


def dashboard() -> str:
    """Return the dashboard as Grafana imports and provisions it: JSON that ends in a newline."""
    panels: list[dict[str, Any]] = []
    top = 0
    for number, section in enumerate(SECTIONS):
        metrics = [metric for metric in CATALOGUE if metric.section == section]
        inside = []
        for i, metric in enumerate(metrics):
            row, column = divmod(i, _COLUMNS)
            inside.append(_panel(metric, 100 * number + 1 + i, column * _WIDTH, top + 1 + row * _HEIGHT))
        closed = section not in _OPEN
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        head = {"type": "row", "id": 100 * number + 100, "title": section, "collapsed": closed, "gridPos": place}
        panels.append({**head, "panels": inside if closed else []})
        panels += [] if closed else inside
        top += 1 + (0 if closed else -(-len(metrics) // _COLUMNS) * _HEIGHT)
    growth = f"sum by (run) (increase({series('restarts')}{_RUN}[1m])) > 0"
    restarts = {"name": "restarts", "enable": True, "iconColor": "orange", "titleFormat": "restart of {{run}}"}
    restarts |= {"datasource": _SOURCE, "expr": growth}
    about = "Generated from rlproxi/telemetry/catalogue.yaml. How to read it: docs/monitoring.md."
    head = {"uid": "rlproxi", "title": "rlproxi runs", "tags": ["rlproxi", "ray"], "schemaVersion": 39, "version": 1}
    view = {"editable": True, "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-1h", "to": "now"}}
    board = {**head, "description": about, **view, "templating": {"list": _variables()}}
    board |= {"annotations": {"list": [restarts]}, "panels": panels}
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


def _panel(metric: Metric, number: int, x: int, y: int) -> dict[str, Any]:
    alerts = ", ".join(alert.name for alert in ALERTS if alert.metric == metric.name)
    description = f"{metric.help} {metric.reading}" + (f" Alert: {alerts}." if alerts else "")
    bounds = {"min": 0, "max": 1} if metric.unit == "share" else {}
    targets = [
        {"refId": name, "expr": expr, "legendFormat": legend, "datasource": _SOURCE}
        for name, (expr, legend) in zip("ABC", queries(metric), strict=False)
    ]
    unit = _UNITS.get(metric.unit, f"suffix: {metric.unit}")
    custom = {"lineWidth": 2, "fillOpacity": 5, "spanNulls": True}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    return {
        "type": "timeseries",
        "id": number,
        "title": metric.name,
        "description": description,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, **bounds, "custom": custom}, "overrides": []},
        "options": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    """Return what a person chooses above the panels: the Prometheus and the runs."""
    query = f"label_values({series('step')}, run)"
    plain: dict[str, Any] = {"hide": 0, "regex": "", "options": []}
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus", "refresh": 1}
    run = {"name": "run", "type": "query", "label": "Run", "query": {"query": query, "refId": "run"}}
    choice = {"sort": 2, "multi": True, "includeAll": True, "allValue": ".*"}
    current = {"text": "All", "value": "$__all"}
    return [
        {**source, "current": {}, **plain},
        {**run, "definition": query, "datasource": _SOURCE, "refresh": 2, **choice, "current": current, **plain},
    ]
