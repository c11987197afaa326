"""The memory estimate against what torch's profiler sees real steps allocate, and against closed forms."""

from __future__ import annotations

import gc
import itertools
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fixtures.memory import SHAPES, profiled_peak, real_network, real_step, small_folder
from rlproxi.config.loading import build_config
from rlproxi.errors import ConfigError
from rlproxi.models.autoencoder import Autoencoder
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import empty_form, trainable
from rlproxi.planning.memory import estimate
from rlproxi.planning.memory_parts import BUCKET, count, empty_vae, text_encoders
from rlproxi.planning.memory_steps import decoding_peak, learner_losses, training_peak
from rlproxi.planning.memory_trace import LiveBytes, no_memory, traced, without_data

LORA = {"rank": 4, "alpha": 4}
ROWS = 8


def small_config(kind: str, tmp_path, **model):
    """A learner of 8 images in a micro-batch: a new U-Net, or a checkpoint's network."""
    values = {
        "data": {"size": 32},
        "model": {"channels": [32, 64], **model},
        "run": {"stages": ["rl"]},
        "rl": {"group_size": ROWS, "prompts_per_step": 2, "groups_per_micro_batch": 1},
        "grpo": {"kl_coef": 0.0},
    }
    if kind != "new":
        values["data"]["size"] = 64
        values["model"] = {"init": str(small_folder(kind, tmp_path / kind)), **model}
    return build_config(values)


@pytest.mark.parametrize(
    "kind, precision, lora, checkpointing",
    [
        ("new", "float32", None, True),
        ("sd15", "float32", None, False),
        ("sd15", "bfloat16", LORA, False),
        ("sd15", "float32", LORA, True),
        ("sd3-medium", "bfloat16", LORA, False),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("new", "bfloat16", None, False),
                ("sd15", "bfloat16", None, True),
                ("sd3-medium", "float32", None, True),
            )
        ),
    ],
)
def test_peak_of_a_training_step_is_what_the_profiler_sees(kind, precision, lora, checkpointing, tmp_path):
    config = small_config(kind, tmp_path, precision=precision, lora=lora, gradient_checkpointing=checkpointing)
    dtype = getattr(torch, precision)
    real = real_network(config, dtype)
    real_step(learner_losses(config, real, ROWS), dtype)  # once before: what is made once is not the step's
    losses = learner_losses(config, real, ROWS)  # holds the inputs, which are the batch's
    measured = profiled_peak(lambda: real_step(losses, dtype))
    assert step_peak(config, dtype, ROWS) == pytest.approx(measured, rel=0.05 if packs(precision) else 0.03)


def test_garbage_of_an_earlier_profile_is_not_taken_off_this_one():
    def leave_a_cycle():
        cycle = [torch.zeros(1024)]
        cycle.append(cycle)

    def step():
        held = torch.zeros(1024)
        [[] for _ in range(10_000)]  # enough to set the collector off, were it on
        return held, torch.zeros(1024)

    assert profiled_peak(leave_a_cycle) == 4096
    assert profiled_peak(step) == 8192
    assert gc.isenabled()


def packs(precision: str) -> bool:
    """Whether CPU attention copies its keys and values into AMX's layout, a workspace that no estimate sees."""
    return precision == "bfloat16" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def step_peak(config, dtype=torch.float32, rows: int = ROWS) -> int:
    """The estimated peak of one of the learner's losses and its backward."""
    network = without_data(empty_form(config, "rl", dtype))
    with no_memory():
        first = itertools.islice(learner_losses(config, network, rows), 1)
        return training_peak(first, trainable(network).values(), dtype, "cpu")


def test_learner_is_the_sum_of_what_a_real_one_holds(tmp_path):
    config = small_config("sd15", tmp_path, precision="float32", lora=LORA)
    learner, rollout = estimate(config).roles
    real = real_network(config, torch.float32)
    assert learner.parts["gradients"] == sum(p.grad.nbytes for p in trainable(real).values())
    assert learner.parts["Adam moments"] == 2 * learner.parts["gradients"]
    assert (
        learner.parts["network"]
        == rollout.parts["network"]
        == sum(x.nbytes for x in [*real.parameters(), *real.buffers()])
    )
    assert learner.parts["activations"] == step_peak(config)
    # z, z_next and prox of 2 groups at 3 steps; states, pooled and mask of 77 tokens; advantages and weights.
    assert learner.parts["batch"] == 2 * ROWS * 4 * (3 * 3 * 4 * 8 * 8 + 77 * 33 + 32 + 2)
    assert learner.total == sum(learner.parts.values())


@pytest.mark.parametrize("lora", [LORA, None])
def test_gradient_checkpointing_shows(lora, tmp_path):
    plain, less = (
        step_peak(
            small_config(
                "sd15",
                tmp_path / str(checkpointing),
                precision="float32",
                lora=lora,
                gradient_checkpointing=checkpointing,
            )
        )
        for checkpointing in (False, True)
    )
    assert less < 0.7 * plain


def test_decoding_peak_is_what_the_profiler_sees(tmp_path):
    folder = small_folder("sd15", tmp_path / "sd15")
    real = Autoencoder(empty_vae(ModelFolder.at(folder)).to_empty(device="cpu").requires_grad_(False))
    z = torch.zeros(4, 4, 8, 8)

    def decode():
        with torch.no_grad():
            ((real.decode(z) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    decode()
    with no_memory():
        estimated = decoding_peak(empty_vae(ModelFolder.at(folder)), (4, 8, 8), 4, "cpu")
    assert estimated == pytest.approx(profiled_peak(decode), rel=0.05)


@pytest.mark.parametrize("ghosts", [True, False])
def test_live_bytes_of_a_chain_of_layers_in_closed_form(ghosts):
    """y = silu(silu(x)): each output is saved, and a backward holds two gradients beside what is still saved."""
    with no_memory() if ghosts else nullcontext():
        x = torch.zeros(1024, requires_grad=True)
        with LiveBytes() as live:
            y = torch.nn.functional.silu(torch.nn.functional.silu(x))
            assert live.now == live.peak == 2 * 4096
            y.backward(torch.ones_like(x))
            del y
            assert live.now == 4096  # x's new gradient


def test_ghosts_allocate_what_fake_tensors_do():
    """torch's own data-free tensors, slower, as the second opinion; with Adam-like in-place updates and views."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step(make) -> list[int]:
        network = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.GroupNorm(4, 32),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 36, 8),
            nn.LayerNorm(8),
            nn.Softmax(-1),
        )
        x = torch.zeros(4, 3, 8, 8)
        with make(network) as live, torch.autocast("cpu", torch.bfloat16):
            seen = [network(x).square().mean()]
            seen.append(live.now)
            seen[0].backward()
            network[0].weight.data.add_(network[0].weight.grad, alpha=-1.0)
        return [seen[1], live.now, live.peak]

    with FakeTensorMode():
        fake = step(lambda network: LiveBytes())
    with no_memory():
        ghosts = step(lambda network: LiveBytes())
    assert ghosts[1:] == fake[1:] and min(fake) > 0
    assert ghosts[0] == pytest.approx(fake[0], abs=64)  # numbers of one element


def test_cuda_autocast_keeps_norms_in_float32_and_rounds_to_blocks():
    with no_memory():
        x, w = torch.zeros(3, 5), torch.zeros(5, 5, requires_grad=True)
        with traced("cuda") as live, torch.autocast("cpu", torch.bfloat16):
            y = nn.functional.linear(x, w)
            assert y.dtype is torch.bfloat16
            assert nn.functional.layer_norm(y, (5,)).dtype is torch.float32
            assert y.softmax(-1).dtype is torch.float32
            assert live.now % 512 == 0 and live.now > 0
        with traced("cpu"), torch.autocast("cpu", torch.bfloat16):
            assert nn.functional.layer_norm(y, (5,)).dtype is torch.bfloat16


@pytest.mark.parametrize("stage, ranks", [(0, 2), (1, 2), (2, 4), (3, 4)])
def test_engine_state_by_zero_stage(stage, ranks, tmp_path):
    """As measured on DeepSpeed with two ranks (docs/memory.md)."""
    base = {
        "run": {"stages": ["rl"]},
        "data": {"size": 16},
        "model": {"channels": [32, 32], "precision": "float32"},
        "rl": {"prompts_per_step": 8, "groups_per_micro_batch": 1},
        "grpo": {"kl_coef": 0.1},
    }
    config = build_config(
        {**base, "learner": {"zero_stage": stage}, "resources": {"learner_workers": ranks, "learner_gpus": 1}}
    )
    found = estimate(config)
    parts, size = found.roles[0].parts, 4 * found.trained
    assert parts["gradients"] == (size // ranks if stage >= 2 else size)
    assert parts["Adam moments"] == 2 * (size // ranks if stage else size)
    assert parts.get("master weights", 0) == (size // ranks if stage else 0)
    assert parts.get("reduction buffer", 0) == (size if stage else 0) and size < 4 * BUCKET
    assert parts["reference copy"] == pytest.approx(size, rel=0.05)  # and the Gaussian's buffers


@pytest.mark.parametrize(
    "name, network, texts, vae",
    [
        ("sd15", 859_520_964, [123_060_480], 83_653_863),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840], 83_653_863),
        ("sd3-medium", 2_028_328_000, [123_650_304, 694_659_840, 4_762_310_656], 83_819_683),
    ],
)
def test_published_shapes_have_the_published_parameters(name, network, texts, vae):
    config = build_config({"data": {"size": 512}, "model": {"init": str(SHAPES[name])}})
    denoiser = empty_form(config, "rl")
    assert count(denoiser.net.parameters()) == network
    assert all(x.device.type == "meta" for x in denoiser.parameters())
    with torch.device("meta"):
        assert [count(model.parameters()) for model in text_encoders(config, ModelFolder.at(SHAPES[name]))] == texts
    assert count(empty_vae(ModelFolder.at(SHAPES[name])).parameters()) == vae


@pytest.mark.parametrize(
    "name, trained", [pytest.param("sd15", 6_377_472, marks=pytest.mark.exhaustive), ("sd3-medium", 18_776_064)]
)
def test_billions_of_parameters_are_planned_for_in_seconds_and_without_weights(name, trained):
    config = build_config(
        {
            "run": {"stages": ["rl"]},
            "data": {"size": 512},
            "resources": {"learner_gpus": 1, "rollout_gpus": 1},
            "model": {"init": str(SHAPES[name]), "lora": {"rank": 32, "alpha": 64}},
        }
    )
    begun = time.process_time()
    found = estimate(config)
    assert time.process_time() - begun < 20
    assert found.trained == trained and found.update_bytes == 4 * trained
    assert [role.name for role in found.roles] == ["learner rank", "rollout actor"]
    frozen = 2 * (found.parameters - trained)  # in bfloat16
    assert frozen + 4 * trained <= found.roles[0].parts["network"] < 1.15 * (frozen + 4 * trained)


def test_learner_peak_has_a_term_for_each_image(tmp_path):
    config = small_config("sd15", tmp_path, precision="float32")
    peaks = [step_peak(config, rows=rows) for rows in (4, 8, 16)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.02)


@pytest.mark.parametrize("key", ["init", "encoders"])
@pytest.mark.parametrize(
    "damage, words",
    [
        (None, "is not a folder"),
        ("vae/config.json", "vae/config.json is missing"),
        ("text_encoder/config.json", "text_encoder/config.json is missing"),
    ],
)
def test_an_unusable_folder_is_an_error_that_names_key_folder_and_remedy(key, damage, words, tmp_path):
    folder = tmp_path / "model"
    if damage:
        small_folder("sd15", folder)
        (folder / damage).unlink()
    with pytest.raises(ConfigError, match=f"model.{key} = .*model.*{words}.*hf download"):
        estimate(build_config({"data": {"size": 64}, "model": {"patch": 1, key: str(folder)}}))
