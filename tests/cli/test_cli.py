import csv
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from rlproxi.cli import main as cli
from rlproxi.config.sections import Sampler, Schedule
from rlproxi.errors import ConfigError
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.models.unet import ProximalUNet
from rlproxi.telemetry.runlog import RunLog

CAPTION = "a smiling person with a red hat"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with a small untrained model in it."""
    unet = ProximalUNet(
        sample_size=16, patch=4, channels=(32,), blocks=(1,), attention=(False,), text_dim=32, pooled_dim=32
    )
    with torch.no_grad():
        unet.head.weight.normal_(std=0.1)
    path = tmp_path_factory.mktemp("runs") / "one"
    TextToImage(
        unet, build_text_encoder([CAPTION], 32, 1, 12), Schedule(), Sampler(num_inference_steps=2)
    ).save_pretrained(path / "models" / "final")
    with RunLog(path) as log:
        log.append("note", message="hello")
    return path


def test_sample_writes_a_grid_of_prompts_and_seeds(run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    arguments = [
        "sample",
        CAPTION,
        "a person",
        "--model",
        str(run_dir),
        "--count",
        "3",
        "--scale",
        "2",
        "--seed",
        "5",
        "--steps",
        "3",
        "--guidance",
        "1.5",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out) and "warning" not in captured.err
    sheet = np.array(Image.open(out))
    assert sheet.shape == (2 * 32 + 4, 3 * 32 + 2 * 4, 3)
    # Column 2 is seed 6: the pipeline's own image.
    expected = TextToImage.from_pretrained(run_dir)([CAPTION], 3, 1.5, [6])[0]
    assert np.abs(sheet[:32:2, 36:68:2].astype(int) - expected).max() <= 1
    first = out.read_bytes()
    assert cli.main(arguments) == 0 and out.read_bytes() == first


def test_sample_warns_of_words_the_model_does_not_know(run_dir, tmp_path, capsys):
    assert (
        cli.main(["sample", "a green robot", "--model", str(run_dir), "--count", "1", "--out", str(tmp_path / "x.png")])
        == 0
    )
    assert "warning: this model has no token for green, robot" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sample", "x", "--model", "no/such"], "no/such is not a folder: expected a model folder"),
        (["sample", "x", "--model", ".", "--out", "x.jpg"], "must end in .png"),
        (["report", "no/such"], "no/such is not a folder: expected a run directory"),
        (["export", "no/such", "out"], "no/such is not a folder: expected a model folder"),
        (["export", ".", "."], ". holds no model: expected a model folder"),
        (["serve", "no/such"], "no/such is not a folder: expected a model folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["sample", "--model", "x"], "required: PROMPT"),
        (["sample", "x", "--model", "y", "--count", "0"], "0 is less than 1"),
        (["sample", "x", "--model", "y", "--steps", "few"], "invalid integer value: 'few'"),
        (["score", "x"], "required: --reward"),
        (["score", "--reward", "jpeg"], "required: IMAGES"),
        (["score", "x", "--reward", "y", "--prompt", "a", "--prompts", "b"], "not allowed with argument --prompt"),
        (["score", "x", "--reward", "y", "--json", "a", "--csv", "b"], "not allowed with argument --json"),
        (["export", "x"], "required: OUT"),
        (["export", "x", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["serve"], "required: MODEL"),
        (["serve", "x", "--port", "0"], "0 is less than 1"),
        (["serve", "x", "--gpus", "-1"], "-1 is not a number of at least 0"),
        (["serve", "x", "--cpus", "nan"], "nan is not a number of at least 0"),
    ],
)
def test_bad_usage_is_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.fixture
def images(tmp_path):
    """Five images of two sizes in img2dataset's layout, and their mean colours: what a reward of the test's reads."""
    means = []
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8 + 4 * (i % 2), 3), np.uint8)
        file = tmp_path / "set" / f"{i // 3:05d}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text("x" * i + "\n")
        means.append(pixels.mean())
    return tmp_path / "set", np.array(means)


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """One's own reward in the working directory: mean colour plus the prompt's length."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "own_brightness.py").write_text(
        "def score(images, prompts):\n"
        "    if prompts[0] == 'fail': raise RuntimeError('out of\\nmemory')\n"
        "    return [image.mean() + len(prompt) for image, prompt in zip(images, prompts)]\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_brightness", raising=False)
    return ["--reward", "python", "--param", "function=own_brightness:score"]


def test_score_prints_a_table_with_sidecar_prompts(images, brightness, capsys):
    folder, means = images
    assert cli.main(["score", str(folder), *brightness, "--batch", "2"]) == 0
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    expected = means + np.arange(5)
    assert rows[0].split() == ["score", "file"] and len(rows) == 7
    assert [row.split()[1] for row in rows[1:6]] == [str(folder / f"{i // 3:05d}/{i:04d}.png") for i in range(5)]
    assert [float(row.split()[0]) for row in rows[1:6]] == pytest.approx(expected, abs=1e-4)
    error = expected.std(ddof=1) / 5**0.5
    assert rows[6] == f"mean {np.float32(expected).mean(dtype=float):.4f}, standard error {error:.4f}, 5 images"
    assert "5/5" in captured.err  # three batches: a bar, on stderr
    assert cli.main(["score", str(folder / "00001/0003.png"), *brightness]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.splitlines()[-1] == f"mean {means[3] + 3:.4f}, 1 image"
    assert cli.main(["score", str(folder / "00001/0003.png"), *brightness, "--prompt", "fail"]) == 2
    assert capsys.readouterr() == ("", "error: reward 'python' raised RuntimeError: out of; memory\n")


def test_score_takes_prompts_by_order_and_writes_files(images, brightness, tmp_path, capsys):
    folder, means = images
    (tmp_path / "p.json").write_text(json.dumps(["a", "", "ccc", 'd, "d"', "e"]))
    lengths = [1, 0, 3, 6, 1]
    out = tmp_path / "new" / "scores.json"
    assert cli.main(["score", str(folder), *brightness, "--prompts", str(tmp_path / "p.json"), "--json", str(out)]) == 0
    told = json.loads(out.read_text(encoding="utf-8"))
    assert told["reward"] == "python" and told["scorer"] == {"class": "rlproxi.rewards.function.FunctionReward"}
    assert [row["prompt"] for row in told["scores"]] == ["a", "", "ccc", 'd, "d"', "e"]
    assert [row["score"] for row in told["scores"]] == pytest.approx(means + lengths, abs=1e-4)
    assert told["count"] == 5 and told["mean"] == pytest.approx(np.mean(means + lengths), abs=1e-4)
    assert told["standard_error"] == pytest.approx(np.std(means + lengths, ddof=1) / 5**0.5, abs=1e-4)
    assert cli.main(["score", str(folder), *brightness, "--prompt", "four", "--csv", str(tmp_path / "s.csv")]) == 0
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prompt"] for row in rows] == ["four"] * 5
    assert [float(row["score"]) for row in rows] == pytest.approx(means + 4, abs=1e-4)


def test_score_pairs_the_benchmarks_styles_with_its_prompts(brightness, tmp_path, capsys):
    for style, numbers in (("anime", (0, 2)), ("photo", (1,))):
        (tmp_path / "bench").mkdir(exist_ok=True)
        (tmp_path / "bench" / f"{style}.json").write_text(json.dumps(["", "1", "22"]))
        for number in numbers:
            (tmp_path / "drawn" / style).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "drawn" / style / f"{number:05d}.png")
    arguments = ["score", str(tmp_path / "drawn"), *brightness, "--prompts", str(tmp_path / "bench")]
    assert cli.main([*arguments, "--json", str(tmp_path / "s.json")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[-3:] == [
        "anime: mean 10.0000, standard error 1.0000, 2 images",
        "photo: mean 10.0000, 1 image",
        "mean 10.0000, standard error 0.5774, 3 images",
    ]
    assert json.loads((tmp_path / "s.json").read_text())["styles"]["photo"]["count"] == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn" / "photo" / "00003.png")
    assert cli.main(arguments) == 2
    assert "00003.png is not named by the number of a prompt: expected 0 to 2" in capsys.readouterr().err
    (tmp_path / "drawn" / "photo").rename(tmp_path / "drawn" / "photos")
    assert cli.main(arguments) == 2 and "lies in no folder of a style" in capsys.readouterr().err


def test_score_builds_a_scorer_from_its_checkpoint_and_parameters(images, tmp_path, capsys):
    from rlproxi.rewards import build
    from rlproxi.rewards.attributes import AttributeClassifier

    folder, _ = images
    AttributeClassifier(16, 8).save(tmp_path / "reward.safetensors")
    files = [folder / "00000/0000.png", folder / "00000/0002.png"]
    assert (
        cli.main(
            [
                "score",
                *map(str, files),
                "--reward",
                "attributes",
                "--checkpoint",
                str(tmp_path / "reward.safetensors"),
                "--param",
                "copies=2",
                "--param",
                "noise=5e-1",
                "--prompt",
                CAPTION,
                "--json",
                str(tmp_path / "s.json"),
            ]
        )
        == 0
    )
    scorer = build("attributes", {"path": str(tmp_path / "reward.safetensors"), "copies": 2, "noise": 0.5})
    direct = scorer.score(np.stack([np.array(Image.open(f)) for f in files]), [CAPTION] * 2)
    told = json.loads((tmp_path / "s.json").read_text())
    assert [row["score"] for row in told["scores"]] == pytest.approx(direct, abs=1e-6)
    assert len(told["scorer"][str(tmp_path / "reward.safetensors")]) == 64  # what was scored with


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reward", "jpgg"], "reward 'jpgg' is unknown: did you mean jpeg?"),
        (["--reward", "jpeg", "--param", "qualty=3"], "it takes no 'qualty', did you mean 'quality'?"),
        (["--reward", "jpeg", "--param", "quality"], "is not of the form key=value"),
        (
            ["--reward", "jpeg", "--checkpoint", "x"],
            "reward 'jpeg' takes no checkpoint; it takes quality, incompressible",
        ),
        (["--reward", "judge", "--checkpoint", "x", "--param", "path=y"], "are the same parameter"),
        (["--reward", "judge", "--checkpoint", "no.safetensors", "--prompt", ""], "no.safetensors' is missing"),
        (["--reward", "jpeg", "--prompts", "no.txt"], "prompts no.txt do not exist"),
        (["--reward", "jpeg", "--prompts", "two.txt"], "two.txt has 2 prompts and there are 5 images"),
        (["--reward", "jpeg", "--json", "."], ". is a folder, expected a file to write"),
        (["nowhere.png", "--reward", "jpeg"], "image nowhere.png does not exist"),
        (["bare.png", "--reward", "jpeg"], 'bare.png has no prompt: give --prompt ("" for a reward that reads none)'),
        (["bare.png", "--reward", "jpeg", "--prompt", ""], "image bare.png cannot be read"),
    ],
)
def test_score_tells_a_mistake_in_one_line(arguments, words, images, brightness, tmp_path, capsys):
    (tmp_path / "work" / "two.txt").write_text("a\nb\n")
    (tmp_path / "work" / "bare.png").write_text("no image")
    assert cli.main(["score", str(images[0]), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err
    assert captured.err.count("\n") == 1


def test_report_writes_the_page(run_dir, capsys):
    assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert "note: hello" in (run_dir / "report.html").read_text(encoding="utf-8")


def test_export_writes_a_folder_and_says_where(run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "model"
    assert cli.main(["export", str(run_dir), str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "| weights | bfloat16 |" in (out / "README.md").read_text(encoding="utf-8")
    assert TextToImage.from_pretrained(out)(CAPTION, seeds=[1]).shape == (1, 16, 16, 3)
    assert cli.main(["export", str(run_dir), str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert cli.main(["export", str(run_dir), str(tmp_path / "x"), "--adapter-only"]) == 2
    assert "has no adapters" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["run", "bench"])
def test_only_known_mistakes_of_a_long_command_are_one_line(command, monkeypatch, capsys):
    def module(result):
        def target(options):
            if isinstance(result, Exception):
                raise result
            return result

        module = types.SimpleNamespace(add_arguments=lambda parser: None, command=target)
        monkeypatch.setitem(sys.modules, f"rlproxi.cli.{command}", module)

    module(3)
    assert cli.main([command]) == 3
    module(ConfigError("a.yaml: unknown key 'x'\n  unknown key 'y'"))
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == "error: a.yaml: unknown key 'x'; unknown key 'y'\n"
    module(ValueError("a bug"))  # not the user's: the traceback is wanted
    with pytest.raises(ValueError, match="a bug"):
        cli.main([command])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_page_of_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: rlproxi {command} ")


def test_python_m_rlproxi_is_the_same_command_and_imports_no_framework():
    program = (
        "import sys, runpy; sys.argv = ['rlproxi', '--help']\n"
        "try: runpy.run_module('rlproxi', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'ray', 'diffusers', 'actors'} & set(sys.modules), 'heavy imports for --help'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: rlproxi" in done.stdout
    assert all(re.search(rf"^    {name}\b", done.stdout, re.M) for name in cli.COMMANDS)
