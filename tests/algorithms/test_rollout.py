from dataclasses import replace

import numpy as np
import pytest
import torch

from rlproxi.algorithms import grpo
from rlproxi.algorithms.base import Batch, Parts
from rlproxi.algorithms.requests import SampleRequest, split_request
from rlproxi.algorithms.rollout import GroupSampler, flatten, unflatten
from rlproxi.config.loading import Config, build_config
from rlproxi.data import faces
from rlproxi.models.loading import build_denoiser
from rlproxi.models.precision import autocast
from rlproxi.models.text import build_text_encoder, operator
from rlproxi.proximal import policy

CAPTIONS = [faces.portrait(0, i).caption for i in range(8)]
REQUEST = SampleRequest("train", 4, tuple(CAPTIONS[:2]), (8, 9), 3, window=(0, 2))
MODEL = {
    "channels": [32, 32],
    "blocks": [1, 0],
    "attention": [True, False],
    "text_dim": 32,
    "text_layers": 1,
    "precision": "float32",
}


def make_config(**sections) -> Config:
    return build_config({"data": {"size": 16}, "sampler": {"num_inference_steps": 4}, "model": MODEL, **sections})


def make_unet(config: Config, seed: int = 0):
    """A network whose zero-initialised layers are random, so that text, t and lam all matter."""
    unet = build_denoiser(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(std=0.1, generator=generator)
    return unet


def make_sampler(config: Config | None = None) -> GroupSampler:
    config = config or make_config()
    return GroupSampler(config, make_unet(config), build_text_encoder([*CAPTIONS, ""], 32, 1, 40))


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.fixture(scope="module")
def sampled(sampler):
    return sampler.sample(REQUEST)


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_shapes(sampled):
    images, chain = sampled
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.uint8
    assert set(chain) == {"z", "z_next", "prox"}
    assert all(x.shape == (2, 6, 3, 16, 16) and x.dtype == np.float32 for x in chain.values())


def test_the_same_request_gives_the_same_bits(sampled):
    images, chain = make_sampler().sample(REQUEST)
    assert np.array_equal(images, sampled[0])
    assert all(np.array_equal(chain[name], sampled[1][name]) for name in chain)


def test_a_group_is_the_same_wherever_it_stands_in_a_request(sampler, sampled):
    turned = replace(REQUEST, prompts=REQUEST.prompts[::-1], indices=REQUEST.indices[::-1])
    images, chain = sampler.sample(turned)
    assert apart(images[3:], sampled[0][:3]) <= 1 and apart(images[:3], sampled[0][3:]) <= 1
    assert np.allclose(chain["z"][:, 3:], sampled[1]["z"][:, :3], atol=1e-4)
    alone, _ = sampler.sample(replace(REQUEST, prompts=REQUEST.prompts[1:], indices=REQUEST.indices[1:]))
    assert apart(alone, sampled[0][3:]) <= 1


def test_images_differ_by_sample_index_step_purpose_seed_and_caption(sampler, sampled):
    images = sampled[0]
    assert min(apart(images[i], images[j]) for i in range(6) for j in range(i)) > 20
    for other in (replace(REQUEST, step=5), replace(REQUEST, indices=(10, 11)), replace(REQUEST, purpose="heldout")):
        assert apart(sampler.sample(other)[0], images) > 20
    assert apart(sampler.sample(replace(REQUEST, prompts=tuple(CAPTIONS[2:4])))[0], images) > 1
    assert apart(make_sampler(make_config(run={"seed": 1})).sample(REQUEST)[0], images) > 20


def test_without_a_window_no_chain_is_kept(sampler, sampled):
    images, chain = sampler.sample(replace(REQUEST, window=()))
    assert chain == {} and np.array_equal(images, sampled[0])


def test_the_window_picks_positions_of_the_plan(sampler, sampled):
    _, whole = sampler.sample(replace(REQUEST, window=(0, 1, 2)))
    for name, x in sampled[1].items():
        assert np.array_equal(x, whole[name][[0, 2]])
    assert np.array_equal(whole["z_next"][:-1], whole["z"][1:])


def test_z_next_is_the_action_drawn_from_the_policy(sampler):
    """(z_next - a prox)/s is the named noise: standard normal, and the same for any weights."""
    _, chain = sampler.sample(replace(REQUEST, window=(0, 1, 2)))
    other = GroupSampler(sampler.config, make_unet(sampler.config, 1), sampler.pipeline.text)
    _, second = other.sample(replace(REQUEST, window=(0, 1, 2)))
    assert not np.allclose(chain["prox"], second["prox"], atol=1e-2)
    for k, action in enumerate(policy.actions(sampler.pipeline.steps())):
        noise = [(c["z_next"][k] - action.a * c["prox"][k]) / action.s for c in (chain, second)]
        assert np.allclose(*noise, atol=1e-4)
        assert abs(noise[0].mean()) < 5 / noise[0].size ** 0.5 and noise[0].std() == pytest.approx(1, abs=0.06)


def test_replay_in_the_same_shape_is_bit_identical_and_the_ratio_exactly_one(sampler, sampled):
    """What the learner does: the same prox, with gradients, on the chain that came back."""
    config, chain = sampler.config, {name: torch.from_numpy(x) for name, x in sampled[1].items()}
    unet = make_unet(config).train()
    encoder = sampler.pipeline.text
    prox = operator(unet, encoder, config.sampler.guidance_scale)
    algorithm = grpo.GRPO(config)
    window = [algorithm.actions[i] for i in REQUEST.window]
    text = encoder.groups(REQUEST.prompts, REQUEST.group_size)
    for k, action in enumerate(window):
        again = prox(chain["z"][k], action.step.t, action.step.lam, text)
        assert again.requires_grad and torch.equal(again.detach(), chain["prox"][k])
        assert not policy.log_ratio(action, again, chain["prox"][k], chain["z_next"][k]).any()
    batch = grpo.MicroBatch(chain["z"], chain["z_next"], chain["prox"], torch.randn(6), torch.ones(6), text)
    for loss, metrics in algorithm.losses(prox, None, [batch], window):
        assert metrics["ratio/max_deviation"] == 0.0
        loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in unet.parameters())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_in_bfloat16_the_first_ratio_is_one_too(guidance):
    """The rank enters autocast around the whole check, the sampler around its forwards only; captions are the same."""
    sampler = make_sampler(
        make_config(
            model={**MODEL, "precision": "bfloat16"},
            rl={"group_size": 3},
            grpo={"trained_steps": 2},
            sampler={"num_inference_steps": 4, "guidance_scale": guidance},
        )
    )
    chain = {name: torch.from_numpy(x) for name, x in sampler.sample(REQUEST)[1].items()}
    algorithm, networks = grpo.GRPO(sampler.config), {"policy": make_unet(sampler.config).train()}
    algorithm.window = lambda iteration: [algorithm.actions[i] for i in REQUEST.window]
    algorithm.connect(
        Parts(
            networks, networks, None, make_sampler(sampler.config).pipeline.text, None, (3, 16, 16), torch.device("cpu")
        )
    )
    batch = Batch(0, [REQUEST], 0, 1, np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32), lambda j: chain)
    with torch.no_grad(), autocast(torch.bfloat16, "cpu"):
        assert algorithm.check(batch) == {"ratio/first_max_deviation": 0.0}


def test_replay_with_guidance_is_bit_identical_too():
    config = make_config(sampler={"num_inference_steps": 4, "guidance_scale": 2.0})
    sampler = make_sampler(config)
    images, chain = sampler.sample(REQUEST)
    prox = operator(sampler.pipeline.denoiser, sampler.pipeline.text, 2.0)
    action = policy.actions(sampler.pipeline.steps())[2]
    with torch.no_grad():
        again = prox(
            torch.from_numpy(chain["z"][1]),
            action.step.t,
            action.step.lam,
            sampler.pipeline.text.groups(REQUEST.prompts, 3),
        )
    assert np.array_equal(again.numpy(), chain["prox"][1])
    unguided = sampler.sample(replace(REQUEST, guidance_scale=1.0))[0]
    assert apart(unguided, images) > 1 and apart(unguided, make_sampler().sample(REQUEST)[0]) <= 1


def test_step_count_of_the_request_beats_the_configs(sampler, sampled):
    assert [len(sampler.pipeline.steps(n)) for n in (None, 2, 7)] == [4, 2, 7]
    assert apart(sampler.sample(replace(REQUEST, num_steps=7))[0], sampled[0]) > 1
    assert np.array_equal(sampler.sample(replace(REQUEST, num_steps=4))[0], sampled[0])


def test_same_noise_starts_a_group_from_one_z():
    """z_N = a x_N + s n, the state that the policy does not choose, is one for the group; the actions are not."""
    from rlproxi.seeds import generator

    sampler = make_sampler()
    images, chain = sampler.sample(replace(REQUEST, window=(0, 1, 2), same_noise=True))
    start = sampler.pipeline.steps()[0]
    for group, index in enumerate(REQUEST.indices):
        g = generator(0, 0, 4, index, 0, 0)  # run seed, purpose, step, prompt, sample 0, start
        shape = chain["z"].shape[2:]
        expected = start.a * torch.randn(shape, generator=g) + start.s * torch.randn(shape, generator=g)
        for j in range(3):
            assert np.allclose(chain["z"][0, 3 * group + j], expected.numpy(), atol=1e-5)
    assert apart(images[0], images[1]) > 20
    asked = grpo.GRPO(make_config(grpo={"same_noise": True})).requests(0)
    assert all(request.same_noise for request in asked) and not REQUEST.same_noise


def test_ddim_chains_are_drawn_from_its_policy_and_replay_exactly():
    """eta > 0: the noise comes after the prox, so a group of one start differs by its very first action."""
    config = make_config(sampler={"name": "ddim", "num_inference_steps": 4, "start_time": 0.65, "eta": 0.7})
    sampler, every = make_sampler(config), replace(REQUEST, window=(0, 1, 2), same_noise=True)
    chain = {name: torch.from_numpy(x) for name, x in sampler.sample(every)[1].items()}
    assert torch.equal(chain["z"][0, 0], chain["z"][0, 1]) and not torch.equal(chain["z"][0, 0], chain["z"][0, 3])
    for k, action in enumerate(policy.actions(sampler.pipeline.steps())):
        noise = (action.free(chain["z"][k], chain["z_next"][k]) - action.a * chain["prox"][k]) / action.s
        assert abs(noise.mean()) < 5 / noise.numel() ** 0.5 and noise.std() == pytest.approx(1, abs=0.06)
        assert not torch.allclose(noise[0], noise[1], atol=0.1)  # the first action's too
    algorithm = grpo.GRPO(config)
    text = sampler.pipeline.text.groups(every.prompts, every.group_size)
    batch = grpo.MicroBatch(chain["z"], chain["z_next"], chain["prox"], torch.randn(6), torch.ones(6), text)
    prox = operator(make_unet(config).train(), sampler.pipeline.text, 1.0)
    for loss, metrics in algorithm.losses(prox, None, [batch], algorithm.actions):
        assert metrics["ratio/max_deviation"] == 0.0 and torch.isfinite(loss)


def test_weights_travel_as_one_flat_array():
    config = make_config()
    one, two = make_unet(config, 1), make_unet(config, 2)
    flat = flatten(dict(one.named_parameters()))
    assert flat.dtype == np.float32 and flat.shape == (sum(p.numel() for p in one.parameters()),)
    flat.setflags(write=False)  # as they come out of the object store
    unflatten(flat, dict(two.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert np.array_equal(flatten(dict(two.named_parameters())), flat)
    with torch.no_grad():
        next(two.parameters()).add_(1)
    assert np.array_equal(flatten(dict(one.named_parameters())), flat)  # a copy, no view
    with pytest.raises(ValueError, match=f"weights hold {flat.size - 1} numbers where the model trains {flat.size}"):
        unflatten(flat[1:], dict(two.named_parameters()))


def test_split_request_cuts_between_groups():
    whole = SampleRequest("train", 1, tuple(CAPTIONS[:5]), tuple(range(5)), 4, window=(1,), num_steps=3)
    parts = split_request(whole, 2)
    assert [p.indices for p in parts] == [(0, 1), (2, 3), (4,)] and [p.images for p in parts] == [8, 8, 4]
    assert tuple(x for p in parts for x in p.prompts) == whole.prompts
    assert all(replace(p, prompts=whole.prompts, indices=whole.indices) == whole for p in parts)
    assert split_request(whole, 9) == [whole]


# -- samples that are NaN or Inf ----------------------------------------------------------


def test_a_broken_sample_is_not_finite_and_its_chain_is_zeros(sampled):
    sampler = make_sampler()
    seen = sampler.pipeline.run

    def broken(*arguments, **options):
        run = seen(*arguments, **options)
        run.x[4, 0, 0, 0] = float("nan")
        for z in run.z[:1]:  # none where no chain is kept
            z[1] = float("inf")
        return run

    sampler.pipeline.run = broken
    images, chain = sampler.sample(REQUEST)
    assert type(images) is np.ndarray and images.dtype == np.uint8
    assert chain["finite"].tolist() == [True, False, True, True, False, True]
    for key in ("z", "z_next", "prox"):
        assert not chain[key][:, [1, 4]].any() and np.array_equal(
            chain[key][:, [0, 2, 3, 5]], sampled[1][key][:, [0, 2, 3, 5]]
        )
    assert np.array_equal(images[[0, 2, 3, 5]], sampled[0][[0, 2, 3, 5]])
    assert "finite" not in sampled[1]
    _, judged = sampler.sample(replace(REQUEST, purpose="heldout", window=()))
    assert judged["finite"].tolist() == [True] * 4 + [False, True]
