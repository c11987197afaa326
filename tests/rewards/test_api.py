import io
import json

import numpy as np
import pytest
from PIL import Image

from rlproxi.cli.score import summary
from rlproxi.rewards import RewardError, build
from rlproxi.rewards.api import BENCHMARK_STYLES, find_images, read_prompts, score_images


class Sum:
    """Mean of the pixels plus the prompt's length; remembers the shapes of its calls."""

    def __init__(self):
        self.shapes = []

    def score(self, images, prompts):
        assert images.dtype == np.uint8
        self.shapes.append(images.shape)
        return images.mean((1, 2, 3)) + [len(p) for p in prompts]


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)


SIZES = [(8, 6), (4, 4), (8, 6), (6, 8), (4, 4), (8, 6), (8, 6)]


# -- images -------------------------------------------------------------------------------


def test_images_of_any_sizes_keep_their_order():
    images, prompts = [picture(i, *size) for i, size in enumerate(SIZES)], ["x" * i for i in range(7)]
    scorer = Sum()
    scores = score_images(scorer, images, prompts, batch=3)
    assert scores.dtype == np.float32
    assert scores == pytest.approx([np.asarray(image).mean() + i for i, image in enumerate(images)], abs=1e-4)
    assert sorted(scorer.shapes) == sorted([(3, 6, 8, 3), (1, 6, 8, 3), (2, 4, 4, 3), (1, 8, 6, 3)])


def test_every_kind_of_input_gives_the_same_scores(tmp_path):
    images = [picture(i, 8, 6) for i in range(4)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    array = np.stack([np.asarray(image) for image in images])
    files = [tmp_path / f"{i}.png" for i in range(4)]
    expected = score_images(Sum(), array, "word")
    for given in (
        images,
        list(array),
        files,
        [str(f) for f in files],
        tmp_path,
        str(tmp_path),
        [files[0], images[1], array[2], str(files[3])],
    ):
        assert np.array_equal(score_images(Sum(), given, "word"), expected)
    assert np.array_equal(score_images(Sum(), files[2], "word"), expected[2:3])
    direct = build("jpeg", {"quality": 50}).score(array, [""] * 4)
    assert np.array_equal(score_images("jpeg", files, "", quality=50), direct)
    assert score_images(Sum(), [], "x").shape == (0,)


def test_every_mode_is_converted_and_alpha_is_dropped(tmp_path):
    clear = picture(1, 4, 4, "RGBA")
    grey = picture(2, 4, 4, "L")
    palette = picture(3, 4, 4).quantize(4)
    scores = score_images(Sum(), [clear, grey, palette], "")
    assert scores == pytest.approx(
        [np.asarray(clear)[..., :3].mean(), np.asarray(grey).mean(), np.asarray(palette.convert("RGB")).mean()],
        abs=1e-4,
    )
    clear.save(tmp_path / "a.png")
    assert score_images(Sum(), tmp_path / "a.png", "")[0] == scores[0]


def test_a_folder_is_searched_to_the_bottom_in_the_order_of_its_numbers(tmp_path):
    names = ["00000/2.jpg", "00000/10.PNG", "00000/a.webp", "00001/1.jpeg", "9.png"]
    for name in names[::-1]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0, 4, 4).save(tmp_path / name)
    (tmp_path / "00000/2.txt").write_text("a caption")
    assert find_images([tmp_path]) == [tmp_path / name for name in names]
    assert find_images([tmp_path / "9.png", tmp_path / "00000"]) == [tmp_path / n for n in ["9.png", *names[:3]]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_images([tmp_path / "nowhere"])


def test_unreadable_files_are_named(tmp_path):
    whole = io.BytesIO()
    picture(0, 32, 32).save(whole, "PNG")
    good, cut, text = (tmp_path / name for name in ("good.png", "cut.png", "text.png"))
    good.write_bytes(whole.getvalue())
    cut.write_bytes(whole.getvalue()[:-500])
    text.write_text("no image")
    for bad in (cut, text):
        with pytest.raises(ValueError, match=f"image {bad} cannot be read"):
            score_images(Sum(), [good, bad], "")
    scorer = Sum()
    with pytest.raises(FileNotFoundError, match="gone.png does not exist"):
        score_images(scorer, [good, tmp_path / "gone.png"], "")
    assert not scorer.shapes  # found before anything is scored


@pytest.mark.parametrize(
    "images, words",
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"images are float32 \[2, 4, 4, 3\], expected uint8"),
        (np.zeros((4, 4, 3), np.uint8), r"uint8 \[4, 4, 3\], expected"),
        ([np.zeros((4, 4, 3), np.uint8), 3], "image 1 is a int"),
        ([np.zeros((4, 4))], "image 0 is a ndarray"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        score_images(Sum(), images, "")


def test_other_mistakes_are_refused(monkeypatch):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        score_images(Sum(), images, ["a", "b", "c"])
    with pytest.raises(ValueError, match="batch is 0"):
        score_images(Sum(), images, "", batch=0)
    with pytest.raises(ValueError, match="quality: parameters are for a scorer that is given by name"):
        score_images(Sum(), images, "", quality=3)
    with pytest.raises(ValueError, match="did you mean jpeg"):
        score_images("jpg", images, "")
    for quality in (0, 101):
        with pytest.raises(ValueError, match=f"quality is {quality}; it must lie between 1 and 100"):
            score_images("jpeg", images, "", quality=quality)
    monkeypatch.setattr(Sum, "score", lambda *_: np.full(2, np.nan))
    with pytest.raises(RewardError, match="reward 'Sum' returned 2 scores that are NaN"):
        score_images(Sum(), images, "")


def test_the_bar_is_shown_for_more_than_one_batch(capsys):
    images = np.zeros((4, 4, 4, 3), np.uint8)
    score_images(Sum(), images, "", progress=True)
    score_images(Sum(), images, "", batch=2)
    assert capsys.readouterr() == ("", "")
    score_images(Sum(), images, "", batch=2, progress=True)
    told = capsys.readouterr()
    assert told.out == "" and "Sum" in told.err and "4/4" in told.err


def test_the_summary_is_the_mean_and_its_standard_error():
    error = pytest.approx((14 / 3 / 4) ** 0.5)
    assert summary(np.float32([1, 2, 3, 6])) == {"mean": 3.0, "count": 4, "standard_error": error}
    assert summary(np.float32([2])) == {"mean": 2.0, "standard_error": None, "count": 1}


# -- prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", "a cat\r\nein Hund \u2028 groß\n"),
        ("p.txt", "\ufeffa cat\nein Hund \u2028 groß\n\n"),
        ("p.json", '["a cat", "ein Hund \u2028 groß"]'),
        ("p.jsonl", '{"prompt": "a cat", "tag": 1}\n"ein Hund \u2028 groß"\n'),
        ("p.JSONL", '{"caption": "a cat"}\n{"prompt": "ein Hund \u2028 groß", "caption": "no"}'),
    ],
)
def test_prompts_are_read_from_each_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == ["a cat", "ein Hund \u2028 groß"]


def test_the_benchmark_is_a_folder_of_styles(tmp_path):
    for style in BENCHMARK_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))
    (tmp_path / "drawbench.json").write_text("[]")
    found = read_prompts(str(tmp_path))
    assert list(found) == ["anime", "concept-art", "paintings", "photo"]
    assert found["photo"] == ["photo 0", "photo 1", "photo 2"]
    for style in BENCHMARK_STYLES[1:]:
        (tmp_path / f"{style}.json").unlink()
    assert list(read_prompts(tmp_path)) == ["anime"]
    (tmp_path / "anime.json").unlink()
    with pytest.raises(FileNotFoundError, match="has none of anime.json, concept-art.json"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"a\n\nb\n", "line 2 is blank"),
        ("p.txt", b"\xff\xfe", "are not UTF-8"),
        ("p.json", b"[1", "are not JSON"),
        ("p.json", b'{"a": 1}', "hold a dict, expected a list"),
        ("p.json", b'["a", 3]', "entry 1 .* is a int"),
        ("p.jsonl", b'"a"\n{"text": "b"}', "line 2 is neither a text nor an object"),
        ("p.jsonl", b'"a"\n\n"b"', "line 2 are not JSON"),
        ("p.csv", b"a", "ends in .txt, .json, .jsonl"),
    ],
)
def test_bad_prompts_are_named_with_their_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts {tmp_path / name}.*{words}"):
        read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.txt do not exist"):
        read_prompts(tmp_path / "gone.txt")
