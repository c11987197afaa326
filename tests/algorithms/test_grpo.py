import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

from fixtures.generators import Quadratic
from fixtures.sections import sections
from rlproxi.algorithms.base import AlgorithmStopped, share
from rlproxi.algorithms.grpo import GRPO, MicroBatch, advantages
from rlproxi.config.algorithms import RL
from rlproxi.config.loading import build_config
from rlproxi.data.prompts import training_prompts
from rlproxi.proximal.samplers import plan
from rlproxi.proximal.schedule import VPSchedule
from rlproxi.rewards.gradients import RewardGradients

STEPS = plan(VPSchedule(), "hybrid", 6, 0.8)
NAN = float("nan")


def algorithm(seed=0, steps=6, **settings) -> GRPO:
    """Of the schema's default sampler: with six steps, those in STEPS."""
    plain = {"kl_coef": 0.0, "reduction": "sum", "trained_steps": None, "clip_range": 0.2}
    return GRPO(
        build_config(
            {
                "run": {"seed": seed},
                "sampler": {"num_inference_steps": steps},
                **sections("grpo", **{**plain, **settings}),
            }
        )
    )


class Linear:
    """prox_theta(z) = scale z + bias, in float64."""

    def __init__(self, scale: float, bias: float):
        self.theta = torch.tensor([scale, bias], dtype=torch.float64, requires_grad=True)
        self.calls = 0

    def __call__(self, z, t, lam, text):
        self.calls += 1
        return self.theta[0] * z + self.theta[1]


OLD = (0.6, 0.1)


def rollout(actions, batch=24, shape=(2, 3), seed=0, weight=None) -> MicroBatch:
    """A chain of the linear policy OLD with random advantages, float64."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, dtype=torch.float64, generator=g)  # noqa: E731
    z = normal(len(actions), batch, *shape)
    old = OLD[0] * z + OLD[1]
    z_next = torch.stack([a.a * p + a.s * normal(batch, *shape) for a, p in zip(actions, old)])
    weight = torch.ones(batch, dtype=torch.float64) if weight is None else weight
    return MicroBatch(z, z_next, old, normal(batch), weight, None)


def gradient(losses, prox) -> torch.Tensor:
    """Of the objective: the mean of the losses."""
    losses = [loss for loss, _ in losses]
    return torch.autograd.grad(sum(losses) / len(losses), prox.theta)[0]


# -- advantages ---------------------------------------------------------------------------


def test_advantages_closed_form():
    a = advantages(np.array([[1.0, 2, 3, 6], [-1, -1, 1, 1]]), eps=0.0)
    assert a.values[0] == pytest.approx(np.array([-2, -1, 0, 3]) / math.sqrt(3.5))
    assert a.values[1] == pytest.approx([-1, -1, 1, 1])
    assert a.values.dtype == a.weight.dtype == np.float32 and (a.weight == 1).all()
    assert a.stats == {
        "advantages/zero_variance_groups": 0,
        "groups/masked": 0,
        "samples/masked": 0,
        "reward/mean": pytest.approx(1.5),
        "reward/std": pytest.approx((math.sqrt(3.5) + 1) / 2),
    }
    assert advantages(np.array([[0.0, 2e-3]]), eps=1e-3).values[0] == pytest.approx([-0.5, 0.5])


def test_advantages_do_not_see_a_groups_offset_or_scale():
    rewards = np.random.default_rng(0).random((5, 8))
    one = advantages(rewards).values
    assert advantages(1000 * rewards + 7).values == pytest.approx(one, abs=1e-4)
    assert one.sum(1) == pytest.approx(0, abs=1e-5)


def test_a_missing_score_is_not_a_zero():
    whole = advantages(np.array([[1.0, 3.0], [5.0, 9.0]]))
    holed = advantages(np.array([[1.0, 3.0, NAN, NAN], [5.0, 9.0, NAN, np.inf]]))
    assert np.array_equal(holed.values[:, :2], whole.values) and not holed.values[:, 2:].any()
    assert np.array_equal(holed.weight, [[2, 2, 0, 0]] * 2)
    assert holed.stats == {**whole.stats, "samples/masked": 4}


def test_groups_that_teach_nothing_are_masked_and_counted():
    rewards = np.array([[1.0, 2, 3, NAN], [0.1, 0.1, 0.1, 0.1], [NAN, NAN, NAN, 5], [NAN] * 4])
    a = advantages(rewards)
    assert a.stats["advantages/zero_variance_groups"] == 1 and a.stats["groups/masked"] == 2
    assert a.stats["reward/mean"] == pytest.approx((6 + 0.4 + 5) / 8)
    assert not a.values[1:].any() and not a.weight[1:].any()
    assert (a.weight[0] > 0).tolist() == [True, True, True, False]
    assert a.weight.mean() == pytest.approx(1)


@pytest.mark.parametrize("rewards", [np.full((2, 3), NAN), np.full((2, 3), 0.3), np.array([[1.0, NAN, NAN]] * 2)])
def test_nothing_to_learn_is_weight_zero_everywhere(rewards):
    for std in ("group", "global"):
        a = advantages(rewards, std)
        assert not a.values.any() and not a.weight.any()
    assert math.isnan(advantages(np.full((2, 3), NAN)).stats["reward/mean"])


def test_global_std_is_that_of_all_usable_deviations():
    rewards = np.array([[0.0, 2], [0.0, 20], [5, 5], [3, NAN]])
    a = advantages(rewards, "global", eps=0.0)
    scale = math.sqrt((1 + 1 + 100 + 100) / 4)
    assert a.values == pytest.approx(np.array([[-1, 1], [-10, 10], [0, 0], [0, 0]]) / scale)


# -- the loss -----------------------------------------------------------------------------


def test_gradient_at_the_old_weights_is_the_score_function_gradient():
    """-mean(weight A grad ln pi), the densities from torch.distributions."""
    weight = torch.tensor([2.0, 0.0] * 12, dtype=torch.float64)
    algo, prox = algorithm(), Linear(*OLD)
    batch = rollout(algo.actions, weight=weight)
    found = gradient(algo.losses(prox, None, [batch], algo.actions), prox)
    objective = 0.0
    for k, action in enumerate(algo.actions):
        mean = action.a * (prox.theta[0] * batch.z[k] + prox.theta[1])
        log_density = Independent(Normal(mean, action.s), 2).log_prob(batch.z_next[k])
        objective = objective - (weight * batch.advantages * log_density).mean() / len(algo.actions)
    assert torch.allclose(found, torch.autograd.grad(objective, prox.theta)[0], rtol=1e-10)
    assert (found.abs() > 1e-3).all()


def test_mean_reduction_divides_the_gradient_by_the_dimensions():
    total, mean, prox = algorithm(), algorithm(reduction="mean"), Linear(*OLD)
    batch = rollout(total.actions)
    found = [gradient(a.losses(prox, None, [batch], a.actions), prox) for a in (total, mean)]
    assert torch.allclose(found[0], 6 * found[1], rtol=1e-10)


def test_gradient_climbs_the_expected_reward():
    """Monte Carlo through advantages() against the analytic gradient of E r, r = -(z' - c)^2, in one dimension."""
    algo, prox, groups, size, target = algorithm(steps=2), Linear(*OLD), 32, 2048, 1.5
    (action,) = algo.actions
    g = torch.Generator().manual_seed(0)
    start = torch.randn(groups, dtype=torch.float64, generator=g)
    z = start.repeat_interleave(size)[:, None]
    old = OLD[0] * z + OLD[1]
    z_next = action.a * old + action.s * torch.randn(groups * size, 1, dtype=torch.float64, generator=g)
    rewards = -(z_next - target).square().reshape(groups, size).numpy()
    a = advantages(rewards, "global")
    flat = lambda x: torch.from_numpy(x.astype(np.float64).reshape(-1))  # noqa: E731
    batch = MicroBatch(z[None], z_next[None], old[None], flat(a.values), flat(a.weight), None)
    found = -gradient(algo.losses(prox, None, [batch], [action]), prox)
    scale = (rewards - rewards.mean(1, keepdims=True)).std()
    pull = -2 * (action.a * (OLD[0] * start + OLD[1]) - target) * action.a  # d E r / d prox
    exact = torch.stack([(pull * start).mean(), pull.mean()])
    assert torch.allclose(found * scale, exact, rtol=0.05), (found * scale, exact)


def moved(advantage: float, shift: float, **settings):
    """(gradient, metrics) after prox moved by ``shift`` along the noise that was drawn: ln rho = n d - d^2/2, n = 1."""
    algo = algorithm(steps=2, **settings)
    (action,) = algo.actions
    one = torch.ones(1, 1, dtype=torch.float64)
    old = OLD[0] * one + OLD[1]
    prox = Linear(OLD[0], OLD[1] + shift * action.s / action.a)
    batch = MicroBatch(
        one[None],
        (action.a * old + action.s)[None],
        old[None],
        torch.full((1,), advantage, dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        None,
    )
    ((loss, metrics),) = algo.losses(prox, None, [batch], [action])
    return torch.autograd.grad(loss, prox.theta)[0], loss.item(), metrics


@pytest.mark.parametrize(
    "advantage, shift, held",
    [
        (1.0, 0.5, True),
        (-1.0, 0.5, False),
        (1.0, -0.5, False),
        (-1.0, -0.5, True),
        (1.0, 0.1, False),
        (-1.0, -0.1, False),
    ],
)
def test_the_clip_stops_only_what_went_far_enough_in_the_right_direction(advantage, shift, held):
    grad, loss, metrics = moved(advantage, shift, clip_range=0.2)
    rho = math.exp(shift - shift**2 / 2)
    assert metrics["ratio/mean"] == pytest.approx(rho)
    assert metrics["ratio/max_deviation"] == pytest.approx(abs(rho - 1))
    assert metrics["clip_fraction"] == float(abs(rho - 1) > 0.2)
    assert bool((grad == 0).all()) == held
    assert loss == pytest.approx(-advantage * (rho if not held else np.clip(rho, 0.8, 1.2)))
    assert loss == metrics["loss"]


def test_the_upper_clip_may_be_wider():
    for high, held in ((None, True), (0.6, False), (0.3, True)):
        assert bool((moved(1.0, 0.5, clip_range=0.2, clip_range_high=high)[0] == 0).all()) == held
        assert (moved(-1.0, -0.5, clip_range=0.2, clip_range_high=high)[0] == 0).all()


def test_normalised_ratio_leaves_the_quadratic_term_out():
    rho = moved(1.0, 0.1, normalize_ratio=True)[2]["ratio/mean"]
    assert rho == pytest.approx(math.exp(0.1 * algorithm(steps=2).actions[0].s))


def test_ratio_is_exactly_one_at_equal_weights():
    algo = algorithm()
    batch = rollout(algo.actions)
    single = MicroBatch(*(getattr(batch, n).float() for n in ("z", "z_next", "prox", "advantages", "weight")), None)
    same = iter(single.prox)
    for _, metrics in algo.losses(lambda *_: next(same), None, [single], algo.actions):
        assert metrics["ratio/max_deviation"] == 0.0 and metrics["clip_fraction"] == 0.0
        assert metrics["ratio/mean"] == 1.0


@pytest.mark.parametrize("reduction, dims", [("sum", 6), ("mean", 1)])
def test_kl_value_and_gradient(reduction, dims):
    """beta 1/2 (a/s)^2 |P - P_ref|^2 for the linear policy, and its derivative by hand."""
    algo, prox, reference = algorithm(kl_coef=0.5, reduction=reduction), Linear(0.7, 0.2), Linear(*OLD)
    batch = rollout(algo.actions)
    batch.advantages.zero_()
    for k, (loss, metrics) in enumerate(algo.losses(prox, reference, [batch], algo.actions)):
        z, stiffness = batch.z[k], (algo.actions[k].a / algo.actions[k].s) ** 2 * dims
        gap = 0.1 * z + 0.1
        expected = float(stiffness * gap.square().mean() / 2)
        assert metrics["kl"] == pytest.approx(expected) and loss.item() == pytest.approx(0.5 * expected)
        by_hand = 0.5 * stiffness * torch.stack([(gap * z).mean(), gap.mean()])
        assert torch.allclose(torch.autograd.grad(loss, prox.theta)[0], by_hand)
    assert reference.theta.grad is None


def test_the_reference_costs_nothing_when_it_is_not_used():
    algo, reference = algorithm(), Linear(*OLD)
    batch = rollout(algo.actions)
    assert all("kl" not in m for _, m in algo.losses(Linear(*OLD), reference, [batch], algo.actions))
    assert reference.calls == 0
    assert all("kl" not in m for _, m in algorithm(kl_coef=0.5).losses(Linear(*OLD), None, [batch], algo.actions))


def test_losses_are_lazy_and_one_for_each_micro_batch_and_step():
    algo, prox = algorithm(), Linear(*OLD)
    window = algo.actions[1:4]
    losses = algo.losses(prox, None, [rollout(window, seed=i) for i in range(2)], window)
    assert prox.calls == 0
    for count in range(1, 7):
        next(losses)
        assert prox.calls == count
    assert next(losses, None) is None


def test_every_step_is_asked_at_its_own_time():
    algo, asked = algorithm(), []

    def prox(z, t, lam, text):
        asked.append((t, lam))
        return z

    window = [algo.actions[i] for i in (0, 3)]
    list(algo.losses(prox, None, [rollout(window)], window))
    assert asked == [(STEPS[i].t, STEPS[i].lam) for i in (0, 3)]


@pytest.mark.parametrize("deviation", [2e-6, 0.5, NAN])
def test_a_first_ratio_off_one_stops_in_plain_words(deviation):
    algo = algorithm(first_ratio_tolerance=1e-6)
    with pytest.raises(
        AlgorithmStopped,
        match=r"ratio is off 1 by .* \(grpo.first_ratio_tolerance = 1e-06\).*"
        "set model.precision=float32",
    ):
        algo.accept({"ratio/first_max_deviation": deviation})
    algo.accept({"ratio/first_max_deviation": 0.0})
    algo.accept({"ratio/first_max_deviation": 1e-6})


# -- the window ---------------------------------------------------------------------------


def test_the_window_is_drawn_anew_for_each_iteration():
    algo = algorithm(trained_steps=2)
    windows = [[action.index for action in algo.window(i)] for i in range(60)]
    assert windows == [[action.index for action in algorithm(trained_steps=2).window(i)] for i in range(60)]
    assert all(len(set(w)) == 2 and w == sorted(w) for w in windows)
    assert {tuple(w) for w in windows} == set(itertools.combinations(range(5), 2))
    assert windows != [[action.index for action in algorithm(seed=1, trained_steps=2).window(i)] for i in range(60)]
    assert [a.index for a in algorithm().window(3)] == list(range(5))


# -- requests and their shares ------------------------------------------------------------


def config(**grpo_settings):
    return build_config(
        {
            "rl": {"prompts_per_step": 12, "groups_per_micro_batch": 4, "group_size": 3},
            "grpo": {"trained_steps": 2, **grpo_settings},
            "sampler": {"num_inference_steps": 5},
        }
    )


def test_requests_are_micro_batches_of_whole_groups():
    c = config()
    algo = GRPO(c)
    asked = algo.requests(7)
    indices, prompts = training_prompts(c, 7)
    assert [len(r.prompts) for r in asked] == [4, 4, 4] and all(r.images == 12 for r in asked)
    assert [i for r in asked for i in r.indices] == indices and [p for r in asked for p in r.prompts] == prompts
    window = tuple(action.index for action in algo.window(7))
    assert all((r.purpose, r.step, r.group_size, r.window) == ("train", 7, 3, window) for r in asked)
    assert asked == GRPO(c).requests(7)


def test_build_takes_the_configs_plan():
    algo = GRPO(config())
    assert [a.step for a in algo.actions] == plan(VPSchedule(), "hybrid", 5, 0.8)[:-1]
    assert algo.rl.group_size == 3


def test_bytes_of_a_micro_batch():
    sizes = [GRPO(config(trained_steps=k)).bytes_per_micro_batch() for k in (2, None)]
    chain = 3 * 32 * 32 * 4 * 3  # z, z_next and prox of one image at one step
    assert sizes == [12 * (3 * 32 * 32 + k * chain) for k in (2, 4)]


@pytest.mark.parametrize("count, updates", [(8, 1), (8, 2), (24, 3), (12, 1)])
def test_shares_cover_every_micro_batch_once_and_updates_do_not_depend_on_the_world(count, updates):
    blocks = None
    for world in (w for w in range(1, count + 1) if count % (updates * w) == 0):
        shares = [[list(share(count, updates, world, u, r)) for r in range(world)] for u in range(updates)]
        assert sorted(j for ranks in shares for mine in ranks for j in mine) == list(range(count))
        assert len({len(mine) for ranks in shares for mine in ranks}) == 1
        union = [sorted(j for mine in ranks for j in mine) for ranks in shares]
        blocks = blocks or union
        assert union == blocks


def test_learning_rate_warms_up_holds_and_falls():
    lr = algorithm(lr=1.0, warmup_steps=5, decay_from=0.5).lr
    total = RL().steps
    assert lr(0) == pytest.approx(0.2) and lr(4) == lr(total // 2) == pytest.approx(1.0)
    assert lr(total) == pytest.approx(0.05) and lr(total * 3 // 4) == pytest.approx(1 - 0.95 / 2, abs=0.02)
    assert algorithm(lr=1.0, warmup_steps=0).lr(total - 1) == 1.0


# -- the last step's reward gradient ------------------------------------------------------


def test_the_last_step_climbs_the_reward_through_the_prox_and_leaves_the_policys_losses_as_they_were():
    plain, with_last = algorithm(steps=3), algorithm(steps=3, last_step_weight=0.7)
    assert with_last.needs_gradients and not plain.needs_gradients
    assert with_last.losses_per_update(1)["policy"] == plain.micro_batches(1) * 3
    assert all(r.keep_last for r in with_last.requests(0)) and not any(r.keep_last for r in plain.requests(0))
    scorer = Quadratic(2.0, 0.3)
    with_last.parts = SimpleNamespace(gradients=RewardGradients({"q": (scorer, 1.5)}, normalize=False))
    batch = rollout(plain.actions)
    batch.prompts, batch.z_last = ("p",) * 24, batch.z_next[-1] / 4
    prox = Linear(*OLD)
    ours = gradient(with_last.losses(prox, None, [batch], with_last.actions), prox)
    policy_part = gradient(plain.losses(prox, None, [batch], plain.actions), prox)
    x = prox(batch.z_last, 0.0, 0.1, None)
    pixels = ((x + 1) / 2).clamp(0, 1)
    reward = -scorer.gain / 2 * (pixels - scorer.goal).square().flatten(1).mean(1)
    reward_part = torch.autograd.grad(-0.7 * 1.5 * reward.mean(), prox.theta)[0]
    torch.testing.assert_close(ours, policy_part + reward_part, rtol=1e-5, atol=1e-8)


# -- guards -------------------------------------------------------------------------------


def test_the_first_updates_log_ratio_is_told_for_each_step():
    algo, prox = algorithm(), Linear(OLD[0] + 0.01, OLD[1])
    window = [algo.actions[i] for i in (0, 3)]
    told = [metrics for _, metrics in algo.losses(prox, None, [rollout(window)], window, first=True)]
    assert [next(k for k in m if k.startswith("ratio/first_max/")) for m in told] == [
        "ratio/first_max/0",
        "ratio/first_max/3",
    ]
    assert all(m[f"ratio/first_max/{i}"] == m["ratio/max_log"] > 0 for m, i in zip(told, (0, 3)))
    same = [m for _, m in algo.losses(Linear(*OLD), None, [rollout(window)], window, first=True)]
    assert [m["ratio/first_max/0"] for m in same[:1]] == [0.0] and same[1]["ratio/max_log"] == 0.0
    assert not any("first" in key for _, m in algo.losses(prox, None, [rollout(window)], window) for key in m)


def test_a_sample_that_was_no_image_has_no_ratio_and_no_gradient():
    algo = algorithm()
    batch = rollout(algo.actions)
    finite = torch.ones(24, dtype=torch.bool)
    finite[5] = False
    for tensor in (batch.z, batch.z_next, batch.prox):
        tensor[:, 5] = 0
    batch.weight[5] = 0
    prox = Linear(OLD[0], OLD[1])
    without = replace(batch, finite=finite)
    told = [m for _, m in algo.losses(prox, None, [without], algo.actions)]
    assert max(m["ratio/max_deviation"] for m in told) == 0.0
    assert max(m["ratio/max_log"] for _, m in algo.losses(prox, None, [batch], algo.actions)) > 0
    assert torch.isfinite(gradient(algo.losses(prox, None, [without], algo.actions), prox)).all()
