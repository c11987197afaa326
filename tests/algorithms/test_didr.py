"""The loss object of DIDR on Gaussians: a network of two numbers for the generator, one for the fake score."""

import pytest
import torch
from torch import nn

from fixtures.generators import Encoder, Quadratic
from fixtures.sections import sections
from rlproxi.algorithms.anchor import AnchoredAdamW
from rlproxi.algorithms.base import Batch, Parts
from rlproxi.algorithms.didr import DIDR
from rlproxi.config.loading import build_config
from rlproxi.models.loading import trainable
from rlproxi.proximal.clean import Level, clean_prediction
from rlproxi.proximal.operator import expand
from rlproxi.proximal.schedule import VPSchedule
from rlproxi.rewards.gradients import RewardGradients

SHAPE = (1, 8, 8)
SCHEDULE = VPSchedule()


class Gaussian(nn.Module):
    """The exact prox of N(mean, std^2 I), whose two numbers can be learnt (ProxDM's closed form)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(float(mean))), nn.Parameter(torch.tensor(float(std)).log())

    def forward(self, y, t, lam, text):
        alpha_bar = expand(SCHEDULE.alpha_bar(t), y)
        spread = alpha_bar * (2 * self.log_std).exp() + 1 - alpha_bar
        return expand(lam, y).sqrt() * (y - alpha_bar.sqrt() * self.mean) / (spread + expand(lam, y))


class OneStep(nn.Module):
    """A generator N(shift, scale^2 I): eps such that prox(z) = shift + scale z / std(z)."""

    def __init__(self, shift, scale, std_z):
        super().__init__()
        self.shift, self.scale, self.std_z = nn.Parameter(torch.tensor(shift)), nn.Parameter(torch.tensor(scale)), std_z

    def forward(self, y, t, lam, text):
        return (y - self.shift - self.scale * y / self.std_z) / expand(lam, y).sqrt()


def made(scorers=None, shift=0.0, scale=1.0, fake=(0.0, 1.0), **didr):
    config = build_config(
        {
            "run": {"algorithm": "didr"},
            "sampler": {"num_inference_steps": 1},
            "evaluate": {"steps": [1]},
            **sections(
                "didr",
                **{
                    "prompts_per_step": 8,
                    "group_size": 8,
                    "groups_per_micro_batch": 4,
                    "warmup_steps": 0,
                    "candidates": [4, 8],
                    "steps": 10**6,
                    **didr,
                },
            ),
        }
    )
    algorithm = DIDR(config)
    step = algorithm.step
    policy = OneStep(shift, scale, (step.a**2 + step.s**2) ** 0.5)
    networks = {"policy": policy, "fake": Gaussian(*fake)}
    gradients = RewardGradients(scorers, normalize=False) if scorers else None
    algorithm.connect(
        Parts(
            networks,
            networks,
            Gaussian(0.3, 0.4).requires_grad_(False),
            Encoder(),
            gradients,
            SHAPE,
            torch.device("cpu"),
        )
    )
    return algorithm, networks


def optimizers(algorithm, networks):
    return {
        name: AnchoredAdamW(list(trainable(network).values()), lr=1.0, betas=(0.5, 0.9), weight_decay=0.0)
        for name, network in networks.items()
    }


def iterate(algorithm, networks, step_by, iteration):
    batch = Batch(iteration, algorithm.requests(iteration), 0, 1)
    seen = []
    for update in algorithm.updates(batch):
        count = algorithm.losses_per_update(1)[update.network]
        for loss, _ in update.losses:
            (loss / count).backward()
        touched = {name for name, network in networks.items() if any(p.grad is not None for p in network.parameters())}
        assert touched == {update.network}, "an update reaches its own network and no other"
        for group in step_by[update.network].param_groups:
            group["lr"] = update.lr
        step_by[update.network].step()
        step_by[update.network].zero_grad()
        seen.append(update.network)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"reward": "none"},
        {"reward": "terminal"},
        {"reward": "diffused"},
        {"reward": "diffused", "damped": False, "reward_steps": 2, "particles": 2},
        {"reward": "terminal", "divergence": "score"},
        {"reward": "none", "divergence": "score"},
    ],
)
def test_an_iteration_follows_and_then_moves(settings):
    scorers = None if settings["reward"] == "none" else {"a": (Quadratic(), 1.0)}
    algorithm, networks = made(scorers, fake_updates=3, lr=1e-2, fake_lr=1e-2, **settings)
    before = {
        name: torch.cat([p.detach().reshape(1) for p in network.parameters()]) for name, network in networks.items()
    }
    assert iterate(algorithm, networks, optimizers(algorithm, networks), 0) == ["fake"] * 3 + ["policy"]
    for name, network in networks.items():
        assert not torch.equal(torch.cat([p.detach().reshape(1) for p in network.parameters()]), before[name])
        assert all(p.requires_grad for p in network.parameters())


def test_the_fake_score_learns_the_generators_own_distribution():
    algorithm, networks = made(
        shift=-0.5, scale=0.7, fake_lr=3e-2, lr=1e-12, fake_updates=4, reward="none", decay_from=0.3, steps=50
    )
    step_by = optimizers(algorithm, networks)
    for iteration in range(50):
        iterate(algorithm, networks, step_by, iteration)
    fake = networks["fake"]
    assert fake.mean.item() == pytest.approx(-0.5, abs=0.02) and fake.log_std.exp().item() == pytest.approx(
        0.7, abs=0.02
    )


@pytest.mark.parametrize("divergence", ["kl", "score"])
def test_without_a_reward_the_generator_becomes_the_reference(divergence):
    algorithm, networks = made(
        shift=-0.5,
        scale=0.9,
        fake=(-0.5, 0.9),
        lr=2e-2,
        fake_lr=4e-2,
        fake_updates=3,
        reward="none",
        divergence=divergence,
        decay_from=0.0,
        steps=120,
    )
    step_by = optimizers(algorithm, networks)
    for iteration in range(120):
        iterate(algorithm, networks, step_by, iteration)
    assert networks["policy"].shift.item() == pytest.approx(0.3, abs=0.02)
    assert networks["policy"].scale.item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("damped", [True, False])
def test_with_a_quadratic_reward_it_becomes_the_tilted_gaussian(damped):
    """q* of r = -gain/2 mean (pixel - goal)^2: precision and mean add up. The plug-in without damping goes too far."""
    gain, goal, beta = 128.0, 0.9, 0.5
    algorithm, networks = made(
        {"a": (Quadratic(gain, goal), 1.0)},
        shift=0.3,
        scale=0.4,
        fake=(0.3, 0.4),
        lr=1e-2,
        fake_lr=2e-2,
        fake_updates=3,
        reward="diffused",
        beta=beta,
        damped=damped,
        kappa_max=1e9,
        decay_from=0.3,
        steps=150,
    )
    step_by = optimizers(algorithm, networks)
    for iteration in range(150):
        iterate(algorithm, networks, step_by, iteration)
    q = gain / 4 / SHAPE[1] / SHAPE[2]  # d pixels = dx/2, mean over the dimensions
    precision = 1 / 0.4**2 + q / beta
    mean = (0.3 / 0.4**2 + q / beta * (2 * goal - 1)) / precision
    off = abs(networks["policy"].shift.item() - mean)
    if damped:
        assert off < 0.02 and networks["policy"].scale.item() == pytest.approx(precision**-0.5, abs=0.02)
    else:
        assert off < 0.08  # a small tilt: the plug-in's factor is 1 + q v / beta


def test_the_direction_vanishes_where_generator_and_target_agree():
    algorithm, _ = made(shift=0.3, scale=0.4, fake=(0.3, 0.4), reward="none")
    (update,) = [u for u in algorithm.updates(Batch(0, algorithm.requests(0), 0, 1)) if u.network == "policy"]
    assert max(abs(loss.item()) for loss, _ in update.losses) < 1e-10


def test_clean_predictions_of_the_gaussian_are_its_posterior_means():
    level = Level.of(SCHEDULE, torch.tensor([0.2, 0.6]), torch.tensor([0.5, 2.0]))
    y, network = torch.randn(2, *SHAPE), Gaussian(0.3, 0.4)
    clean = clean_prediction(y, network(y, level.t, level.lam, None), level)
    alpha, sigma = expand(level.alpha, y), expand(level.sigma, y)
    expected = 0.3 + 0.4**2 * alpha / (alpha**2 * 0.4**2 + sigma**2) * (y - alpha * 0.3)
    torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-5)
