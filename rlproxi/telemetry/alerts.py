"""Alert rules for Prometheus, over the catalogue's series: when a person should look at a run.

In a healthy run a rule's expression returns data, and the whole rule, with its threshold, returns none.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from .catalogue import entry, series

_HEAD = """\
# Generated from rlproxi/telemetry/alerts.py by `python -m rlproxi.telemetry.monitoring cluster/monitoring`.
# What to do at each: docs/monitoring.md.
"""


def mean(metric: str, window: str, by: str = "run") -> str:
    """Return PromQL for the mean over ``window`` of each run; a resumed run has had several processes that export."""
    name = series(metric)
    return f"sum by ({by}) (sum_over_time({name}[{window}])) / sum by ({by}) (count_over_time({name}[{window}]))"


def _growth(counter: str, window: str) -> str:
    return f"sum by (run) (increase({series(counter)}[{window}]))"


@dataclass(frozen=True)
class Alert:
    """An alert on the catalogue's ``metric`` that fires when ``expr`` ``op`` ``threshold`` holds for ``lasting``."""

    name: str
    metric: str
    expr: str
    threshold: float
    summary: str
    remedy: str
    lasting: str = "0m"
    op: str = ">"
    severity: str = "warning"

    @property
    def rule(self) -> dict:
        """The rule as in a Prometheus rule file."""
        description = f"{self.remedy} ({entry(self.metric).reading})"
        return {
            "alert": self.name,
            "expr": f"({self.expr}) {self.op} {self.threshold:g}",
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": {"summary": f"{{{{ $labels.run }}}}: {self.summary}", "description": description},
        }


def _heldout_below_best() -> str:
    """Return PromQL: standard errors of a held-out reward below its 12 hours' best; 0 if training rewards fell too."""
    by = "by (run, name)"
    heldout = series("heldout/<name>")
    drop = f"max {by} (max_over_time({heldout}[12h])) - max {by} ({heldout})"
    climbing = f"(({mean('reward/mean', '30m')}) > bool ({mean('reward/mean', '12h')}))"
    return f"(({drop}) / max {by} ({series('heldout_sem/<name>')})) * on (run) group_left () {climbing}"


_RL_STEPS = f'sum by (run) (increase({series("step")}{{stage="rl"}}[30m]))'

ALERTS: tuple[Alert, ...] = (
    Alert(
        "RewardFalling",
        "reward/mean",
        f"(({mean('reward/mean', '3h')}) - ({mean('reward/mean', '30m')})) / ({mean('reward/std', '30m')})",
        0.5,
        "the training reward falls",
        "It fell by half a group's standard deviation: see kl and grad_norm, lower lr, or go back to models/best.",
        lasting="15m",
    ),
    Alert(
        "HeldoutDiverging",
        "heldout/<name>",
        _heldout_below_best(),
        2,
        "held-out {{ $labels.name }} falls while the training reward climbs",
        "Likely reward hacking: compare galleries; stop and use models/best, or raise the KL coefficient.",
    ),
    Alert(
        "OverOptimisation",
        "alarms",
        _growth("alarms", "1h"),
        0,
        "the run's own over-optimisation alarm",
        "The alarm's message names the iteration to go back to; it is in metrics.jsonl and on the dashboard.",
    ),
    Alert(
        "ZeroVarianceGroups",
        "advantages/zero_variance_groups",
        f"({mean('advantages/zero_variance_groups', '30m')}) / ({mean('groups', '30m')})",
        0.8,
        "most groups have no advantage",
        "More than 80% of the groups have equal rewards: harder prompts, a finer reward, or larger groups.",
        lasting="15m",
    ),
    Alert(
        "GroupsWithoutScores",
        "groups/masked",
        f"({_growth('groups/masked', '30m')}) / ({_RL_STEPS}) / ({mean('groups', '30m')})",
        0.05,
        "groups cannot be scored",
        "More than 5% of the groups have no score: the warnings name the scorer and its answer.",
        lasting="5m",
    ),
    Alert(
        "RoleIdle",
        "idle/<role>",
        mean("idle/<role>", "30m", "run, role"),
        0.9,
        "{{ $labels.role }} is idle nine tenths of the time",
        "Give its hardware to the role that is idle least (rlproxi doctor --run), or overlap roles: max_staleness=1.",
        lasting="30m",
        severity="info",
    ),
    Alert(
        "Restarts",
        "restarts",
        _growth("restarts", "15m"),
        0,
        "an actor, a replica or the learner was restarted",
        "Nothing is lost, and preemptible machines do it. Elsewhere read the warning, and check the node's memory.",
    ),
    Alert(
        "ManyWarnings",
        "warnings",
        _growth("warnings", "15m"),
        10,
        "more than ten warnings in a quarter of an hour",
        "Read them in metrics.jsonl.",
    ),
    Alert(
        "NoProgress",
        "step",
        f"sum by (run) (changes({series('step')}[10m]))",
        1,
        "no step of any stage for half an hour",
        "Some role waits, or evaluates or loads for long: see `ray status`, the idle shares and the newest warnings.",
        lasting="20m",
        op="<",
        severity="critical",
    ),
)


def rules() -> str:
    """Return the rule file: YAML that ends in a newline."""
    groups = {"groups": [{"name": "rlproxi", "rules": [alert.rule for alert in ALERTS]}]}
    return _HEAD + yaml.safe_dump(groups, sort_keys=False, width=110, allow_unicode=True)
