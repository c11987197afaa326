import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from rlproxi import cli
from rlproxi.config import ConfigError, Sampler, Schedule
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.models.unet import ProximalUNet
from rlproxi.telemetry.runlog import RunLog

CAPTION = "a smiling person with a red hat"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with a small untrained model in it."""
    unet = ProximalUNet(sample_size=16, patch=4, channels=(32,), blocks=(1,), attention=(False,), text_dim=32,
                        pooled_dim=32)
    with torch.no_grad():
        unet.head.weight.normal_(std=0.1)
    path = tmp_path_factory.mktemp("runs") / "one"
    TextToImage(unet, build_text_encoder([CAPTION], 32, 1, 12), Schedule(), Sampler(num_inference_steps=2)
                ).save_pretrained(path / "models" / "final")
    with RunLog(path) as log:
        log.append("note", message="hello")
    return path


def test_sample_writes_a_grid_of_prompts_and_seeds(run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    arguments = ["sample", CAPTION, "a person", "--model", str(run_dir), "--count", "3", "--scale", "2", "--seed", "5",
                 "--steps", "3", "--guidance", "1.5", "--out", str(out)]
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
    assert cli.main(["sample", "a green robot", "--model", str(run_dir), "--count", "1",
                     "--out", str(tmp_path / "x.png")]) == 0
    assert "warning: this model has no token for green, robot" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["sample", "x", "--model", "no/such"], "no/such is not a folder: expected a model folder"),
    (["sample", "x", "--model", ".", "--out", "x.jpg"], "must end in .png"),
    (["report", "no/such"], "no/such is not a folder: expected a run directory"),
])
def test_a_users_mistake_is_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments, words", [
    ([], "required: COMMAND"), (["paint"], "invalid choice: 'paint'"), (["sample", "--model", "x"], "required: PROMPT"),
    (["sample", "x", "--model", "y", "--count", "0"], "0 is less than 1"),
    (["sample", "x", "--model", "y", "--steps", "few"], "invalid integer value: 'few'"),
])
def test_bad_usage_is_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_report_writes_the_page(run_dir, capsys):
    assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert "note: hello" in (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["run", "bench"])
def test_run_and_bench_get_everything_behind_the_word(command, monkeypatch, capsys):
    seen = []

    def module(result):
        def target(argv):
            seen.append(argv)
            if isinstance(result, Exception):
                raise result
            return result
        monkeypatch.setitem(sys.modules, f"rlproxi.{command}", types.SimpleNamespace(main=target))

    module(None)
    assert cli.main([command, "--dry-run", "grpo.lr=1e-5"]) == 0 and seen == [["--dry-run", "grpo.lr=1e-5"]]
    module(3)
    assert cli.main([command]) == 3
    module(ConfigError("a.yaml: unknown key 'x'\n  unknown key 'y'"))
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == "error: a.yaml: unknown key 'x'; unknown key 'y'\n"
    module(ValueError("a bug"))  # not the user's: the traceback is wanted
    with pytest.raises(ValueError, match="a bug"):
        cli.main([command])


def test_python_m_rlproxi_is_the_same_command_and_imports_no_framework():
    program = ("import sys, runpy; sys.argv = ['rlproxi', '--help']\n"
               "try: runpy.run_module('rlproxi', run_name='__main__')\n"
               "except SystemExit as stop: assert not stop.code\n"
               "assert not {'torch', 'ray', 'diffusers', 'actors'} & set(sys.modules), 'heavy imports for --help'")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: rlproxi" in done.stdout and all(word in done.stdout for word in ("run", "sample", "report", "bench"))
