"""What is written whole or not at all, and links that stay what they were."""

import hashlib
import os

import pytest

from rlproxi import files


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_draft_replaces_its_file_at_the_end_alone(tmp_path):
    place = tmp_path / "new" / "file.json"
    files.write_json(place, {"a": 1})
    with files.draft(place) as scratch:
        scratch.write_text("half")
        assert place.read_text() == '{\n "a": 1\n}' and scratch.parent == place.parent and scratch.name.startswith(".")
    assert place.read_text() == "half" and names(place.parent) == ["file.json"]


def test_a_draft_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "file", "é")
    with pytest.raises(RuntimeError), files.draft(tmp_path / "file") as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("there", [None, "empty", "full"])
def test_a_folder_replaces_another_whole(tmp_path, there):
    place = tmp_path / "folder"
    if there:
        place.mkdir()
    if there == "full":
        (place / "old").write_text("")
    with files.folder_draft(place) as fresh:
        fresh.mkdir()
        (fresh / "new").write_text("")
    assert names(place) == ["new"] and names(tmp_path) == ["folder"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    (place / "old").write_text("")
    with pytest.raises(RuntimeError), files.folder_draft(place) as fresh:
        fresh.mkdir()
        raise RuntimeError
    with pytest.raises(FileNotFoundError), files.folder_draft(place):
        pass  # nothing was made, so there is nothing to rename
    assert names(place) == ["old"] and names(tmp_path) == ["folder"]


def test_a_checksum_is_that_of_the_content(tmp_path):
    content = os.urandom(2_500_000)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert files.digest(tmp_path / "file", hashlib.blake2b()) == hashlib.blake2b(content).hexdigest()


def test_a_link_follows_relative_symbolic_links(tmp_path):
    """As in Hugging Face's cache, where each file of a snapshot points at ../../blobs/<hash>."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "ab12").write_text("weights")
    snapshot = tmp_path / "snapshots" / "main"
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "model.safetensors").symlink_to("../../../blobs/ab12")
    target = tmp_path / "elsewhere" / "model"
    files.link(snapshot, target)
    linked = target / "unet" / "model.safetensors"
    assert linked.read_text() == "weights" and not linked.is_symlink()
    assert linked.samefile(tmp_path / "blobs" / "ab12")
    files.link(snapshot / "unet" / "model.safetensors", tmp_path / "one")
    assert (tmp_path / "one").samefile(linked) and not (tmp_path / "one").is_symlink()


def test_a_link_is_a_copy_where_the_file_system_has_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("x")
    files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x" and not (tmp_path / "b").samefile(tmp_path / "a")
