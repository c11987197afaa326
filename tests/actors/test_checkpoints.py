import pytest

from actors import checkpoints
from rlproxi.schema import ConfigError


def write(root, step: int, content: str = "weights", finish: bool = True, **facts):
    """A checkpoint of two files; a torn one where ``finish`` is off."""
    scratch = checkpoints.begin(root, step)
    (scratch / "engine").mkdir()
    (scratch / "engine" / "rank0.bin").write_text(content * 100)
    (scratch / "ema.safetensors").write_text(content)
    return checkpoints.finish(root, step, {"world": 1, **facts}) if finish else scratch


def newest(root):
    """((folder, facts) or None, warnings)."""
    warnings = []
    return checkpoints.latest(root, warnings.append), warnings


def names(root) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_nothing_written_is_nothing_found(tmp_path):
    assert newest(tmp_path / "no") == (None, [])


def test_a_finished_checkpoint_comes_back_with_its_facts(tmp_path):
    final = write(tmp_path / "rl", 20, seed=7)
    (folder, facts), warnings = newest(tmp_path / "rl")
    assert folder == final == tmp_path / "rl" / "step-000020" and warnings == []
    assert facts["step"] == 20 and facts["world"] == 1 and facts["seed"] == 7
    assert facts["files"] == {"ema.safetensors": 7, "engine/rank0.bin": 700}
    assert (folder / "engine" / "rank0.bin").read_text() == "weights" * 100


def test_only_the_newest_two_are_kept_counted_by_number(tmp_path):
    for step in (5, 999, 1000, 1000000):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-001000", "step-1000000"]
    assert newest(tmp_path)[0][1]["step"] == 1000000


def test_a_torn_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 20)
    scratch = write(tmp_path, 40, finish=False)
    (folder, _), warnings = newest(tmp_path)
    assert folder.name == "step-000020" and warnings == []
    (scratch / "leftover").write_text("of the run that was killed")
    assert not (checkpoints.begin(tmp_path, 40) / "leftover").exists()


def test_a_step_written_again_replaces_what_was_there(tmp_path):
    write(tmp_path, 20, "old")
    final = write(tmp_path, 20, "new")
    assert (final / "ema.safetensors").read_text() == "new" and names(tmp_path) == ["step-000020"]


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


@pytest.mark.parametrize("damage, words", [
    (cut, "damaged (missing or cut short: engine/rank0.bin)"),
    (lose, "damaged (missing or cut short: ema.safetensors)"),
    (garble, "unusable"), (halve, "unusable"), (unmark, "unusable"), (empty, "unusable")])
def test_damage_is_named_and_the_one_before_taken(tmp_path, damage, words):
    write(tmp_path, 20)
    damage(write(tmp_path, 40))
    (folder, facts), (warning,) = newest(tmp_path)
    assert folder.name == "step-000020" and facts["step"] == 20
    assert str(tmp_path / "step-000040") in warning and words in warning and "trying the one before" in warning


@pytest.mark.parametrize("mark", ["[]", "null", "3", '{"files": 3}'])
def test_a_mark_of_another_shape_is_damage_too(tmp_path, mark):
    write(tmp_path, 20)
    (write(tmp_path, 40) / checkpoints.MARK).write_text(mark)
    (folder, _), (warning,) = newest(tmp_path)
    assert folder.name == "step-000020" and "unusable" in warning


def test_when_all_are_damaged_the_run_starts_anew(tmp_path):
    for step in (20, 40):
        cut(write(tmp_path, step))
    found, warnings = newest(tmp_path)
    assert found is None and [w.split()[1][-2:] for w in warnings] == ["40", "20"]


def test_a_new_checkpoint_is_never_dropped_for_damaged_newer_ones(tmp_path):
    for step in (40, 60):
        cut(write(tmp_path, step))
    assert newest(tmp_path)[0] is None  # so the run starts at 0 again
    assert write(tmp_path, 20).is_dir()
    assert newest(tmp_path)[0][1]["step"] == 20


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert names(tmp_path) == ["notes.txt", "step-000002", "step-000003", "step-abc"]
    assert newest(tmp_path)[0][1]["step"] == 3


def test_another_number_of_ranks_is_refused_with_the_remedy(tmp_path):
    checkpoints.require_world(tmp_path / "none yet", 2)
    write(tmp_path, 20, world=2)
    write(tmp_path, 40, world=4)
    checkpoints.require_world(tmp_path, 4)
    with pytest.raises(ConfigError, match="step-000040 was written by 4 learner ranks and cannot be resumed by 2: "
                                          "set resources.learner_workers=4"):
        checkpoints.require_world(tmp_path, 2)
    cut(tmp_path / "step-000040")  # what counts is the one that would be taken
    checkpoints.require_world(tmp_path, 2)
