"""Files for Prometheus and Grafana: ``python -m rlproxi.telemetry.monitoring cluster/monitoring`` writes them."""

from __future__ import annotations

import sys
from pathlib import Path

from .alerts import rules
from .grafana import dashboard


def files() -> dict[str, str]:
    """Return path within cluster/monitoring -> text of each generated file."""
    return {"alerts.yml": rules(), "grafana/dashboards/rlproxi.json": dashboard()}


def main(folder: str) -> None:
    """Write the generated files into ``folder``."""
    for name, text in files().items():
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rlproxi.telemetry.monitoring FOLDER   (cluster/monitoring in a checkout)")
    main(sys.argv[1])
