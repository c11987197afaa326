"""Alert rules for Prometheus, over the catalogue's series: when a person should look at a run.

A rule has an expression, a comparison and a threshold apart, so that a test can query the expression alone. In a
healthy run the expression returns data and the whole rule returns none.
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
    """Return PromQL for the mean over ``window`` of each run, over all processes that exported it.

    A resumed run has had two of them or more.
    """
    name = series(metric)
    return f"sum by ({by}) (sum_over_time({name}[{window}])) / sum by ({by}) (count_over_time({name}[{window}]))"


def _growth(counter: str, window: str) -> str:
    return f"sum by (run) (increase({series(counter)}[{window}]))"


@dataclass(frozen=True)
class Alert:
    """An alert that fires when ``expr`` ``op`` ``threshold`` holds for ``lasting``.

    ``metric`` is the catalogue entry that it watches, ``remedy`` what a person can do.
    """

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
            "annotations": {"summary": self.summary, "description": description},
        }


def _heldout_below_best() -> str:
    """Return PromQL: by how many standard errors a held-out reward is below its best of 12 hours.

    It is 0 where the training reward fell too.
    """
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
        "{{ $labels.run }}: the training reward falls",
        "The mean of the last half hour is more than half a group's standard deviation below that of three hours: "
        "look at kl and grad_norm, lower the learning rate, or go back to models/best.",
        lasting="15m",
    ),
    Alert(
        "HeldoutDiverging",
        "heldout/<name>",
        _heldout_below_best(),
        2,
        "{{ $labels.run }}: held-out {{ $labels.name }} falls while the training reward climbs",
        "More than two standard errors below its best: likely reward hacking. Compare galleries, then stop or raise "
        "the KL coefficient; models/best is the best so far.",
    ),
    Alert(
        "OverOptimisation",
        "alarms",
        _growth("alarms", "1h"),
        0,
        "{{ $labels.run }}: the run's own over-optimisation alarm",
        "The alarm's message names the iteration to go back to; it is in metrics.jsonl and on the dashboard.",
    ),
    Alert(
        "ZeroVarianceGroups",
        "advantages/zero_variance_groups",
        f"({mean('advantages/zero_variance_groups', '30m')}) / ({mean('groups', '30m')})",
        0.8,
        "{{ $labels.run }}: most groups have no advantage",
        "More than 80% of the groups have equal rewards: harder prompts, a finer reward, or larger groups.",
        lasting="15m",
    ),
    Alert(
        "GroupsWithoutScores",
        "groups/masked",
        f"({_growth('groups/masked', '30m')}) / ({_RL_STEPS}) / ({mean('groups', '30m')})",
        0.05,
        "{{ $labels.run }}: groups cannot be scored",
        "More than 5% of the groups have no score: the warnings name the scorer and its answer.",
        lasting="5m",
    ),
    Alert(
        "RoleIdle",
        "idle/<role>",
        mean("idle/<role>", "30m", "run, role"),
        0.9,
        "{{ $labels.run }}: {{ $labels.role }} is idle nine tenths of the time",
        "Give its hardware to the role that is idle least (rlproxi doctor --run), or let roles overlap with "
        "max_staleness=1.",
        lasting="30m",
        severity="info",
    ),
    Alert(
        "Restarts",
        "restarts",
        _growth("restarts", "15m"),
        0,
        "{{ $labels.run }}: an actor, a replica or the learner was restarted",
        "Nothing is lost. On preemptible machines it is expected. Elsewhere read the warning, and check the node's "
        "memory.",
    ),
    Alert(
        "ManyWarnings",
        "warnings",
        _growth("warnings", "15m"),
        10,
        "{{ $labels.run }}: more than ten warnings in a quarter of an hour",
        "Read them in metrics.jsonl.",
    ),
    Alert(
        "NoProgress",
        "step",
        f"sum by (run) (changes({series('step')}[10m]))",
        1,
        "{{ $labels.run }}: no step of any stage for half an hour",
        "Some role waits: look at `ray status`, the idle shares and the newest warnings. A long evaluation, or the "
        "first load of a large model, looks the same.",
        lasting="20m",
        op="<",
        severity="critical",
    ),
)


def rules() -> str:
    """Return the rule file: YAML that ends in a newline."""
    groups = {"groups": [{"name": "rlproxi", "rules": [alert.rule for alert in ALERTS]}]}
    return _HEAD + yaml.safe_dump(groups, sort_keys=False, width=110, allow_unicode=True)
