"""The catalogue, what records become by it, and that it knows whatever is logged."""

import ast
import re
from pathlib import Path

import pytest

from rlproxi.telemetry.catalogue import CATALOGUE, SECTIONS, entry, lookup, prometheus_name, series
from rlproxi.telemetry.observations import WHOLE_RUN, observations, zeros

ROOT = Path(__file__).parents[2]


def test_every_entry_is_complete_and_has_a_name_of_its_own_in_prometheus():
    names = [prometheus_name(metric) for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z][a-z0-9_]*[a-z0-9]", name) for name in names)
    assert all(m.kind in ("gauge", "counter", "histogram") and m.section in SECTIONS and m.unit for m in CATALOGUE)
    assert all(m.kind == "counter" for m in CATALOGUE if m.total)
    assert {m.section for m in CATALOGUE} == set(SECTIONS)


@pytest.mark.parametrize(
    "name, prometheus, labels",
    [
        ("reward/mean", "rlproxi_reward_mean", ("run", "stage")),
        ("reward/<name>", "rlproxi_reward", ("run", "stage", "name")),
        ("<network>/loss", "rlproxi_network_loss", ("run", "stage", "network")),
        ("groups/masked", "rlproxi_groups_masked_total", ("run", "stage")),
        ("restarts", "rlproxi_restarts_total", ("run", "stage")),
        ("seconds/step", "rlproxi_seconds_step", ("run", "stage")),
        ("kl", "rlproxi_kl", ("run", "stage")),
    ],
)
def test_names_and_labels_in_prometheus(name, prometheus, labels):
    assert prometheus_name(entry(name)) == prometheus and entry(name).labels == labels
    assert series(name) == f"ray_{prometheus}"


def test_only_entries_have_series():
    with pytest.raises(KeyError):
        series("reward/attributes")


@pytest.mark.parametrize(
    "logged, metric, part",
    [
        ("reward/std", "reward/std", ""),
        ("reward/attributes", "reward/<name>", "attributes"),
        ("fake/loss", "<network>/loss", "fake"),
        ("reward/loss", "reward/<name>", "loss"),
        ("heldout/lr", "heldout/<name>", "lr"),
        ("idle/rollout", "idle/<role>", "rollout"),
        ("last_step/reward", "last_step/reward", ""),
    ],
)
def test_what_stands_for_the_part(logged, metric, part):
    found = lookup(logged)
    assert found.name == metric and found.part_of(logged) == part


# -- records ------------------------------------------------------------------------------


def told(event, headline=None, **fields) -> dict:
    return {(o.name, o.stage, o.step): o.value for o in observations(event, fields, headline)}


def test_a_metrics_record_tells_its_numbers():
    record = {
        "stage": "rl",
        "step": 3,
        "kl": 0.5,
        "reward/hat": 1,
        "loss": None,
        "lr": float("nan"),
        "mine": 7,
        "words": "no",
    }
    assert told("metrics", **record) == {
        ("step", "rl", 3): 3,
        ("kl", "rl", 3): 0.5,
        ("reward/hat", "rl", 3): 1,
        ("mine", "rl", 3): 7,
    }
    by_name = {o.name: o for o in observations("metrics", record)}
    assert by_name["reward/hat"].labels("r1") == {"run": "r1", "stage": "rl", "name": "hat"}
    assert by_name["mine"].metric is entry("other/<name>") and by_name["mine"].part == "mine"
    assert by_name["kl"].labels("r1") == {"run": "r1", "stage": "rl"}


def test_an_evaluation_tells_its_headline():
    record = {
        "stage": "rl",
        "tag": "before",
        "step": 0,
        "steps": 4,
        "heldout": {"judge": {"mean": 0.5, "sem": 0.1}},
        "train": {"hat": {"mean": None, "sem": None}},
        "details": {},
        "diversity": 0.3,
        "distance": {"total": 3.0, "layout": 1.0, "texture": 2.0},
        "spectrum": {"rows": {"2": 1.5}, "columns": {"2": 1.0}, "worst": 1.5},
    }
    expected = {
        "heldout/judge": 0.5,
        "heldout_sem/judge": 0.1,
        "diversity": 0.3,
        "distance/total": 3.0,
        "distance/layout": 1.0,
        "distance/texture": 2.0,
        "spectrum/worst": 1.5,
    }
    assert told("evaluation", 4, **record) == {(name, "rl", 0): value for name, value in expected.items()}
    assert told("evaluation", 8, **record) == {} and len(told("evaluation", None, **record)) == len(expected)


def test_warnings_and_alarms_are_counted_and_other_events_tell_nothing():
    assert told("warning", message="m") == {("warnings", WHOLE_RUN, None): 1}
    assert told("alarm", stage="rl", step=3, message="m", best=1) == {("alarms", WHOLE_RUN, None): 1}
    assert told("note", message="m") == {} and told("stage", name="rl", status="start") == {}
    assert {(o.name, o.value) for o in zeros()} == {("warnings", 0), ("alarms", 0)}


# -- nothing is logged that the catalogue does not know -------------------------------------


def logged_names() -> set[str]:
    """The names with a slash that code of the roles and algorithms writes down as keys of metrics."""
    found = set()
    for folder in ("actors", "rlproxi/algorithms", "rlproxi/rewards"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                keys = []
                if isinstance(node, ast.Dict):
                    keys = [k for k in node.keys if k is not None]
                elif isinstance(node, ast.Subscript):
                    keys = [node.slice]
                elif isinstance(node, ast.DictComp):
                    keys = [node.key]
                for key in keys:
                    text = _text(key)
                    named = text and re.search("[a-z]", text.replace("<x>", ""))  # or it is any two words
                    if named and re.fullmatch(r"[a-z0-9_<>]+/[a-z0-9_<>/]+", text):
                        found.add(text)
    return found


def _text(key) -> str | None:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return key.value
    if isinstance(key, ast.JoinedStr):  # f"reward/{name}" stands for any word
        return "".join(part.value if isinstance(part, ast.Constant) else "<x>" for part in key.values)
    return None


def test_the_catalogue_knows_every_name_in_the_code():
    names = logged_names()
    assert {"seconds/train", "reward/<x>", "ratio/first_max_deviation", "groups/masked", "idle/<x>"} <= names
    unknown = [name for name in names if lookup(name.replace("<x>", "word")) is None]
    assert not unknown, f"{sorted(unknown)}: add them to rlproxi/telemetry/catalogue.yaml"


@pytest.mark.parametrize("key", ["loss", "grad_norm", "lr"])
def test_a_second_network_has_its_own_metrics(key):
    # actors/train/rank.py: the metrics of all networks but the first have the network's name before theirs.
    assert lookup(f"fake/{key}").name == f"<network>/{key}"
