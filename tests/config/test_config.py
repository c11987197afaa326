import ast
import re
from pathlib import Path

import pytest
import yaml

from rlproxi.config.loading import (
    Config,
    ConfigError,
    build_config,
    config_folder,
    dump_config,
    load_config,
    parse_override,
    schema,
    smaller_micro_batch,
)
from rlproxi.pages.reference import describe

ROOT = Path(__file__).parents[2]


def refused(match: str, values: dict | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError, match=match) as error:
        build_config(values or {}, list(overrides), "my.yaml")
    return str(error.value)


def test_the_defaults_are_a_config_that_can_run():
    config = build_config({})
    assert config == Config() and config.rl.micro_batches == 4


def test_overrides_reach_every_level_and_parse_as_yaml():
    config = build_config(
        {"rl": {"lr": 1e-3}},
        ["rl.lr=1e-5", "run.stages=[pretrain, report]", "model.init=null", "grpo.same_noise=true", "run.name=a=b"],
    )
    assert config.rl.lr == 1e-5 and config.run.stages == ["pretrain", "report"] and config.model.init is None
    assert config.grpo.same_noise is True and config.run.name == "a=b"
    assert parse_override("a.b=1e-4") == (["a", "b"], 1e-4)


def test_the_callers_values_are_not_changed():
    values = {"rl": {"lr": 1e-3}}
    build_config(values, ["rl.lr=1e-5", "data.size=64"])
    assert values == {"rl": {"lr": 1e-3}}


@pytest.mark.parametrize(
    "override, words",
    [
        ("rl.lr", "not of the form key=value"),
        ("=3", "not of the form"),
        ("rl.lr=[1", "is not YAML"),
        ("run.seed.x=1", "'seed' is a value"),
    ],
)
def test_a_malformed_override_is_refused(override, words):
    refused(words, {"run": {"seed": 1}}, override)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"grpo": {"group_sise": 8}}, r"unknown key 'grpo.group_sise'; did you mean rl.group_size\?"),
        ({"gpro": {}}, r"unknown key 'gpro'; did you mean grpo\?"),
        ({"run": {"group_size": 8}}, r"did you mean rl.group_size\?"),
        ({"run": {"lr": 8}}, r"did you mean prepare.lr or pretrain.lr or rl.lr or fake.lr\?"),
        ({"run": {"zzzz": 8}}, "known keys here: name, dir, seed, stages"),
        ({"rewards": {"train": [{"name": "attributes", "wieght": 2}]}}, r"did you mean rewards.train.0.weight\?"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(values, words):
    assert refused(words, values).startswith("my.yaml: ")


def test_every_mistake_is_named_at_once():
    text = refused("rl.lr", {"rl": {"lr": -1}, "run": {"seed": "x"}})
    assert "rl.lr = -1" in text and "run.seed = 'x'" in text


@pytest.mark.parametrize(
    "override, words",
    [
        ("rl.group_size=1", "group_size is 1: .* at least 2"),
        (
            "rl.prompts_per_step=12 rl.groups_per_micro_batch=8",
            "prompts_per_step 12 is not a multiple of groups_per_micro_batch 8",
        ),
        ("resources.learner_workers=3", "make prompts_per_step a multiple of 3"),
        ("resources.learner_workers=3 rl.groups_per_micro_batch=8", "make prompts_per_step a multiple of 24"),
        ("rl.updates_per_step=4 rl.groups_per_micro_batch=8", "make prompts_per_step a multiple of 32"),
        ("pretrain.batch_size=65 resources.learner_workers=2", "pretrain.batch_size 65 is not a multiple"),
        ("pretrain.micro_batch_size=48", "pretrain.batch_size 64 is not a multiple"),
        ("pretrain.l1_fraction=0.5", "loss is 'square', which has none: set pretrain.loss=matching"),
        ("grpo.trained_steps=6", "num_inference_steps 6 gives only 5 actions"),
        ("model.lora={'rank':4}", "name it with init, or leave lora out"),
        ("model.init=a model.encoders=b", "init and encoders exclude each other"),
        ("data.source=shards", "urls is empty: name at least one tar or parquet file"),
        ("data.urls=[a.tar]", "set data.source=shards to read them"),
        ("sampler.num_inference_steps=1", "N steps give N - 1 actions"),
        ("sampler.name=ode", "draws no noise and so has no policy"),
        ("sampler.name=hybird", "sampler.name = 'hybird'"),
        (
            "sampler.name=backward sampler.start_time=1.0 sampler.num_inference_steps=5",
            "smallest number of steps that works .* is 10",
        ),
        (
            "sampler.name=backward sampler.num_inference_steps=20 pretrain.candidates=[20] evaluate.steps=[4,20]",
            "evaluate.steps: sampler 'backward' cannot take num_inference_steps=4",
        ),
        ("pretrain.candidates=[0]", "pretrain.candidates.0 = 0: Input should be greater than or equal to 1"),
        ("fake.candidates=[100000000]", "fake.candidates.0 = 100000000: Input should be less than or equal to 10000"),
        ("pretrain.candidates=[]", "pretrain.candidates"),
        ("model.channels=[128,200]", r"channels \[200\] are not multiples of 32"),
        ("model.channels=[128]", "must have one entry for each level"),
        ("data.size=36", "data.size 36 must be a multiple of 8"),
        ("rewards.heldout=[{'name':'attributes'}]", "must not be a training reward"),
        ("rewards.train=[]", "rewards.train"),
        ("rewards.train=[{'name':'jpeg'},{'name':'jpeg'}]", "jpeg appears twice; give each a name of its own"),
        ("rewards.train=[{'name':'jpeg','replicas':3,'max_replicas':2}]", "max_replicas 2 below its 3 replicas"),
        ("rewards.on_failure=zero", "rewards.on_failure = 'zero'"),
        ("rewards.normalize=std", "rewards.normalize = 'std'"),
        ("run.stages=[pretrian]", "run.stages.0 = 'pretrian'"),
    ],
)
def test_what_cannot_run_is_refused_in_words(override, words):
    refused(words, None, *override.split())


def test_impossible_rl_settings_do_not_matter_without_rl():
    config = build_config({}, ["run.stages=[pretrain]", "sampler.name=ode", "sampler.num_inference_steps=1"])
    assert config.sampler.name == "ode"


def test_files_load_and_dump_round_trip(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rl:\n  lr: 1e-5\n  betas: [0.8, 0.9]\n")
    config = load_config(path, ["data.size=64"])
    assert config.rl.betas == (0.8, 0.9) and config.data.size == 64
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(schema())


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml' does not exist; the ones that come along"):
        load_config(tmp_path / "none.yaml")
    for content, words in (
        (b"a: [", "not readable YAML"),
        (b"\xff\xfe\x00", "not readable YAML"),
        (b"- 1", "got a list"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").touch()
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_every_shipped_config_loads():
    shipped = sorted(config_folder().glob("*.yaml"))
    for path in shipped:
        load_config(path)
    assert "quickstart.yaml" in [p.name for p in shipped]


def test_every_key_is_documented_and_the_page_is_current():
    for section in schema().values():
        assert all(field.description for field in section.model_fields.values())
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == describe(), "run: python -m rlproxi.pages.reference > docs/configuration.md"
    assert "| `pretrain.candidates` | list of int, >= 1, &lt;= 10000 |" in page and "Annotated" not in page


def test_the_build_file_forgets_no_package():
    """Packages are listed by hand, because configs/ is shipped as rlproxi.configs."""
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    folders = {p.parent.relative_to(ROOT) for top in ("rlproxi", "actors") for p in (ROOT / top).rglob("*.py")}
    assert set(ast.literal_eval(listed)) == {".".join(p.parts) for p in folders} | {"rlproxi.configs"}


@pytest.mark.parametrize(
    "changes, groups",
    [
        ({}, 4),
        ({"group_size": 24}, 1),
        ({"group_size": 64}, 1),
        ({"group_size": 4}, 8),
        ({"group_size": 4, "updates_per_step": 4}, 4),
        ({"prompts_per_step": 10, "group_size": 4}, 5),
    ],
)
def test_micro_batches_follow_from_prompts_and_group_size(changes, groups):
    config = build_config({"rl": changes})
    assert config.rl.groups_per_micro_batch == groups
    assert build_config(config.model_dump()).rl.groups_per_micro_batch == groups  # as a resumed run reads it


def test_micro_batches_are_halved_until_they_cannot_be():
    config = build_config(
        {
            "rl": {"prompts_per_step": 24, "groups_per_micro_batch": 12},
            "pretrain": {"batch_size": 24},
            "resources": {"learner_workers": 2},
        }
    )
    seen, sizes = [], []
    rl = pretrain = config
    while rl is not None:
        seen.append(rl.rl.groups_per_micro_batch)
        rl = smaller_micro_batch(rl, "rl")
    while pretrain is not None:
        sizes.append(pretrain.pretrain.micro_batch_size or 12)
        pretrain = smaller_micro_batch(pretrain, "pretrain")
    assert seen == [12, 6, 3, 1] and sizes == [12, 6, 3, 1]
    assert config.rl.groups_per_micro_batch == 12  # the run's own config is as it was
