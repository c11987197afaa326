"""R0 on a linear generator, where every derivative can be written down."""

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.generators import Encoder, Quadratic
from fixtures.sections import sections
from rlproxi.algorithms.base import Batch, Parts
from rlproxi.algorithms.r0 import R0
from rlproxi.config.loading import build_config
from rlproxi.rewards.gradients import RewardGradients, mean_scores
from rlproxi.seeds import NamedNoise, generator, rng

SHAPE = (2, 3, 3)


class Linear(nn.Module):
    """eps = scale y + bias: with it a generator of K steps is a polynomial in two numbers."""

    def __init__(self, scale=0.3, bias=0.1):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([scale, bias]))
        self.calls = 0

    def forward(self, y, t, lam, text):
        self.calls += 1
        return self.theta[0] * y + self.theta[1]


def config(steps=3, **r0):
    return build_config(
        {
            "run": {"algorithm": "r0"},
            "sampler": {"num_inference_steps": steps, "start_time": 0.3},
            **sections("r0", **{"prompts_per_step": 8, "groups_per_micro_batch": 4, **r0}),
        }
    )


def made(network, scorers, reference=None, **settings):
    algorithm = R0(config(**settings))
    gradients = RewardGradients(scorers, normalize=algorithm.normalize_gradients)
    algorithm.connect(
        Parts({"policy": network}, {"policy": network}, reference, Encoder(), gradients, SHAPE, torch.device("cpu"))
    )
    return algorithm


def objective_gradient(algorithm, network, iteration=3):
    """Of the one update of an iteration, as the engine forms it: backward by backward, of the mean of the losses."""
    (update,) = algorithm.updates(Batch(iteration, algorithm.requests(iteration), 0, 1))
    count = algorithm.losses_per_update(1)["policy"]
    network.zero_grad()
    seen, metrics = 0, {}
    for loss, found in update.losses:
        (loss / count).backward()
        seen, metrics = seen + 1, {**metrics, **found}
    assert seen == count
    return network.theta.grad.clone(), metrics


def by_hand(algorithm, network, scorers, iteration=3, normalize=True):
    """The same through one graph over all images, with autograd only across the generator."""
    total = 0
    for request in algorithm.requests(iteration):
        noise = NamedNoise(request.names(0))
        x = noise.start(SHAPE)
        for step in algorithm.plan:
            z = step.a * x + step.s * noise(step.k, x)
            x = z - step.lam**0.5 * (network.theta[0] * z + network.theta[1])
        dims = x[0].numel()
        ascent = 0
        for scorer, weight in scorers.values():
            pixels = ((x + 1) / 2).detach()
            inside = ((pixels > 0) & (pixels < 1)).float()
            g = -scorer.gain * (pixels.clamp(0, 1) - scorer.goal) / dims * inside / 2
            if normalize:
                g = g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            ascent = ascent + weight * g
        total = total - (ascent * x).flatten(1).sum(1).mean()
    return torch.autograd.grad(total / len(algorithm.requests(iteration)), network.theta)[0]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_gradient_is_the_hand_written_one(steps, normalize, checkpoint):
    network, scorers = Linear(), {"a": (Quadratic(), 1.0), "b": (Quadratic(50.0, 0.7), 0.5)}
    algorithm = made(network, scorers, steps=steps, normalize_gradients=normalize, checkpoint_steps=checkpoint)
    ours, _ = objective_gradient(algorithm, network)
    torch.testing.assert_close(ours, by_hand(algorithm, network, scorers, normalize=normalize), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_ddim_generator_has_the_gradient_of_its_paper(checkpoint):
    """x^ = (x - sigma eps)/alpha and the next x of R0's form, with eta drawn anew for every step of an iteration."""
    network, scorers = Linear(0.05, 0.1), {"a": (Quadratic(), 1.0)}
    algorithm = R0(
        build_config(
            {
                "run": {"algorithm": "r0"},
                "sampler": {"name": "ddim", "num_inference_steps": 3, "start_time": 0.5},
                "rl": {"prompts_per_step": 8, "groups_per_micro_batch": 4},
                "r0": {"checkpoint_steps": checkpoint},
            }
        )
    )
    algorithm.connect(
        Parts(
            {"policy": network},
            {"policy": network},
            None,
            Encoder(),
            RewardGradients(scorers),
            SHAPE,
            torch.device("cpu"),
        )
    )
    ours, _ = objective_gradient(algorithm, network)
    etas, times = rng(0, 0xE7A0, 3).random(3), algorithm.schedule.grid(3, 0.5)
    assert len(set(etas)) == 3
    total = 0
    for request in algorithm.requests(3):
        named = NamedNoise(request.names(0))
        x = named.start(SHAPE)
        for k, eta in zip((3, 2, 1), etas):
            alpha, following = (algorithm.schedule.alpha_bar(t) ** 0.5 for t in (times[k], times[k - 1]))
            sigma, left = ((1 - a * a) ** 0.5 for a in (alpha, following))
            eps = network.theta[0] * x / alpha + network.theta[1]  # the network is asked at x / alpha
            clean = (x - sigma * eps) / alpha
            x = following * clean + left * (1 - eta**2) ** 0.5 * eps
            x = x + left * eta * named(k, x) if k > 1 else x
        g = -(((x + 1) / 2).detach().clamp(0, 1) - 0.4) * ((x.detach().abs() < 1).float())
        g = g / g.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, 1, 1, 1)
        total = total - (g * x).flatten(1).sum(1).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(total / 2, network.theta)[0], rtol=1e-4, atol=1e-5)


def test_a_step_towards_the_reference_is_0_where_the_distributions_agree():
    """Nothing moves if the fake score is the reference; else a sample moves by the gap over its distance to it."""
    network, reference = Linear(), Linear(0.2, -0.3)
    algorithm = R0(config(distribution_weight=2.0, normalize_gradients=False))
    networks = {"policy": network, "fake": Linear(0.2, -0.3)}
    algorithm.connect(
        Parts(
            networks,
            networks,
            reference,
            Encoder(),
            RewardGradients({"a": (Quadratic(0.0), 1.0)}),
            SHAPE,
            torch.device("cpu"),
        )
    )
    (request, *_) = algorithm.requests(0)
    text, x = Encoder().groups(request.prompts, 1), torch.randn(4, *SHAPE, generator=generator(5))
    assert algorithm.towards_reference(x, request, text).abs().max() == 0
    networks["fake"].theta.data += 0.1
    moved = algorithm.towards_reference(x, request, text)
    level, g = algorithm.levels.draw(request, 0, x)
    y = level.diffuse(x, torch.randn(x.shape, generator=g))
    clean = [
        (y - level.sigma.square().reshape(-1, 1, 1, 1) / level.lam.sqrt().reshape(-1, 1, 1, 1) * f(y, None, None, None))
        / level.alpha.reshape(-1, 1, 1, 1)
        for f in (reference, networks["fake"])
    ]
    expected = (clean[0] - clean[1]) / (x - clean[0]).flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    updates = list(algorithm.updates(Batch(0, algorithm.requests(0), 0, 1)))
    assert [update.network for update in updates] == ["fake", "fake", "policy"]
    loss, metrics = next(updates[0].losses)
    (gradient,) = torch.autograd.grad(loss, networks["fake"].theta)
    assert gradient.abs().max() > 0 and network.theta.grad is None and metrics["loss"] > 0


def test_step_by_step_takes_one_more_forward_of_all_steps_but_the_last():
    network = Linear()
    algorithm = made(network, {"a": (Quadratic(), 1.0)}, steps=4)
    objective_gradient(algorithm, network)
    assert network.calls == 2 * (3 + 4)  # two micro-batches: three steps without gradient, then each with
    whole = made(network, {"a": (Quadratic(), 1.0)}, steps=4, checkpoint_steps=False)
    network.calls = 0
    objective_gradient(whole, network)
    assert network.calls == 2 * 4


def test_a_reward_of_another_scale_counts_the_same_when_gradients_are_normalised():
    def gradient(gain, normalize):
        network, scorers = Linear(), {"a": (Quadratic(1.0, 0.2), 1.0), "b": (Quadratic(gain, 0.8), 1.0)}
        return objective_gradient(made(network, scorers, normalize_gradients=normalize), network)[0]

    torch.testing.assert_close(gradient(1.0, True), gradient(1000.0, True), rtol=1e-5, atol=1e-7)
    # Unnormalised the loud one decides alone: its own gradient, to a part in a thousand.
    alone = Linear()
    loud, _ = objective_gradient(made(alone, {"b": (Quadratic(1000.0, 0.8), 1.0)}, normalize_gradients=False), alone)
    torch.testing.assert_close(gradient(1000.0, False), loud, rtol=5e-3, atol=1e-3)
    assert not torch.allclose(gradient(1.0, False), loud / 1000, rtol=0.1)


def test_plus_takes_one_step_and_its_own_clean_prediction():
    network, scorers = Linear(), {"a": (Quadratic(), 1.0)}
    algorithm = made(network, scorers, steps=4, plus=True)
    chosen = set()
    for iteration in range(24):
        ours, _ = objective_gradient(algorithm, network, iteration)
        k = int(rng(0, 0x60B1, iteration).integers(4))
        chosen.add(k)
        total = 0
        for request in algorithm.requests(iteration):
            noise = NamedNoise(request.names(0))
            x = noise.start(SHAPE)
            with torch.no_grad():
                for step in algorithm.plan[:k]:
                    z = step.a * x + step.s * noise(step.k, x)
                    x = z - step.lam**0.5 * network(z, None, None, None)
            step = algorithm.plan[k]
            z = step.a * x + step.s * noise(step.k, x)
            alpha_bar = algorithm.schedule.alpha_bar(step.t)
            variance = 1 - alpha_bar + step.lam
            clean = (z - variance / step.lam**0.5 * network(z, None, None, None)) / alpha_bar**0.5
            pixels = ((clean + 1) / 2).detach()
            g = -(pixels.clamp(0, 1) - 0.4) * ((pixels > 0) & (pixels < 1))
            g = g / g.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, 1, 1, 1)
            total = total - (g * clean).flatten(1).sum(1).mean()
        hand = torch.autograd.grad(total / 2, network.theta)[0]
        torch.testing.assert_close(ours, hand, rtol=1e-4, atol=1e-5)
    assert chosen == {0, 1, 2, 3}


def test_guidance_pulls_from_the_null_to_the_conditional_prediction():
    """A reference whose eps moves with the text: its guidance is known, and alone it decides the direction."""
    network = Linear()

    def reference(y, t, lam, text):
        return 0.2 * y + text.pooled[:, :1, None, None]  # 0 with a caption, -1 without

    silent = {"a": (Quadratic(0.0), 1.0)}
    algorithm = made(network, silent, reference, guidance_weight=0.5, normalize_gradients=False, candidates=[3])
    (request, *_) = algorithm.requests(0)
    x = torch.randn(4, *SHAPE, generator=generator(5))
    pulled = algorithm.guidance(x, request, Encoder().groups(request.prompts, 1))
    level, _ = algorithm.levels.draw(request, 0x6D1A, x)
    # D = (y - sigma^2/sqrt(lam) eps)/alpha, and eps differs by 1.
    expected = -(level.sigma**2) / (level.lam.sqrt() * level.alpha)
    torch.testing.assert_close(pulled, expected.reshape(-1, 1, 1, 1).expand_as(pulled), rtol=1e-5, atol=1e-5)
    ours, _ = objective_gradient(algorithm, network)
    assert ours.abs().max() > 0


def test_ranks_share_what_one_rank_would_do():
    network = Linear()
    algorithm = made(network, {"a": (Quadratic(), 1.0)}, steps=3)
    whole, _ = objective_gradient(algorithm, network)
    halves = []
    for rank in range(2):
        (update,) = algorithm.updates(Batch(3, algorithm.requests(3), rank, 2))
        network.zero_grad()
        for loss, _ in update.losses:
            (loss / algorithm.losses_per_update(2)["policy"]).backward()
        halves.append(network.theta.grad.clone())
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-5, atol=1e-7)


def test_a_missing_score_moves_nothing_and_is_left_out_of_the_mean():
    class Fails(Quadratic):
        def rewards(self, pixels, prompts):
            return super().rewards(pixels, prompts) * torch.tensor([float("nan"), 1.0, 1.0])

    x = torch.randn(3, *SHAPE) / 4
    found = RewardGradients({"a": (Fails(), 1.0)})(x, ["p"] * 3)
    assert found.ascent[0].abs().max() == 0 and torch.isfinite(found.ascent).all() and found.ascent[1].norm() > 0
    mean = mean_scores(found.scores, {"a": 2.0})
    assert (
        mean["reward/a"] == pytest.approx(float(found.scores["a"][1:].mean()))
        and mean["reward/mean"] == 2 * mean["reward/a"]
    )


def test_nothing_is_gained_beyond_black_and_white():
    class Brighter(Quadratic):
        def rewards(self, pixels, prompts):
            return pixels.flatten(1).mean(1)

    x = torch.tensor([[-2.0, -0.5, 0.5, 3.0]])
    ascent = RewardGradients({"a": (Brighter(), 1.0)}, normalize=False)(x[:, None, None], ["p"]).ascent
    np.testing.assert_allclose(ascent.flatten().numpy(), [0, 0.125, 0.125, 0])
