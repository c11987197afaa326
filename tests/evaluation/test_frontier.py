"""``rlproxi eval``: its statistics, the limits its solvers converge to, and the command from end to end."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from fixtures import tiny_checkpoints
from fixtures.closed_form import Gaussian
from rlproxi.algorithms.requests import SampleRequest
from rlproxi.cli import main as cli
from rlproxi.config.loading import build_config, dump_config
from rlproxi.config.sections import Sampler, Schedule
from rlproxi.data import faces
from rlproxi.evaluation import frontier
from rlproxi.evaluation.drawers import NAMES, Pipeline, Solver, open_model, split_name, trained_betas
from rlproxi.evaluation.frontier import Measurement, interval, reached, rows
from rlproxi.models.loading import build_denoiser
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.proximal.schedule import VPSchedule
from rlproxi.rewards.attributes import AttributeClassifier

TARGET = Gaussian(0.3, 0.4)


def test_intervals_are_students():
    values = [0.2, 0.5, 0.3, 0.9]
    mean, half = interval(values)
    expected = student.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert (mean - half, mean + half) == pytest.approx(expected, abs=1e-3)
    for df, point in enumerate(frontier.STUDENT_95, 1):
        assert point == pytest.approx(student.ppf(0.975, df), rel=1e-3)
    assert interval([0.4, None, math.nan], 0.01) == (0.4, pytest.approx(0.0196))
    assert np.isnan(interval([None])).all() and math.isnan(interval([1.0])[1])


def one(label, steps, value, seed=0):
    return Measurement(label, f"runs/{label}", "", steps, seed, {"judge": value}, {"judge": 0.01}, 0.2, None, 0.001)


def test_rows_pool_runs_of_a_label_and_tell_what_reaches_a_level():
    told = rows(
        [one("b", 4, 0.5), one("b", 2, 0.3), one("a", 2, 0.6, seed=0), one("a", 2, 0.8, seed=1), one("a", 4, 0.6)]
    )
    assert [(row.label, row.steps, row.count) for row in told] == [("b", 2, 1), ("b", 4, 1), ("a", 2, 2), ("a", 4, 1)]
    assert told[2].figures["judge"][0] == pytest.approx(0.7) and told[0].figures["judge"] == (
        0.3,
        pytest.approx(0.0196),
    )
    assert math.isnan(told[0].figures["distance"][0])
    assert reached(told, "judge", 0.5) == {"b": 4, "a": 2} and reached(told, "judge", 0.65) == {"b": None, "a": 2}
    assert "| b | 2 | 1 | 0.300 ± 0.020 | - | 1.0 |" in frontier.table(told, ["judge", "distance", "seconds"])


def test_what_was_done_to_a_model_is_drawn_in_its_colour_and_distances_by_their_logarithm():
    labels = ("score, ddim", "prox", "score + GRPO, ddim", "prox + GRPO")
    found = rows(
        replace(one(label, steps, 0.1 * place + 0.01 * steps), distance=0.5)
        for place, label in enumerate(labels)
        for steps in (2, 4)
    )
    figure = frontier.plot(found, ["judge", "distance"], {"judge": 0.2})
    judge, distance = figure.axes
    bars = dict(zip(labels, judge.containers))
    assert [bars[label].get_label() for label in labels] == list(labels)
    for label in labels[:2]:
        tuned = bars[label.replace("score", "score + GRPO").replace("prox", "prox + GRPO")]
        assert tuned[0].get_color() == bars[label][0].get_color()
        assert (bars[label][0].get_linestyle(), tuned[0].get_linestyle()) == ("-", "--")
    assert bars["prox"][0].get_color() != bars["score, ddim"][0].get_color()
    assert bars["prox + GRPO"][0].get_ydata() == pytest.approx([0.32, 0.34])
    assert [axes.get_yscale() for axes in (judge, distance)] == ["linear", "log"] and distance.get_ylim()[0] > 0.3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(labels)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("runs/x", ("x", "runs/x", None, "")),
        ("mine=runs/x", ("mine", "runs/x", None, "")),
        ("runs/x@ddim", ("x", "runs/x", None, "ddim")),
        ("a=sd3+lora/b.safetensors@pipeline", ("a", "sd3", "lora/b.safetensors", "pipeline")),
        ("runs/a=b", ("a=b", "runs/a=b", None, "")),
        ("me@home/x", ("x", "me@home/x", None, "")),
    ],
)
def test_names(name, expected):
    assert split_name(name) == expected


class Stub:
    """A model of ours whose data are a Gaussian, known exactly."""

    schedule, sampler, precision = Schedule(), Sampler(start_time=1.0), "float32"

    def __init__(self):
        self.denoiser = lambda y, t, lam, cond: (y - TARGET.prox(y, 0.0, lam[:, None])) / lam[:, None].sqrt()
        self.denoiser.device, self.denoiser.sample_shape = torch.device("cpu"), (3,)
        self.text = SimpleNamespace(groups=lambda prompts, size: None, null_like=None)

    def images(self, x):
        return x.numpy()


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
def test_solvers_converge_to_the_probability_flow(name):
    """On a Gaussian the flow is linear: x_0 = m + (x_T - alpha_T m) s / sqrt(v_T)."""
    request = SampleRequest("heldout", 0, ("",), (0,), 4)
    x = torch.stack([torch.randn(3, generator=g) for g in _starts(request)])
    mean, variance = TARGET.marginal(1.0)
    exact = TARGET.mean + (x - mean) * TARGET.std / variance**0.5
    errors = [np.abs(Solver(Stub(), name).draw(_at(request, n), 5) - exact.numpy()).max() for n in (6, 12, 96)]
    assert errors[2] < 0.01 < errors[0] and errors[2] < errors[1] < errors[0]


def _starts(request):
    from rlproxi.seeds import generator

    return [generator(*name, 0) for name in request.names(5)]


def _at(request, n):
    return SampleRequest(request.purpose, 0, request.prompts, request.indices, request.group_size, num_steps=n)


def test_the_solvers_noise_levels_are_the_schedules():
    schedule, betas = VPSchedule(), trained_betas(VPSchedule(), 0.8)
    assert len(betas) == 800
    signal = np.cumprod(1 - betas)
    assert signal[[0, 399, 799]] == pytest.approx([schedule.alpha_bar(t) for t in (0.001, 0.4, 0.8)], rel=1e-9)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with an untrained model, a judge and a training reward."""
    base = tmp_path_factory.mktemp("runs") / "one"
    config = build_config(
        {
            "data": {"size": 16},
            "model": {"channels": [32, 32]},
            "run": {"stages": ["pretrain"]},
            "sampler": {"num_inference_steps": 2},
            "evaluate": {"prompts": 6, "samples": 2, "steps": [2]},
        }
    )
    unet = build_denoiser(config)
    captions = [faces.portrait(3, i, 0.5).caption for i in range(64)]
    TextToImage(
        unet,
        build_text_encoder(captions, config.model.text_dim, 1, config.model.text_length),
        config.schedule,
        config.sampler,
    ).save_pretrained(base / "models" / "final")
    for name in ("reward", "judge"):
        AttributeClassifier(16, 32).save(base / "models" / f"{name}.safetensors")
    dump_config(config, base / "config.yaml")
    return base


def table_of(out):
    with open(out / "frontier.csv") as file:
        return list(csv.DictReader(file))


def test_the_command_measures_tells_draws_and_goes_on(run_dir, tmp_path, capsys):
    out = tmp_path / "frontier"
    command = [
        "eval",
        f"ours={run_dir}",
        f"ours@ddim={run_dir}@ddim",
        "--steps",
        "1,2",
        "--seeds",
        "2",
        "--out",
        str(out),
    ]
    assert cli.main([*command, "--reach", "ours@ddim@2"]) == 0
    said = capsys.readouterr().out
    assert "Steps until judge reaches the" in said and "ours" in said
    lines = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {(m["label"], m["steps"], m["seed"]) for m in lines} == {
        (label, n, seed) for label in ("ours", "ours@ddim") for n in (1, 2) for seed in (0, 1)
    }
    told = table_of(out)
    first = [m["reward"]["judge"] for m in lines if m["label"] == "ours" and m["steps"] == 1]
    assert float(told[0]["judge"]) == pytest.approx(np.mean(first)) and told[0]["measurements"] == "2"
    assert float(told[0]["seconds"]) > 0 and float(told[0]["distance"]) > 0
    for name in ("frontier.png", "images/ours-001.png", "images/ours-ddim-002.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"

    # Cut short by a kill: what is whole stays, the rest is measured again, alike.
    (out / "frontier.jsonl").write_text("\n".join(json.dumps(m) for m in lines[:5]) + "\n" + json.dumps(lines[5])[:40])
    assert cli.main(command) == 0
    again = {(m.label, m.steps, m.seed): m.reward for m in frontier.read(out)}
    assert len(again) == 8 and all(again[m["label"], m["steps"], m["seed"]] == m["reward"] for m in lines)
    assert capsys.readouterr().out.count(" ms an image") == 3

    # What is told is in the order of the command, whatever was measured first.
    assert cli.main([command[0], *reversed(command[1:3]), *command[3:]]) == 0
    assert [row["model"] for row in table_of(out)] == ["ours@ddim"] * 2 + ["ours"] * 2
    assert " ms an image" not in capsys.readouterr().out

    # Other prompts are another measurement, not to be mixed with these.
    assert cli.main([*command, "--prompts", "4"]) == 0
    assert capsys.readouterr().out.count(" ms an image") == 8 and len(frontier.read(out)) == 16
    assert {row["measurements"] for row in table_of(out)} == {"2"}


def test_a_count_that_a_sampler_cannot_take_is_told_and_left_out(run_dir, tmp_path, capsys):
    assert (
        cli.main(
            ["eval", str(run_dir), "--samplers", "backward,hybrid", "--steps", "2,16", "--out", str(tmp_path / "f")]
        )
        == 0
    )
    assert "2 steps: left out: sampler 'backward' cannot take num_inference_steps=2" in capsys.readouterr().out
    assert {(m.sampler, m.steps) for m in frontier.read(tmp_path / "f")} == {
        ("backward", 16),
        ("hybrid", 2),
        ("hybrid", 16),
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no/such"], "no/such is not a folder"),
        (["{run}@heun"], "is not a folder"),
        (["{run}", "--samplers", "heun"], "'heun' is unknown"),
        (["{run}", "--samplers", "pipeline"], "no scheduler of diffusers"),
        (["{run}+lora"], "+LORA goes with a diffusers folder"),
        (["{run}/models/final"], "add --config"),
        (["{run}", "--config", "no.yaml"], "no.yaml is neither a config nor a run directory"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(arguments, words, run_dir, tmp_path, capsys):
    arguments = [a.replace("{run}", str(run_dir)) for a in arguments]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tiny_checkpoints.sd15(tmp_path_factory.mktemp("models") / "sd15")


def test_diffusers_folders_are_drawn_from_by_their_own_pipeline_and_with_a_lora(published, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    request = SampleRequest("heldout", 0, ("a photo of a red cat",), (3,), 2, num_steps=2, guidance_scale=3.0)
    (label, _, sampler), load = open_model(str(published), "", "cpu", "float32")
    plain = load().draw(request, 5)
    assert (label, sampler) == ("sd15", "pipeline") and plain.shape[0] == 2 and plain.dtype == np.uint8
    assert (
        np.array_equal(plain, Pipeline(published, None, "cpu", "float32").draw(request, 5))
        and plain[0].tolist() != plain[1].tolist()
    )

    pipe = StableDiffusionPipeline.from_pretrained(published)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.unet))
    name = f"tuned={published}+{tmp_path / 'lora'}"
    (label, _, _), load = open_model(name, "", "cpu", "float32")
    assert label == "tuned" and not np.array_equal(load().draw(request, 5), plain)


@pytest.mark.parametrize("sampler", [name for name in NAMES if name not in ("pipeline", "backward")])
def test_every_sampler_draws_from_a_published_network(sampler, published):
    _, load = open_model(str(published), sampler, "cpu", "float32")
    images = load().draw(SampleRequest("heldout", 0, ("a red cat",), (0,), 1, num_steps=3, guidance_scale=2.0), 1)
    assert images.dtype == np.uint8 and images.shape[0] == 1 and images.std() > 0
