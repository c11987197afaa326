"""Configs, overrides and prompts: every fault is a ConfigError, or an error that names the key and the file."""

import math
import random

import pytest

from fuzz.hunt import Given, Reader, examples, hunted
from fuzz.spoil import spoil, spoilt_json

INPUTS = {
    "values": 500,
    "overrides": 500,
    "yaml": 300,
    "prompts.txt": 250,
    "prompts.jsonl": 300,
    "rewards prompts": 300,
}

_LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
YAMLS = [
    b"run: &a [*a]\n",
    b"run: &a {seed: *a}\n",
    f"a0: &a0 [x]\n{_LAUGHS}".encode(),
    f"a0: &a0 [x]\n{_LAUGHS}data:\n  urls: *a9\n".encode(),
    f"a0: &a0 [x]\n{_LAUGHS}rewards:\n  train: [{{name: a, params: {{x: *a9}}}}]\n".encode(),
    b"run: " + b"[" * 100_000,
    b"{a: " * 50_000,
    b"- " * 50_000,
    b"run: {seed: 2001-99-99}\n",
    b"run: {seed: 0b_}\n",
    b"run: {seed: 0x_}\n",
    b"run: {seed: " + b"9" * 5000 + b"}\n",
    b"run: {seed: 0x" + b"f" * 200_000 + b"}\n",
    b"run: {seed: 1" + b":59" * 20_000 + b"}\n",
    b"!!python/object/apply:os.system [exit 3]\n",
    b"run: !!binary '='\n",
    b"run: !!float x\n",
    b"run: !!int ''\n",
    b"run: !!timestamp x\n",
    b"? [a]\n: b\n",
    b"? {a: b}\n: c\n",
    b"=: =\n",
    b"<<: 3\n",
    b"1: 2\n",
    b"null: {}\n",
    b"run: {1: 2}\n",
    b"run: {null: 2}\n",
    b"\xff\xfe",
    b"run: \0",
    b"\xef\xbb\xbfrun: {}\n",
    b'run: {name: "\\ud800"}\n',
    b'run: {"\\ud800": 1}\n',
    b'"\\ud800": 1\n',
    b"",
    b"3",
    b"--- a\n--- b\n",
    b"run: {seed: .nan}\n",
    b"rl: {lr: .inf}\n",
    b"data: {max_pixels: 1e400}\n",
    b'run: {dir: "a\\0b"}\n',
    b"run: 2001-01-01\n",
    b"%YAML 9.9\n---\na",
]
OVERRIDES = [
    "",
    "=",
    "run",
    "run=",
    ".=1",
    "run..seed=1",
    "run.seed.x=1",
    "run.seed=2001-99-99",
    "run.seed=0b_",
    "run.seed=" + "9" * 5000,
    "run.seed=&a [*a]",
    "run.name=\ud800",
    "\ud800=1",
    "run.seed=" + "[" * 100_000,
    "a." * 5000 + "b=1",
    "run.seed=!!python/name:os.system",
    "rl.lr=.nan",
    "rl.lr=.inf",
    "run.seed=0x" + "f" * 100_000,
    "run.seed=" + "1" + ":59" * 5000,
    "rl.lr=1_0",
    "data.urls=[" + "a," * 5_000 + "]",
    f"fake.candidates=[{2**160}]",
]


def readers(folder):
    from hypothesis import strategies as st

    from rlproxi.config.loading import ConfigError, build_config, config_folder, load_config, model_of, schema
    from rlproxi.data.prompts import load_prompts
    from rlproxi.rewards.api import read_prompts

    def paths(section, before=()):
        for name, field in section.model_fields.items():
            inner = model_of(field.annotation)
            yield (*before, name), field.get_default(call_default_factory=True)
            if inner is not None:
                yield from paths(inner, (*before, name))

    known = [((name,), {}) for name in schema()]
    known += [found for name, section in schema().items() for found in paths(section, (name,))]
    plain = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(-2, 9)
        | st.sampled_from([10**400, -1, 2**63, 1e308, 5e-324])
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(["\ud800", "\0", "auto", "grpo", "os:system", "x:y", "../x"])
    )
    wild = st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.text(max_size=8) | st.sampled_from(["name", "weight", "params", "kind", "rank"]) | st.integers(),
                inner,
                max_size=3,
            )
        ),
        max_leaves=6,
    )
    entry = st.fixed_dictionaries(
        {"name": wild | st.just("attributes")},
        optional={"weight": wild, "params": wild, "scorer": wild, "replicas": wild},
    )
    places = st.sampled_from([path for path, _ in known])

    def nested(chosen):
        values = {}
        for path, value in chosen.items():
            inside = values
            for part in path[:-1]:
                inside = inside.setdefault(part, {})
                if not isinstance(inside, dict):
                    break
            else:
                inside[path[-1]] = value
        return values

    def whole(config):
        """What a config promises: finite numbers, and itself again from what it writes."""
        dumped = config.model_dump(mode="json")
        waiting = [dumped]
        while waiting:
            found = waiting.pop()
            # What a scorer makes of its own parameters is not the config's to say.
            waiting += (
                [v for k, v in found.items() if k not in ("params", "runtime_env")]
                if isinstance(found, dict)
                else found
                if isinstance(found, list)
                else ()
            )
            assert not isinstance(found, float) or math.isfinite(found)
        assert repr(build_config(dumped).model_dump(mode="json")) == repr(dumped)

    file, shipped = folder / "config.yaml", [f.read_bytes() for f in sorted(config_folder().glob("*.yaml"))]

    def read_yaml(data):
        file.write_bytes(data)
        whole(load_config(file))

    def prompts(name, read):
        def one(data):
            (folder / name).write_bytes(data)
            read(str(folder / name))

        return one

    captions = ["a red hat, caf\u00e9", "two dogs \u2028 in a boat", "x" * 300]
    lines = "".join(f"{c}\n" for c in captions).encode()
    rows = [{"prompt": c, "seed": i} for i, c in enumerate(captions)]

    def jsonl(draw: random.Random):
        return b"\n".join(
            spoilt_json(draw, rows) if draw.random() < 0.4 else spoil(draw, b'{"prompt": "a hat"}') for _ in range(3)
        )

    return {
        "values": Given(
            st.one_of(
                st.dictionaries(places, wild, min_size=1, max_size=3).map(nested),
                st.builds(lambda e, part: {"rewards": {part: [e]}}, entry, st.sampled_from(["train", "heldout"])),
                wild,
            ),
            lambda values: whole(build_config(values)),
            (ConfigError,),
            "",
            (
                {"\ud800": 1},
                {"run": {"\ud800": 1}},
                {1: 2},
                {"rewards": {"train": [{"name": "x", "params": {"\ud800": 1}}]}},
            ),
        ),
        "overrides": Given(
            st.lists(
                st.builds(lambda path, value: f"{'.'.join(path)}={value}", places, st.text(max_size=30) | wild.map(str))
                | st.text(max_size=30),
                min_size=1,
                max_size=3,
            ),
            lambda texts: whole(build_config({}, texts)),
            (ConfigError,),
            "",
            tuple([text] for text in OVERRIDES),
        ),
        "yaml": Reader(
            examples(YAMLS, lambda draw: spoil(draw, draw.choice(shipped), shipped)),
            read_yaml,
            (ConfigError,),
            "config.yaml",
        ),
        "prompts.txt": Reader(
            lambda draw, i: spoil(draw, lines),
            prompts("p.txt", lambda path: load_prompts("data.prompts", path)),
            (ValueError,),
            "p.txt",
        ),
        "prompts.jsonl": Reader(
            lambda draw, i: jsonl(draw),
            prompts("p.jsonl", lambda path: load_prompts("data.prompts", path)),
            (ValueError,),
            "p.jsonl",
        ),
        "rewards prompts": Reader(
            lambda draw, i: jsonl(draw) if i % 2 else spoilt_json(draw, [captions]),
            lambda data: [
                prompts(name, read_prompts)(data) for name in ("q.json" if data.startswith(b"[") else "q.jsonl",)
            ],
            (ValueError,),
            "q.json",
        ),
    }


def test_configs_and_prompts():
    hunted("test_config_files", INPUTS)


@pytest.mark.exhaustive
def test_more_configs_and_prompts():
    hunted("test_config_files", {name: 20 * count for name, count in INPUTS.items()})
