"""What is told before a run starts: the key, the value and the remedy."""

import importlib.util
import json
import shutil

import pytest

from fixtures import tiny_checkpoints
from fixtures.shards import sample, write_tar
from rlproxi import run
from rlproxi.algorithms.base import build_algorithm
from rlproxi.config.loading import build_config, config_folder, load_config
from rlproxi.planning.preflight import problems

RUNS = {"rewards": {"train": [{"name": "jpeg"}], "heldout": []}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoints.sd15(tmp_path_factory.mktemp("sd15") / "model")


def found(*overrides: str) -> list[tuple[str, bool]]:
    return [(p.text, p.missing) for p in problems(build_config(RUNS, list(overrides)))]


def one(*overrides: str) -> tuple[str, bool]:
    (problem,) = found(*overrides)
    return problem


def test_nothing_stands_in_the_way_of_the_defaults(folder):
    assert found() == [] and [p.text for p in problems(build_config({}))] == []
    assert found(f"model.init={folder}", "data.size=64") == []
    assert found(f"model.encoders={folder}", "data.size=64", "model.patch=1") == []
    assert (
        found(f"model.encoders={folder}", "data.size=64", "model.kind=transformer", "model.patch=2", "model.layers=1")
        == []
    )


def test_folders_that_are_missing_or_of_another_kind(folder, tmp_path):
    assert one("model.init=nowhere") == (
        "model.init: nowhere is not a folder: expected a model folder (unet/ or transformer/, text_encoder/, "
        "tokenizer/, as diffusers lays them out) or a run directory that holds one as models/final or "
        "models/pretrained",
        True,
    )
    text, missing = one("model.encoders=nowhere", "data.size=64")
    assert text.startswith("model.encoders: nowhere") and missing
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = other / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "FluxTransformer2DModel"}))
    text, missing = one(f"model.init={other}", "data.size=64")
    assert text.startswith("model.init: a FluxTransformer2DModel cannot be made a proximal network;") and not missing


def test_sizes_that_do_not_fit(folder):
    assert "data.size 60 is not a multiple of 8, the factor of" in one(f"model.init={folder}", "data.size=60")[0]
    assert (
        "data.size 72: model.patch 2 and the levels do not divide 9"
        in one(f"model.encoders={folder}", "data.size=72", "model.patch=2")[0]
    )
    assert one("data.buckets=true")[0].startswith("data.buckets is true, but networks of our own have one size")
    assert found(f"model.init={folder}", "data.size=64", "data.buckets=true") == []


def test_scorers_files_and_functions():
    text, missing = one("rewards.train=[{name: hpsv2, params: {checkpoint: gone.pt}}]")
    assert (
        text.startswith("rewards.train.0: reward 'hpsv2': checkpoint 'gone.pt' does not exist: name its file")
        and missing
    )
    text, missing = one("rewards.heldout=[{name: mine, scorer: python, params: {function: 'no_such_module:f'}}]")
    assert text.startswith("rewards.heldout.0: ") and "no_such_module" in text and not missing
    # Another environment's modules and files are not this process's to look for.
    assert (
        found(
            "rewards.train=[{name: mine, scorer: python, params: {function: 'no_such_module:f'}, "
            "runtime_env: {pip: [x]}}]"
        )
        == []
    )


def test_data_and_prompts(tmp_path):
    text, missing = one("data.source=shards", f"data.urls=[{tmp_path}/none-*.tar]")
    assert text.startswith("data.urls") and "none-*.tar" in text and missing
    write_tar(tmp_path / "0.tar", [sample(0)])
    assert found("data.source=shards", f"data.urls=[{tmp_path}]") == []
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    text, missing = one(f"data.prompts={file}", "evaluate.prompts=4")
    assert "lower evaluate.prompts, or name a longer file in data.heldout_prompts" in text and not missing
    assert found(f"data.prompts={file}", "evaluate.prompts=4", "run.stages=[pretrain]") == []
    text, missing = one(f"data.prompts={tmp_path}/gone.txt")
    assert "gone.txt" in text and missing


def test_the_front_door_refuses_and_a_dry_run_tells(capsys, tmp_path):
    arguments = [f"run.dir={tmp_path / 'runs'}", "rewards.train=[{name: hpsv2, params: {checkpoint: gone.pt}}]"]
    assert run.main(arguments) == 2
    assert "error: rewards.train.0: reward 'hpsv2': checkpoint 'gone.pt'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert run.main([*arguments, "--dry-run"]) == 0
    assert "missing    rewards.train.0: reward 'hpsv2'" in capsys.readouterr().out
    assert run.main(["data.buckets=true", "--dry-run"]) == 2  # no file can mend that


@pytest.mark.parametrize("recipe", sorted(p.name for p in config_folder().glob("*.yaml")))
def test_recipes_lack_nothing_but_files(recipe):
    config = load_config(config_folder() / recipe)
    assert all(p.missing for p in problems(config))
    if not recipe.startswith(("quick", "smoke")):
        lines = (config_folder() / recipe).read_text().splitlines()
        keys = [
            line
            for line in lines
            if line.startswith("  ") and line.strip() and not line.lstrip().startswith(("#", "- "))
        ]
        bare = [line for line in keys if "#" not in line]
        # Every key says why it has its value, except a line that opens or continues a list, or names a scorer's file.
        assert all(line.rstrip().endswith((":", ",")) or "params:" in line for line in bare), bare


def test_a_checkpoint_that_is_not_there_yet_is_planned_from_its_published_shapes(capsys, tmp_path):
    changes = ["--dry-run", f"model.init={tmp_path}/stable-diffusion-v1-5", "data.size=64"]
    assert run.main([str(config_folder() / "sd15-prox-lora.yaml"), *changes]) == 0
    told = capsys.readouterr().out
    assert "866.26 M parameters, 6.38 M trained, 64x64" in told and "memory     learner rank: " in told
    assert f"missing    model.init: {tmp_path}/stable-diffusion-v1-5 is not a folder" in told


def test_a_curation_is_planned_without_a_model(capsys):
    assert run.main([str(config_folder() / "data-curate.yaml"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "curate     nothing yet -> <run directory>/curated" in told and "memory" not in told
    assert "missing    curate.urls is empty: name at least one tar" in told


ONE_STEP = ("run.algorithm=didr", "sampler.num_inference_steps=1")


@pytest.mark.parametrize(
    "overrides, what",
    [
        (("run.algorithm=r0",), "run.algorithm = 'r0'"),
        (ONE_STEP, "didr.reward = 'diffused'"),
        ((*ONE_STEP, "didr.reward=terminal"), "didr.reward = 'terminal'"),
        (("grpo.last_step_weight=0.5",), "grpo.last_step_weight = 0.5"),
    ],
)
def test_rewards_without_a_gradient_where_one_is_climbed(overrides, what):
    mixed = "rewards.train=[{name: attributes, params: {path: x.safetensors}}, {name: small, scorer: jpeg}]"
    text, missing = one(*overrides, mixed)
    assert (
        text.startswith(
            f"rewards.train.1: reward 'small' has no gradient, and {what} needs one from every training "
            "reward: use one of aesthetic, attributes, clip, "
        )
        and not missing
    )
    assert found(*overrides, "rewards.train=[{name: attributes}]") == []
    assert found(*overrides, mixed, "run.stages=[pretrain]") == []


def test_rewards_without_a_gradient_where_none_is_climbed():
    assert found(*ONE_STEP, "didr.reward=none") == []
    text, _ = one("run.algorithm=r0", "rewards.train=[{name: nobody}]")
    assert text.startswith("rewards.train.0: reward 'nobody' is unknown")  # and that alone


def test_algorithms_that_are_not_there(tmp_path, monkeypatch):
    text, missing = one("run.algorithm=no_such_module:Ours")
    assert (
        text
        == (
            "run.algorithm 'no_such_module:Ours' cannot be imported: ModuleNotFoundError: No module named "
            "'no_such_module'; it must be installed or on PYTHONPATH"
        )
        and not missing
    )
    assert one("run.algorithm=pathlib:Path")[0] == (
        "run.algorithm 'pathlib:Path' is not a subclass of rlproxi.algorithms.base.Algorithm"
    )
    (tmp_path / "ours_to_check.py").write_text(
        "from rlproxi.algorithms.base import Algorithm\n"
        "class Ours(Algorithm):\n    needs_gradients = True\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.tau = self.settings.params['tau']\n"
        "    def updates(self, batch):\n        yield from ()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        one("run.algorithm=ours_to_check:Ours")[0]
        == "run.algorithm 'ours_to_check:Ours' cannot be set up: KeyError: 'tau'"
    )
    text, _ = one("run.algorithm=ours_to_check:Ours", "custom.params={tau: 1}")
    assert text.startswith(
        "rewards.train.0: reward 'jpeg' has no gradient, and run.algorithm = 'ours_to_check:Ours' needs one"
    )
    assert found("run.algorithm=no_such_module:Ours", "run.stages=[pretrain]") == []


def test_exporters_whose_package_is_missing():
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    text, missing = one("telemetry.wandb=project")
    assert "pip install wandb" in text and not missing


@pytest.mark.parametrize("stages", ["[prepare,before,rl,after,report]", "[rl]", "[before]"])
def test_a_run_without_a_starting_policy(stages):
    text, missing = one(f"run.stages={stages}")
    assert "no starting policy" in text and "model.init" in text and not missing
    assert found("run.stages=[prepare,report]") == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["rl.max_staleness=4", "rl.steps=4"],
            "rl.max_staleness is 4, but of rl.steps 4 iterations none can be more than 3",
        ),
        (["run.algorithm=r0", "rl.max_staleness=1"], "rl.max_staleness is 1, but r0 samples on the learner"),
        (
            ["run.algorithm=didr", "sampler.num_inference_steps=1", "rl.max_staleness=2"],
            "rl.max_staleness is 2, but didr samples",
        ),
        (["rl.max_bytes_in_flight=1000"], "rl.max_bytes_in_flight is 1000, but one iteration has "),
        (["rl.max_staleness=2", "rl.max_bytes_in_flight={two}"], "or rl.max_staleness to 1"),
    ],
)
def test_bounds_that_cannot_be_kept_or_have_no_effect(overrides, words):
    whole = build_config({}).rl.micro_batches * build_algorithm(build_config({})).bytes_per_micro_batch()
    told = found(*(each.format(two=2 * whole) for each in overrides))
    assert any(text.startswith(words) or text.endswith(words) for text, missing in told if not missing), told
    assert found("rl.max_staleness=1", f"rl.max_bytes_in_flight={2 * whole}") == []


def test_prompts_that_a_scorer_cannot_read_are_said_before_the_run(tmp_path):
    """The default judge reads the words of the embedded portraits alone."""
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(f"a castle by the sea, number {i}" for i in range(400)))
    own = [f"data.prompts={file}", "evaluate.prompts=4"]
    text, missing = one(*own, "rewards.heldout=[{name: judge}]")
    assert not missing and text.startswith("rewards.heldout.0: reward 'judge' can score none of the held-out prompts:")
    assert (
        "a castle by the sea" in text and "set rewards.heldout=[]: the alarms for distance, sameness and grid" in text
    )
    assert found(*own, "rewards.heldout=[]") == []
    assert found(*own, "rewards.heldout=[{name: quality}]") == [], "it reads no prompt"
    text, _ = one(*own, "rewards.train=[{name: attributes}]")
    assert text.startswith("rewards.train.0: reward 'attributes' can score none of the held-out prompts")
