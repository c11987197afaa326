"""The files that Prometheus and Grafana are given: never stale, and about the catalogue's metrics alone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rlproxi.telemetry.alerts import ALERTS
from rlproxi.telemetry.catalogue import CATALOGUE, entry, series
from rlproxi.telemetry.monitoring import files, main

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
SERIES = {
    series(m.name) + suffix: m
    for m in CATALOGUE
    for suffix in (("",) if m.kind != "histogram" else ("_bucket", "_sum", "_count"))
}


def panels() -> list[dict]:
    board = json.loads(files()["grafana/dashboards/rlproxi.json"])
    return [panel for top in board["panels"] for panel in (top["panels"] if top["type"] == "row" else [top])]


def used(expression: str) -> set[str]:
    return set(re.findall(r"ray_\w+", expression))


def test_generated_files_are_up_to_date(tmp_path):
    for name, text in files().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, (
            "run: python -m rlproxi.telemetry.monitoring cluster/monitoring"
        )
    main(str(tmp_path))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(files())


def test_every_metric_has_a_panel_with_its_words():
    found = {panel["title"]: panel for panel in panels()}
    assert len(found) == len(panels()) and set(found) == {metric.name for metric in CATALOGUE}
    for name, panel in found.items():
        metric, defaults = entry(name), panel["fieldConfig"]["defaults"]
        assert metric.help in panel["description"] and metric.reading in panel["description"]
        assert defaults["unit"] and panel["targets"]
        for target in panel["targets"]:
            assert {SERIES[series] for series in used(target["expr"])} == {metric}
            assert '{run=~"$run"}' in target["expr"] and "{{run}}" in target["legendFormat"]


def test_panels_do_not_lie_on_each_other():
    board = json.loads(files()["grafana/dashboards/rlproxi.json"])
    assert len({p["id"] for p in [*panels(), *(r for r in board["panels"] if r["type"] == "row")]}) == len(panels()) + 7
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


def test_alert_rules_are_about_the_catalogues_series_and_say_what_to_do():
    rules = yaml.safe_load(files()["alerts.yml"])["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == [alert.name for alert in ALERTS]
    page = (FOLDER.parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for alert, rule in zip(ALERTS, rules):
        assert used(rule["expr"]) <= set(SERIES) and used(rule["expr"])
        assert any(SERIES[name].name == alert.metric for name in used(rule["expr"]))
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert "$labels.run" in rule["annotations"]["summary"] and alert.remedy in rule["annotations"]["description"]
        assert f"**{alert.name}**" in page


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing (Debian: apt install prometheus)"
)


@needs_promtool
def test_promtool_accepts_the_files(tmp_path):
    (tmp_path / "nodes.json").write_text("[]")
    text = (FOLDER / "prometheus.yml").read_text()
    listed = "/tmp/ray/prom_metrics_service_discovery.json"
    assert listed in text
    (tmp_path / "prometheus.yml").write_text(text.replace(listed, str(tmp_path / "nodes.json")))
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    for arguments in (["config", str(tmp_path / "prometheus.yml")], ["rules", str(FOLDER / "alerts.yml")]):
        done = subprocess.run(["promtool", "check", *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and "FAILED" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_provisioning_files_are_what_grafana_reads():
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/rlproxi.yml").read_text())
    assert source["apiVersion"] == provider["apiVersion"] == 1
    assert source["datasources"][0]["type"] == "prometheus" and provider["providers"][0]["type"] == "file"


def told(metric: str, values: str, **labels) -> dict:
    """A series of a run, a value a minute ("1x60" is 1 and sixty more of it, "0+2x60" climbs by 2)."""
    labels = {"run": "r", "stage": "rl", **labels}
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{series(metric)}{{{inside}}}", "values": values}


STEADY = [
    told("reward/mean", "1x400"),
    told("reward/std", "0.2x400"),
    told("groups", "10x400"),
    told("step", "0+1x400"),
    told("heldout/<name>", "3x400", name="judge"),
    told("heldout_sem/<name>", "0.1x400", name="judge"),
    told("idle/<role>", "0.5x400", role="reward"),
    *(
        told(name, "0x400")
        for name in ("groups/masked", "restarts", "warnings", "alarms", "advantages/zero_variance_groups")
    ),
]
#: alert -> what is otherwise than in a steady run; each goes wrong about minute 200.
WRONG = {
    "RewardFalling": [told("reward/mean", "1x199 0.8x200")],
    "HeldoutDiverging": [told("heldout/<name>", "3x199 2.5x200", name="judge"), told("reward/mean", "1x199 1.5x200")],
    "OverOptimisation": [told("alarms", "0x199 1x200")],
    "ZeroVarianceGroups": [told("advantages/zero_variance_groups", "0x199 9x200")],
    "GroupsWithoutScores": [told("groups/masked", "0x199 1+1x200")],
    "RoleIdle": [told("idle/<role>", "0.5x174 0.97x225", role="reward")],
    "Restarts": [told("restarts", "0x239 1x160")],
    "ManyWarnings": [told("warnings", "0x199 2+2x200")],
    "NoProgress": [told("step", "0+1x199 200x200")],
}


@needs_promtool
def test_each_alert_fires_where_it_should_and_nowhere_else(tmp_path):
    """promtool plays the minutes, and is asked what fires before and after something went wrong."""
    assert set(WRONG) == {alert.name for alert in ALERTS}
    cases = [("steady", [], 245, None)]
    cases += [
        (name, changed, minute, name if minute > 200 else None)
        for name, changed in WRONG.items()
        for minute in (195, 245)
    ]
    tests = []
    for name, changed, minute, expected in cases:
        replaced = {each["series"] for each in changed}
        inputs = [each for each in STEADY if each["series"] not in replaced] + changed
        rule = next((alert for alert in ALERTS if alert.name == expected), None)
        fires = [{"alertname": expected, "eval_time": f"{minute}m", "exp_alerts": [_expected(rule)]}] if rule else []
        silent = [
            {"alertname": alert.name, "eval_time": f"{minute}m", "exp_alerts": []}
            for alert in ALERTS
            if alert.name != expected
        ]
        tests.append(
            {"name": f"{name} at {minute}", "interval": "1m", "input_series": inputs, "alert_rule_test": fires + silent}
        )
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests})
    )
    done = subprocess.run(["promtool", "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _expected(alert) -> dict:
    """The alert with its labels and words, as Prometheus fills them in."""
    more = {"HeldoutDiverging": {"name": "judge"}, "RoleIdle": {"role": "reward"}}.get(alert.name, {})
    words = alert.rule["annotations"]
    for label, value in {"run": "r", **more}.items():
        words = {key: text.replace(f"{{{{ $labels.{label} }}}}", value) for key, text in words.items()}
    return {"exp_labels": {"run": "r", "severity": alert.severity, **more}, "exp_annotations": words}
