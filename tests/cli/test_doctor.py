"""Every finding, on machines, files and clusters that lack it and that have it."""

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from actors.cluster import doctor as cluster_doctor
from actors.cluster.plan import Cluster, NodeGroup, NodeReport
from fixtures import tiny_checkpoints
from rlproxi.cli import doctor
from rlproxi.cli.main import run_command
from rlproxi.config.loading import build_config, dump_config
from rlproxi.errors import ConfigError
from rlproxi.planning import machine

ROOT = Path(__file__).parents[2]
JPEG = {"rewards": {"train": [{"name": "jpeg"}], "heldout": []}}


def config(*overrides: str, **sections):
    return build_config({**JPEG, **sections}, list(overrides))


def one(found, what: str):
    (finding,) = [f for f in found if f.what == what]
    return finding


def levels(found) -> list[str]:
    return [f.level for f in found]


# -- as a command -------------------------------------------------------------------------


def test_a_config_in_order_ends_with_0_and_says_what_is_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "NEEDED", ("ray", "torch"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    arguments = [str(ROOT / "configs" / "smoke.yaml"), f"run.dir={tmp_path}", "telemetry.dashboard=false"]
    assert run_command("doctor", arguments) == 0
    told = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in told and "smoke: stages" in told and "\n0 to mend" in told
    assert all(line.split()[0] in ("ok", "warn", "->") for line in told.splitlines()[:-2])


def test_options_may_stand_anywhere_and_a_cluster_that_is_too_small_ends_with_1(capsys, tmp_path):
    code = run_command(
        "doctor",
        [
            str(ROOT / "configs" / "proxt2i-512.yaml"),
            "--cluster",
            str(ROOT / "cluster" / "aws.yaml"),
            "resources.placement=roles",
            "rewards.replicas=5",
            f"run.dir={tmp_path}",
        ],
    )
    told = capsys.readouterr().out
    assert code == 1
    assert "fail  cluster     this run asks for 5 reward GPUs, the cluster tops out at 4" in told
    assert "checkpoint 'models/hpsv2/HPS_v2.1_compressed.pt' does not exist" in told


def test_bad_input_is_the_users(capsys):
    assert run_command("doctor", ["a.yaml", "b.yaml"]) == 2
    assert "one config at a time" in capsys.readouterr().err
    assert run_command("doctor", ["rl.lrr=1"]) == 2
    assert "unknown key" in capsys.readouterr().err


def test_advice_of_a_run(capsys, tmp_path):
    dump_config(config(), tmp_path / "config.yaml")
    assert run_command("doctor", ["--run", str(tmp_path)]) == 0
    assert "no advice" in capsys.readouterr().out


def test_the_pure_part_needs_no_ray():
    code = (
        "import sys, rlproxi.planning.machine, rlproxi.planning.preflight; "
        "sys.exit(any(m == 'ray' or m.startswith(('ray.', 'actors')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- the machine --------------------------------------------------------------------------


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(machine, "NEEDED", ("torch", "no-such-package"))
    found = list(machine.packages())
    assert (
        levels(found) == ["fail", "ok"]
        and "no-such-package is not installed" in found[0].text
        and "pip install" in found[0].remedy
    )


def test_gpus_that_are_asked_for_and_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    asked = config("resources.rollout_gpus=1", "resources.learner_gpus=1")
    here = list(machine.accelerators(asked, 2.0, elsewhere=False))
    assert (
        here[-1].level == "fail"
        and "asks for 2 GPUs and this machine has 0" in here[-1].text
        and "--cluster" in here[-1].remedy
    )
    assert "fail" not in levels(machine.accelerators(asked, 2.0, elsewhere=True))
    assert levels(machine.accelerators(config(), 0.0, elsewhere=False)) == ["ok"]


def test_tokens(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "open to whoever" in one(machine.token(), "token").text
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    missing = one(machine.token(), "token")
    assert missing.level == "fail" and "ray get-auth-token --generate" in missing.remedy
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("abc")
    file.chmod(0o600)
    assert levels(machine.token()) == ["ok"]
    monkeypatch.delenv("RAY_AUTH_MODE")
    trap = one(machine.token(), "token")
    assert trap.level == "warn" and "export RAY_AUTH_MODE=token" in trap.remedy
    file.chmod(0o644)
    assert "chmod 600" in list(machine.token())[-1].remedy and stat.S_IMODE(file.stat().st_mode) == 0o644


def test_room(tmp_path, monkeypatch):
    found = list(machine.space(config(f"run.dir={tmp_path}/not/yet")))
    assert found[0].what == "disk" and "GiB free" in found[0].text and not (tmp_path / "not").exists()
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "cannot be written" in next(machine.space(config(f"run.dir={tmp_path}"))).text


def test_a_port_that_is_taken():
    import socket

    with socket.socket() as one_socket:
        one_socket.bind(("127.0.0.1", 0))
        one_socket.listen()
        port = one_socket.getsockname()[1]
        told = [f.text for f in machine.ports(config(f"telemetry.dashboard_port={port}"))]
    assert any(f"{port} (the live page): in use" in text for text in told)


# -- files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_a_checkpoint_that_is_something_else(tmp_path, content, words):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert words in doctor.damaged(path)


def test_a_checkpoint_that_is_whole_or_cut_short(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(1000)}, path)
    assert zipfile.is_zipfile(path) and doctor.damaged(path) is None
    path.write_bytes(path.read_bytes()[:2000])
    assert doctor.damaged(path) == "is cut short"
    from safetensors.torch import save_file

    path = tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(10)}, path)
    assert doctor.damaged(path) is None
    path.write_bytes(path.read_bytes()[:20])
    assert doctor.damaged(path) == "is cut short"


def test_a_reward_whose_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "hps.pt"
    path.write_text("<html>not found</html>")
    sick = build_config(
        {"rewards": {"train": [{"name": "hpsv2.1", "params": {"checkpoint": str(path)}}], "heldout": []}}
    )
    assert "is a web page" in one(doctor.files(sick), "reward").text
    torch.save({"x": torch.zeros(2)}, path)
    assert one(doctor.files(sick), "reward").level == "ok", "its outer form is right"
    loaded = one(doctor.files(sick, load=True), "reward")
    assert loaded.level == "fail" and "does not load" in loaded.text
    assert one(doctor.files(config(), load=True), "reward").text == "jpeg: loaded"


def test_models_are_opened(tmp_path):
    folder = tiny_checkpoints.sd15(tmp_path / "model")
    found = list(doctor.files(config(f"model.init={folder}", "data.size=64")))
    assert "fail" not in levels(found) and sum("can be read" in f.text for f in found) >= 3
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert any(
        f.level == "fail" and "damaged" in f.text for f in doctor.files(config(f"model.init={folder}", "data.size=64"))
    )
    missing = list(doctor.files(config("model.init=nowhere")))
    assert missing[0].level == "fail" and "model.init: nowhere is not a folder" in missing[0].text and missing[0].remedy


# -- clusters -----------------------------------------------------------------------------


def cluster(*groups: NodeGroup) -> Cluster:
    return Cluster((NodeGroup("head", {"CPU": 0.0}, 1, 1, head=True), *groups), 10)


def test_roles_that_are_not_told_apart_and_nodes_nobody_uses():
    groups = [NodeGroup(role, {"CPU": 4.0, role: 1.0}, 0, 2) for role in ("rollout", "learner")] + [
        NodeGroup("reward", {"CPU": 4.0, "reward": 1.0}, 2, 2)
    ]
    found = list(cluster_doctor.check_fit(config(), cluster(*groups)))
    assert "add resources.placement=roles" in [f.remedy for f in found]
    found = list(cluster_doctor.check_fit(config("resources.placement=roles"), cluster(*groups)))
    assert "add resources.placement=roles" not in [f.remedy for f in found] and "fail" not in levels(found)
    assert any("pays for nodes it does not use" in f.remedy for f in found), "two reward nodes are kept, one is used"
    assert any("resources.autoscaling=true" in f.remedy for f in found)
    grows = config("resources.placement=roles", "resources.autoscaling=true")
    found = list(cluster_doctor.check_fit(grows, cluster(*groups)))
    assert not any("resources.autoscaling=true" in f.remedy for f in found)


def test_max_replicas_beyond_the_cluster_is_worth_a_word():
    grows = build_config({"rewards": {"train": [{"name": "jpeg", "num_gpus": 1, "max_replicas": 3}], "heldout": []}})
    groups = NodeGroup("any", {"CPU": 8.0, "GPU": 1.0}, 0, 2)
    found = list(cluster_doctor.check_fit(grows, cluster(groups)))
    assert "fail" not in levels(found) and any("max_replicas: this run asks for 3 reward GPUs" in f.text for f in found)


def test_a_cluster_file_that_cannot_be_read(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1")
    assert levels(cluster_doctor.check_file(config(), str(tmp_path / "c.yaml"))) == ["fail"]
    assert levels(cluster_doctor.check_file(config(), str(tmp_path / "d.yaml"))) == ["fail"]
    values = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    (tmp_path / "l.yaml").write_text(yaml.safe_dump(values))
    assert levels(cluster_doctor.check_file(config(), str(tmp_path / "l.yaml"))) == ["warn"], (
        "what its machines offer is not in the file"
    )


def node(address="10.0.0.1", **more) -> NodeReport:
    return NodeReport(address, **{"head": False, "offers": "4 CPU", "versions": {"torch": "2.13"}, **GOOD, **more})


GOOD = {"sees_folder": True, "skew": 0.1}


def test_nodes_that_differ_are_silent_blind_or_late():
    assert set(levels(cluster_doctor.check_nodes([node(), node("10.0.0.2")], "/shared"))) == {"ok"}
    nodes = [
        node(),
        node("10.0.0.2", versions={"torch": "2.12"}, sees_folder=False, skew=-30.0),
        NodeReport("10.0.0.3", False, "", error="timeout"),
    ]
    found = list(cluster_doctor.check_nodes(nodes, "/shared"))
    text = "\n".join(map(str, found))
    assert "nodes differ in torch: 2.13 on 1 node(s), 2.12 on 1 node(s)" in text
    assert "10.0.0.2 do not see" in text and "30.0 s apart" in text and "10.0.0.3 does not answer: timeout" in text
    assert levels(found).count("fail") == 4


def test_a_cluster_that_cannot_be_joined(monkeypatch):
    def refuse(address, folder):
        raise ConfigError("cannot join")

    monkeypatch.setattr("actors.cluster.inspection.inspect_cluster", refuse)
    assert levels(cluster_doctor.check_running(config(), "1.2.3.4:6379")) == ["fail"]


def test_a_cluster_that_answers(monkeypatch):
    def inspect(address, folder):
        assert address == "auto" and os.path.isabs(folder)
        return [node(head=True)], cluster(NodeGroup("a", {"CPU": 4.0}, 1, 1)), None

    monkeypatch.setattr("actors.cluster.inspection.inspect_cluster", inspect)
    found = list(cluster_doctor.check_running(config(), "auto"))
    assert "fail" not in levels(found) and any("stays as it is" in f.text for f in found)
