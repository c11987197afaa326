import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from actors.train import checkpoints


def write(root, step: int, content: str = "weights", finish: bool = True, keep: int = 2, **made_by):
    """A checkpoint of two files; a torn one where ``finish`` is off."""
    scratch = checkpoints.begin(root, step)
    (scratch / "engine").mkdir()
    (scratch / "engine" / "rank0.bin").write_text(content * 100)
    save_file({content: np.zeros(2, np.float32)}, scratch / "ema.safetensors")
    return checkpoints.finish(root, step, 1, made_by, {}, keep) if finish else scratch


def newest(root):
    """(the checkpoint or None, warnings)."""
    warnings = []
    return checkpoints.latest(root, warnings.append), warnings


def names(root) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_nothing_written_is_nothing_found(tmp_path):
    assert newest(tmp_path / "no") == (None, [])


def test_a_finished_checkpoint_comes_back_with_its_facts(tmp_path):
    final = write(tmp_path / "rl", 20, seed=7)
    found, warnings = newest(tmp_path / "rl")
    assert found.folder == final == tmp_path / "rl" / "step-000020" and warnings == []
    assert (found.step, found.world, found.made_by) == (20, 1, {"seed": 7})
    assert {name: size for name, (size, _) in found.files.items()} == {
        "ema.safetensors": (final / "ema.safetensors").stat().st_size,
        "engine/rank0.bin": 700,
    }
    assert all(checkpoints.digest(final / name) == checksum for name, (_, checksum) in found.files.items())
    assert (final / "engine" / "rank0.bin").read_text() == "weights" * 100


def test_the_mark_is_a_plain_json_object_that_other_programs_can_read(tmp_path):
    """Old checkpoints have to stay readable, so its keys and their order are fixed."""
    mark = json.loads((write(tmp_path, 20, seed=7) / checkpoints.MARK).read_text())
    assert list(mark) == ["step", "files", "world", "made_by"]
    assert (mark["step"], mark["world"], mark["made_by"]) == (20, 1, {"seed": 7})


@pytest.mark.parametrize("made_by", [None, [], "a string"])
def test_a_checkpoint_that_does_not_say_its_circumstances_is_usable(tmp_path, made_by):
    mark = write(tmp_path, 20) / checkpoints.MARK
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "made_by": made_by}))
    assert newest(tmp_path)[0].made_by == {}


def test_only_the_newest_two_are_kept_counted_by_number(tmp_path):
    for step in (5, 999, 1000, 1000000):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-001000", "step-1000000"]
    assert newest(tmp_path)[0].step == 1000000


def test_a_torn_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 20)
    scratch = write(tmp_path, 40, finish=False)
    found, warnings = newest(tmp_path)
    assert found.folder.name == "step-000020" and warnings == []
    (scratch / "leftover").write_text("of the run that was killed")
    assert not (checkpoints.begin(tmp_path, 40) / "leftover").exists()


def test_a_step_written_again_replaces_what_was_there(tmp_path):
    write(tmp_path, 20, "old")
    final = write(tmp_path, 20, "new")
    assert list(load_file(final / "ema.safetensors")) == ["new"] and names(tmp_path) == ["step-000020"]


def cut(folder):
    (folder / "engine" / "rank0.bin").write_text("weig")


def lose(folder):
    (folder / "ema.safetensors").unlink()


def garble(folder):
    (folder / checkpoints.MARK).write_bytes(b"\x00\xff{not json")


def halve(folder):
    mark = folder / checkpoints.MARK
    mark.write_text(mark.read_text()[:15])


def unmark(folder):
    (folder / checkpoints.MARK).unlink()


def empty(folder):
    (folder / checkpoints.MARK).write_text("{}")


def flip(folder):
    file = folder / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def plant(folder):
    save_file({"mine": np.zeros(1)}, folder / "engine" / "state-00009.safetensors")


def edit(folder, **files):
    """An attacker's mark: what it says of the files is right."""
    mark = folder / checkpoints.MARK
    facts = json.loads(mark.read_text())
    facts["files"].update(files)
    mark.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "damaged: engine/rank0.bin (missing or cut short)"),
        (lose, "damaged: ema.safetensors (missing or cut short)"),
        (flip, "damaged: ema.safetensors (changed since it was written)"),
        (plant, "damaged: engine/state-00009.safetensors (not one of its files)"),
        (lambda folder: edit(folder, **{"../ema.safetensors": [1, "00"]}), "files outside of the folder"),
        (lambda folder: edit(folder, **{"/etc/passwd": [1, "00"]}), "files outside of the folder"),
        (lambda folder: edit(folder, **{"ema.safetensors": 7}), "no checksums"),
        (lambda folder: folder.joinpath(checkpoints.MARK).write_text("[" * 100_000), "unusable"),
        (garble, "unusable"),
        (halve, "unusable"),
        (unmark, "unusable"),
        (empty, "unusable"),
    ],
)
def test_damage_is_named_and_the_one_before_taken(tmp_path, damage, words):
    write(tmp_path, 20)
    damage(write(tmp_path, 40))
    found, (warning,) = newest(tmp_path)
    assert found.folder.name == "step-000020" and found.step == 20
    assert str(tmp_path / "step-000040") in warning and words in warning and "trying the one before" in warning


@pytest.mark.parametrize("mark", ["[]", "null", "3", '{"files": 3}'])
def test_a_mark_of_another_shape_is_damage_too(tmp_path, mark):
    write(tmp_path, 20)
    (write(tmp_path, 40) / checkpoints.MARK).write_text(mark)
    found, (warning,) = newest(tmp_path)
    assert found.folder.name == "step-000020" and "unusable" in warning


def test_when_all_are_damaged_the_run_starts_anew(tmp_path):
    for step in (20, 40):
        cut(write(tmp_path, step))
    found, (first, second, last) = newest(tmp_path)
    assert found is None and "step-000040" in first and "step-000020" in second
    assert f"no checkpoint in {tmp_path} can be used: the stage starts anew" in last


def test_a_new_checkpoint_is_never_dropped_for_damaged_newer_ones(tmp_path):
    for step in (40, 60):
        cut(write(tmp_path, step))
    assert newest(tmp_path)[0] is None  # so the run starts at 0 again
    assert write(tmp_path, 20).is_dir()
    assert newest(tmp_path)[0].step == 20


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert names(tmp_path) == ["notes.txt", "step-000002", "step-000003", "step-abc"]
    assert newest(tmp_path)[0].step == 3


def test_as_many_are_kept_as_the_config_says(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-000003", "step-000004", "step-000005"]
    write(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-000006"]


def test_nothing_is_dropped_for_one_that_is_not_read_back_as_it_was_written(tmp_path):
    """What another rank wrote is read here: that is when it is known to be there, and whole."""
    write(tmp_path, 20)
    scratch = write(tmp_path, 40, finish=False)
    sealed = {"ema.safetensors": checkpoints.seal(scratch / "ema.safetensors")}
    flip(scratch)
    with pytest.raises(OSError, match="not read back as it was written: ema.safetensors"):
        checkpoints.finish(tmp_path, 40, 1, {}, sealed, keep=1)
    assert newest(tmp_path)[0].step == 20


def test_what_killed_runs_left_is_cleared_away(tmp_path):
    for step in (40, 60):
        write(tmp_path, step, finish=False)
    write(tmp_path, 20)
    assert names(tmp_path) == ["step-000020"]


def test_files_and_folders_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda one, other: (done.append("named"), replace(one, other)))
    write(tmp_path, 20)
    before, after = done[: done.index("named")], done[done.index("named") + 1 :]
    written = str(checkpoints.scratch(tmp_path, 20))
    assert {
        f"{written}{end}" for end in ("", "/engine", "/engine/rank0.bin", "/ema.safetensors", "/complete.json")
    } == set(before)
    assert after == [str(tmp_path)]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_planted_pickle_is_not_executed_and_the_one_before_is_taken(form, tmp_path):
    """With checksums that are right: they tell damage from what was written, not friend from foe."""
    write(tmp_path / "rl", 20)
    folder = write(tmp_path / "rl", 40)
    file, marker = folder / "ema.safetensors", tmp_path / "executed"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"state": Bomb(marker)}, file)
    edit(folder, **{"ema.safetensors": checkpoints.seal(file)})
    found, (warning,) = newest(tmp_path / "rl")
    assert (
        found.folder.name == "step-000020"
        and "ema.safetensors (not a safetensors file)" in warning
        and not marker.exists()
    )
    with pytest.raises(FileExistsError), marker.parent.joinpath("executed").mkdir() or file.open("rb") as opened:
        torch.load(opened, weights_only=False) if form == "torch" else pickle.load(opened)  # it would have been


@settings(max_examples=40)  # each writes and synchronises two checkpoints
@given(
    st.binary(max_size=200), st.sampled_from(["ema.safetensors", checkpoints.MARK, "engine/rank0.bin"]), st.booleans()
)
def test_random_bytes_in_any_file_are_passed_over(tmp_path_factory, content, name, sealed):
    root = tmp_path_factory.mktemp("random")
    write(root, 20)
    folder = write(root, 40)
    (folder / name).write_bytes(content)
    if sealed and name == "ema.safetensors":
        edit(folder, **{name: checkpoints.seal(folder / name)})
    found, warnings = newest(root)
    assert found.folder.name == "step-000020" and len(warnings) == 1
