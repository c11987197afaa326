"""Galleries, evaluations and the timeline as the live page reads them; hostile files are refused."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from rlproxi.telemetry import gallery, timeline
from rlproxi.telemetry.live import files as live_files
from rlproxi.telemetry.live.files import NotThere, Timeline


@pytest.fixture
def run_dir(tmp_path):
    """A run with a gallery and an evaluation as the run writes them."""
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 8, 6, 3), dtype=np.uint8)
    gallery.write(
        folder,
        10,
        9,
        [
            gallery.GalleryGroup(
                "a <b>hat</b>",
                3,
                images[:4],
                np.array([0.1, np.nan, 0.9, 0.5]),
                {"judge": np.array([0.1, np.nan, 0.9, 0.5])},
            )
        ],
    )
    np.savez_compressed(folder / "samples" / "before-N3.npz", images=images, heldout=np.arange(12, dtype=np.float32))
    (folder / "evaluation" / "before.json").write_text(
        json.dumps(
            {
                "tag": "before",
                "iteration": 0,
                "prompts": ["p", "q", "r"],
                "samples": 4,
                "headline_steps": 3,
                "by_steps": {"3": {}, "5": {}},
            }
        )
    )
    return folder, images


def test_a_gallery_as_the_run_writes_it(run_dir):
    folder, images = run_dir
    (group,) = live_files.gallery(folder, 10)
    assert group["prompt"] == "a <b>hat</b>" and group["rewards"] == [0.1, None, 0.9, 0.5]
    assert (group["best"], group["worst"], group["picture"]) == (2, 0, True)
    picture = np.array(Image.open(io.BytesIO(live_files.gallery_picture(folder, 10, 0))))
    assert (picture == np.concatenate(list(images[:4]), 1)).all()
    for step, number in ((11, 0), (10, 1), (10, -1), (-1, 0)):
        with pytest.raises(NotThere):
            live_files.gallery_picture(folder, step, number)


def test_pictures_of_an_evaluation_are_its_prompts_samples(run_dir):
    folder, images = run_dir
    (entry,) = live_files.evaluations(folder)
    assert entry["steps"] == [3] and entry["prompts"] == ["p", "q", "r"] and entry["samples"] == 4
    data = live_files.evaluation_picture(folder, "before", 3, 2)
    assert (np.array(Image.open(io.BytesIO(data))) == np.concatenate(list(images[8:]), 1)).all()
    assert live_files.evaluation_scores(folder, "before", 3, 2) == [8.0, 9.0, 10.0, 11.0]
    for tag, steps, prompt in (
        ("before", 3, 3),
        ("before", 5, 0),
        ("after", 3, 0),
        ("../run/before", 3, 0),
        ("", 3, 0),
    ):
        with pytest.raises(NotThere):
            live_files.evaluation_picture(folder, tag, steps, prompt)
        with pytest.raises(NotThere):
            live_files.evaluation_scores(folder, tag, steps, prompt)


def both(folder):
    return live_files.evaluation_picture(folder, "before", 3, 0), live_files.evaluation_scores(folder, "before", 3, 0)


def test_damaged_and_hostile_archives_are_refused(run_dir):
    folder, _ = run_dir
    file = folder / "samples" / "before-N3.npz"
    whole = file.read_bytes()
    hostile = {
        "pickled": {"images": np.array([{}] * 12, object), "heldout": np.zeros(12)},
        "floats": {"images": np.zeros((12, 2, 2, 3)), "heldout": np.zeros(12)},
        "columns": {"images": np.asfortranarray(np.zeros((12, 2, 2, 3), np.uint8)), "heldout": np.zeros(12)},
        "no scores": {"images": np.zeros((12, 2, 2, 3), np.uint8)},
    }
    for arrays in hostile.values():
        np.savez(file, **arrays)
        with pytest.raises(NotThere):
            both(folder)
    for data in (b"", b"PK\x03\x04", whole[:200], whole[:-30], whole[:300] + b"\0" * 40 + whole[340:]):
        file.write_bytes(data)
        with pytest.raises(NotThere):
            both(folder)


def test_nothing_outside_the_run_directory_is_read(run_dir, tmp_path):
    folder, _ = run_dir
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    samples = folder / "samples"
    (samples / "link.png").symlink_to(secret)
    os.mkfifo(samples / "pipe.png")
    (samples / "text.png").write_text("no picture")
    for image in (
        "../secret.png",
        "samples/../../secret.png",
        str(secret),
        "samples/link.png",
        "samples/pipe.png",
        5,
        None,
        "config.yaml",
        "samples/text.png",
        "samples/",
        "samples/\0.png",
        "samples/missing.png",
    ):
        (samples / "000020.json").write_text(json.dumps({"groups": [{"image": image, "rewards": [1]}]}))
        with pytest.raises(NotThere):
            live_files.gallery_picture(folder, 20, 0)
    (samples / "000030.json").symlink_to(tmp_path / "outside.json")
    (tmp_path / "outside.json").write_text('{"groups": []}')
    with pytest.raises(NotThere):
        live_files.gallery(folder, 30)
    (folder / "evaluation" / "after.json").symlink_to(tmp_path / "outside.json")
    assert [entry["tag"] for entry in live_files.evaluations(folder)] == ["before"]


def test_the_timeline_is_the_newest_iterations(tmp_path):
    follow = Timeline(tmp_path, iterations=3)
    assert follow.read() == []
    for step in range(1, 6):
        timeline.append(tmp_path, "rl", step, [timeline.Span("rollout", 0, "sample", 100.0 + step, 0.5)])
    assert [line["step"] for line in follow.read()] == [3, 4, 5]
    assert follow.read()[-1]["spans"] == [("rollout", 0, "sample", 105.0, 0.5)]
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write(
            '{"stage": "rl", "step": 6, "spans": [[1]]}\nnot json\n'
            '{"stage": "rl", "step": 7, "spans": [["a", "b", "c", "d", 1]]}\n'
        )
    timeline.append(tmp_path, "rl", 5, [timeline.Span("learner", 1, "train", 107.0, 0.5)])  # resumed
    assert [(line["step"], line["spans"][0][0]) for line in follow.read()] == [
        (3, "rollout"),
        (4, "rollout"),
        (5, "learner"),
    ]
    assert [line["step"] for line in Timeline(tmp_path, tail=300).read()][-1] == 5
