"""Prompts from files: order, repetition, what is held out, and errors that name the line."""

import json
import os

import pytest

from rlproxi.config.loading import build_config
from rlproxi.data.prompts import heldout_prompts, load_prompts, reserved, training_prompts

WORDS = [f"prompt number {i}" for i in range(200)]
FREE = [w for w in WORDS if not reserved(w)]
HELD = [w for w in WORDS if reserved(w)]


def config(prompts=None, heldout=None, per_step=8, evaluate=4, seed=0, **data):
    return build_config(
        {
            "run": {"seed": seed},
            "data": {"prompts": prompts and str(prompts), **data, "heldout_prompts": heldout and str(heldout)},
            "rl": {"prompts_per_step": per_step},
            "evaluate": {"prompts": evaluate},
        }
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(WORDS) + "\n\n  " + WORDS[3] + "\n")
    return path


def test_every_free_prompt_comes_once_an_epoch_in_an_order_that_changes(file):
    c = config(file)
    steps = 2 * len(FREE) // 8 + 1
    indices, drawn = zip(*(training_prompts(c, step) for step in range(steps)))
    assert [i for row in indices for i in row] == list(range(8 * steps))
    drawn = [p for row in drawn for p in row]
    first, second = drawn[: len(FREE)], drawn[len(FREE) : 2 * len(FREE)]
    assert sorted(first) == sorted(second) == sorted(FREE)
    assert first != second and first != FREE
    assert training_prompts(config(file, seed=1), 0)[1] != training_prompts(c, 0)[1] == drawn[:8]


def test_the_reserved_sixteenth_is_held_out_in_the_files_order(file):
    assert len(HELD) >= 8 and not set(HELD) & set(FREE)
    assert heldout_prompts(config(file, evaluate=4)) == ([0, 1, 2, 3], HELD[:4])
    assert heldout_prompts(config(file, evaluate=8, seed=3))[1] == HELD[:8]


def test_a_heldout_file_replaces_the_sixteenth_and_is_never_trained_on(file, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": p, "more": 1}) + "\n" for p in [*WORDS[:10], WORDS[0], "café"]))
    c = config(file, held, per_step=184, evaluate=11)
    assert heldout_prompts(c)[1] == [*WORDS[:10], "café"]
    drawn = [p for step in (0, 1) for p in training_prompts(c, step)[1]]
    assert sorted(drawn[:190]) == sorted(WORDS[10:]) and not set(drawn) & set(WORDS[:10])
    # Beside the portraits too.
    portraits = config(None, held, per_step=8, evaluate=2)
    caption = training_prompts(portraits, 0)[1][0]
    held.write_text(json.dumps({"prompt": caption}) + "\n" + json.dumps({"prompt": "other"}))
    assert caption not in training_prompts(portraits, 0)[1] and heldout_prompts(portraits)[1] == [caption, "other"]


def test_too_few_heldout_prompts_are_counted(file, tmp_path):
    with pytest.raises(ValueError, match=f"has {len(HELD)} distinct prompts, and evaluate.prompts asks for 64"):
        heldout_prompts(config(file, evaluate=64))
    short = tmp_path / "short.txt"
    short.write_text("one\none\ntwo\n")
    with pytest.raises(ValueError, match=r"data.heldout_prompts = '.*short.txt' has 2 distinct prompts, .* asks for 3"):
        heldout_prompts(config(file, short, evaluate=3))
    with pytest.raises(ValueError, match="all of its 2 prompts are held out"):
        training_prompts(config(short, short), 0)


def test_shards_without_prompts_say_what_is_missing():
    c = config(source="shards", urls=["x.tar"])
    for draw in (lambda: training_prompts(c, 0), lambda: heldout_prompts(c)):
        with pytest.raises(ValueError, match="data.prompts is not set.*stage encode"):
            draw()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"good\ncaf\xe9\n", "line 2: .*utf-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2: Expecting value"),
        ("a.jsonl", b'{"caption": "x"}\n', 'line 1: expected an object with a non-empty "prompt"'),
        ("a.jsonl", b'\n["x"]\n', "line 2: expected an object"),
        ("a.jsonl", b'{"prompt": " "}\n', "line 1: expected an object"),
        ("a.csv", b"x\n", "has an unknown ending"),
    ],
)
def test_bad_files_name_the_file_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data.prompts = '.*{name}'.*{message}"):
        training_prompts(config(tmp_path / name), 0)
    with pytest.raises(FileNotFoundError, match="data.prompts = 'none.txt' does not exist"):
        training_prompts(config("none.txt"), 0)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert load_prompts("k", str(path)) == ("one", "two")
    path.write_text("three")
    os.utime(path, ns=(1, 1))
    assert load_prompts("k", str(path)) == ("three",)
