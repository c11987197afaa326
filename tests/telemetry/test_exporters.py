"""What leaves the run log: TensorBoard's files read back, Ray's metrics' sums, and faults that end nothing."""

import struct
import time

import pytest
import yaml

from actors.run.metric_exporters import Exporters, RayMetrics
from fixtures.local_actors import local_log
from rlproxi.config.sections import Telemetry
from rlproxi.telemetry import exporters
from rlproxi.telemetry.catalogue import prometheus_name
from rlproxi.telemetry.exporters import TensorBoard, check_packages
from rlproxi.telemetry.observations import observations
from rlproxi.telemetry.runlog import read


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of a folder's event files, in order; and "purge" -> the steps that sessions start from."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list] = {}
    for file in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at + 16 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)  # length, its checksum, the event, its checksum
            if at + 16 + length > len(data):
                break  # it is being written
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 5)))
            if event.HasField("session_log"):
                found.setdefault("purge", []).append((event.step, 0.0))
    return found


def test_tensorboard_files_hold_each_stage_and_drop_what_a_resume_supersedes(tmp_path):
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path, 4)
    board.tell("metrics", {"stage": "pretrain", "step": 10, "loss": 2.0})
    for step in (1, 2, 3):
        board.tell("metrics", {"stage": "rl", "step": step, "kl": step / 10, "loss": None})
    evaluation = {
        "stage": "rl",
        "tag": "before",
        "step": 0,
        "steps": 4,
        "heldout": {"judge": {"mean": 0.5, "sem": 0.1}},
    }
    board.tell("evaluation", evaluation)
    board.tell("evaluation", {**evaluation, "steps": 8})
    board.tell("warning", {"message": "not a scalar"})
    expected = {"kl": [(1, 0.1), (2, 0.2), (3, 0.3)], "heldout/judge": [(0, 0.5)], "heldout_sem/judge": [(0, 0.1)]}
    end = time.time() + 30
    while scalars(tmp_path / "tensorboard" / "rl") != expected:  # without close: a run may be killed
        assert time.time() < end, scalars(tmp_path / "tensorboard" / "rl")
        time.sleep(0.1)
    board.tell("resume", {"stage": "rl", "step": 2})
    board.tell("metrics", {"stage": "rl", "step": 3, "kl": 0.7})
    board.close()
    after = scalars(tmp_path / "tensorboard" / "rl")
    assert after["purge"] == [(3, 0.0)] and after["kl"][-1] == (3, 0.7)
    assert scalars(tmp_path / "tensorboard" / "pretrain") == {"loss": [(10, 2.0)]}


def test_what_counters_come_to():
    metrics = RayMetrics("a-run")

    def total(name, **record):
        for seen in observations("metrics", {"stage": "rl", "step": 1, **record}):
            if seen.name == name:
                return metrics.summed(seen)

    assert [total("groups/masked", **{"groups/masked": n}) for n in (0, 2, 0, 1)] == [0, 2, 2, 3]
    assert [total("restarts", restarts=n) for n in (0, 1, 1, 3)] == [0, 1, 1, 3], "it holds totals"
    assert total("restarts", restarts=1) == 4, "what counts was restarted: it begins anew"
    assert total("shards", shards=5) == 5


def test_ray_metrics_are_made_once_with_the_catalogues_words():
    metrics = RayMetrics("a-run")
    for step in (1, 2):
        metrics.tell("metrics", {"stage": "rl", "step": step, "kl": 0.1, "seconds/step": 1.5, "reward/hat": 0.3})
    names = {
        "rlproxi_warnings_total",
        "rlproxi_alarms_total",
        "rlproxi_step",
        "rlproxi_kl",
        "rlproxi_seconds_step",
        "rlproxi_reward",
    }
    assert set(metrics.made) == names
    made = metrics.made["rlproxi_reward"].info
    assert made["tag_keys"] == ("run", "stage", "name") and "before its weight" in made["description"]
    assert type(metrics.made["rlproxi_seconds_step"]).__name__ == "Histogram"
    assert all(prometheus_name(o.metric) in names for o in observations("metrics", {"stage": "rl", "step": 1, "kl": 1}))


def config(folder, **telemetry) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"telemetry": telemetry, "sampler": {"num_inference_steps": 4}}))


def test_a_log_writer_exports_what_the_config_of_its_run_asks_for(tmp_path):
    pytest.importorskip("tensorboardX")
    assert Exporters(str(tmp_path), pytest.fail).active == {}, "no config, no exporters"
    config(tmp_path, prometheus=False, tensorboard=True, wandb=None)
    log = local_log(tmp_path).thing
    assert list(log.exporters.active) == ["TensorBoard"]
    assert log.exporters.active["TensorBoard"].headline_steps == 4
    log.append("metrics", {"stage": "rl", "step": 1, "kl": 0.25})
    log.close()
    assert scalars(tmp_path / "tensorboard" / "rl") == {"kl": [(1, 0.25)]}
    assert [r["event"] for r in read(tmp_path)] == ["metrics"]


class Broken:
    def tell(self, event, fields):
        raise OSError("disk full")

    def close(self):
        raise OSError("disk full")


def test_a_fault_is_told_once_and_the_log_goes_on(tmp_path):
    config(tmp_path, prometheus=False)
    log = local_log(tmp_path).thing
    log.exporters.active["TensorBoard"] = Broken()
    for step in (1, 2, 3):
        log.append("metrics", {"stage": "rl", "step": step, "kl": 0.25})
    log.close()
    records = read(tmp_path)
    assert [r["step"] for r in records if r["event"] == "metrics"] == [1, 2, 3]
    (told,) = [r["message"] for r in records if r["event"] == "warning"]
    assert told == "telemetry: TensorBoard gets no more records: OSError: disk full"


def test_a_config_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [")
    told = []
    assert Exporters(str(tmp_path), told.append).active == {} and "telemetry: the config" in told[0]


def test_missing_packages_are_named_before_anything_starts(monkeypatch):
    check_packages(Telemetry())
    monkeypatch.setattr(exporters.importlib.util, "find_spec", lambda name: None)
    check_packages(Telemetry())
    with pytest.raises(ImportError, match="telemetry.wandb is set, but the package wandb is missing: pip install"):
        check_packages(Telemetry(wandb="faces"))
    with pytest.raises(ImportError, match="pip install tensorboardX, or set telemetry.tensorboard=false"):
        check_packages(Telemetry(tensorboard=True))


def test_weights_and_biases_without_a_server(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "faces-1"
    run_dir.mkdir()
    config(run_dir, prometheus=False, wandb="faces")
    log = local_log(run_dir).thing
    log.append("metrics", {"stage": "pretrain", "step": 10, "loss": 2.0})
    log.append("metrics", {"stage": "rl", "step": 1, "kl": 0.25, "reward/hat": 0.5})
    log.append("warning", {"message": "something"})
    summary = dict(log.exporters.active["W&B"].run.summary)
    log.close()
    told = {"pretrain/loss": 2.0, "pretrain/step": 10, "rl/kl": 0.25, "rl/step": 1, "rl/reward/hat": 0.5}
    assert told.items() <= summary.items()
    assert list((run_dir / "wandb").glob("offline-run-*/run-faces-1.wandb"))
    assert [r["event"] for r in read(run_dir)] == ["metrics", "metrics", "warning"], "no fault was told"
