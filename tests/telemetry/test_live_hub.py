"""Several runs behind one live page."""

import json

import pytest

from fixtures.live_runs import write
from rlproxi.telemetry.live.hub import Hub
from rlproxi.telemetry.runlog import RunLog


def test_a_hub_numbers_the_news_of_its_runs(tmp_path):
    logs = {name: RunLog(tmp_path / name) for name in "ab"}
    for log in logs.values():
        write(log, [1])
    hub = Hub([tmp_path])
    assert {run["id"] for run in hub.listing()} == {"a", "b"}
    cursor = hub.snapshot("a")["cursor"]
    hub.snapshot("b")
    hub.close()  # from here on the test takes the steps
    for name, step in (("a", 2), ("b", 5), ("a", 3)):
        write(logs[name], [step])
        hub.step()
    now, news = hub.after(cursor, {"a"})
    told = [json.loads(text)["changes"] for _, text in news]
    assert [change[2] for changes in told for change in changes if change[0] == "points"] == [2, 3]
    assert hub.after(news[0][0], {"a"})[1] == news[1:] and hub.after(now, {"a", "b"}) == (now, [])
    for lost in ("", "x", "other-1", f"{hub.boot}-999999", f"{hub.boot}--1"):
        assert hub.after(lost, {"a"}) == (now, None)
    with pytest.raises(KeyError):
        hub.snapshot("../a")


def test_a_hub_refuses_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Hub([tmp_path / "no"])
    with pytest.raises(FileNotFoundError, match="is not a run directory and holds none"):
        Hub([tmp_path])
