"""The names that ``import rlproxi`` gives."""

import subprocess
import sys

import pytest

import rlproxi
from actors.run import driver
from rlproxi.config.loading import build_config, dump_config
from rlproxi.errors import ConfigError


def test_importing_rlproxi_imports_no_framework_and_gives_every_name():
    program = (
        "import sys, rlproxi\n"
        "assert not {'torch', 'ray', 'pydantic', 'actors'} & set(sys.modules), 'import rlproxi is not light'\n"
        "assert all(callable(getattr(rlproxi, name)) for name in rlproxi.__all__)\n"
        "assert set(rlproxi.__all__) <= set(dir(rlproxi)) and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'paint'; it gives TextToImage"):
        _ = rlproxi.paint


def test_fine_tune_checks_makes_a_run_directory_and_resumes_it(tmp_path, monkeypatch):
    started = []

    class Recorder:
        def __init__(self, config, run_dir):
            started.append((config.run.name, run_dir))

        def run(self):
            pass

    monkeypatch.setattr(driver, "Driver", Recorder)
    own = [f"run.dir={tmp_path}", "run.name=x"]
    folder = rlproxi.fine_tune(None, *own)
    assert folder.parent == tmp_path and folder.name.startswith("x-") and started == [("x", folder)]
    dump_config(build_config({}, own), folder / "config.yaml")
    assert rlproxi.fine_tune(resume=folder) == folder and started[-1] == ("x", folder)
    assert rlproxi.fine_tune(build_config({}, own)).parent == tmp_path
    with pytest.raises(ConfigError, match="leave config out"):
        rlproxi.fine_tune("a.yaml", resume=folder)
    with pytest.raises(ConfigError, match="a Config takes no overrides"):
        rlproxi.fine_tune(build_config({}), "run.seed=1")
    with pytest.raises(ConfigError, match="jpgg"):
        rlproxi.fine_tune(None, "rewards.train=[{name: jpgg}]", *own)
    assert len(started) == 3
