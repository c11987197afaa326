import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from rlproxi.proximal.policy import actions, kl, log_prob, log_ratio
from rlproxi.proximal.samplers import plan, sample
from rlproxi.proximal.schedule import VPSchedule

SCHEDULE = VPSchedule()


def chain(sampler="hybrid", n=10, batch=6, shape=(2, 3, 3), start=1.0, eta=0.0):
    steps = plan(SCHEDULE, sampler, n, start, eta=eta)
    x = torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = sample(lambda y, t, lam, c: y / (1 + lam) + 0.1, steps, x, keep_chain=True)
    return steps, out


def policy(action, prox):
    return Independent(Normal(action.a * prox, action.s), prox.dim() - 1)


@pytest.mark.parametrize("sampler", ["hybrid", "backward"])
def test_log_ratio_is_the_difference_of_log_densities(sampler):
    steps, out = chain(sampler)
    for action in actions(steps):
        old, z_next = out.prox[action.index], out.z[action.index + 1]
        new = old + 0.05 * torch.randn_like(old)
        exact = policy(action, new).log_prob(z_next) - policy(action, old).log_prob(z_next)
        assert torch.allclose(log_ratio(action, new, old, z_next, "sum"), exact, atol=1e-10, rtol=1e-12)
        assert torch.allclose(log_prob(action, old, z_next), policy(action, old).log_prob(z_next), atol=1e-10)
        assert torch.allclose(log_ratio(action, new, old, z_next), exact / old[0].numel(), atol=1e-10)


@pytest.mark.parametrize("sampler", ["ddim", "matched"])
def test_ddims_policy_is_that_of_x_written_in_z(sampler):
    """x_{k-1} ~ N(alpha' x^ + sigma' sqrt(1 - eta^2) n^, (sigma' eta)^2), the form of Flow-GRPO: densities of x."""
    eta, n, start = 0.7, 6, 0.65
    steps, out = chain(sampler, n, start=start, eta=eta)
    times = SCHEDULE.grid(n, start)
    for action in actions(steps):
        k, i = action.step.k, action.index
        alpha, following = (SCHEDULE.alpha_bar(t) ** 0.5 for t in (times[k], times[k - 1]))
        sigma, left = ((1 - a * a) ** 0.5 for a in (alpha, following))
        z, step = out.z[i], action.step
        x, x_next = z / step.a, out.z[i + 1] / steps[i + 1].a

        def density(prox):
            # ``matched`` is told E[x_{k-1} | x_k], which is alpha' x^ and sigma'^2/lam of what the prox took away.
            clean = prox if sampler == "ddim" else (prox - left**2 / step.lam * (z - prox)) / following
            mean = following * clean + left * (1 - eta**2) ** 0.5 * (x - alpha * clean) / sigma
            return Independent(Normal(mean, left * eta), 3).log_prob(x_next)

        old = out.prox[i]
        new = old + 0.05 * torch.randn_like(old)
        ours = log_ratio(action, new, old, action.free(out.z[i], out.z[i + 1]), "sum")
        assert torch.allclose(ours, density(new) - density(old), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_eulers_policy_is_that_of_x_written_in_z(eta):
    """x_{k-1} ~ N(x + gamma x/2 + gamma (1 + eta^2)/2 score, eta^2 gamma): the reverse SDE, a share of its noise."""
    n, start = 6, 0.65
    steps, out = chain("euler", n, start=start, eta=eta)
    times = SCHEDULE.grid(n, start)
    for action in actions(steps):
        k, i = action.step.k, action.index
        alpha, following = (SCHEDULE.alpha_bar(t) ** 0.5 for t in (times[k], times[k - 1]))
        gamma = SCHEDULE.integral(times[k - 1], times[k])
        x, x_next = alpha * out.z[i], following * out.z[i + 1]

        def density(clean):
            score = (alpha * clean - x) / (1 - alpha**2)
            return Independent(
                Normal(x + gamma * x / 2 + gamma * (1 + eta**2) / 2 * score, eta * gamma**0.5), 3
            ).log_prob(x_next)

        old = out.prox[i]
        new = old + 0.05 * torch.randn_like(old)
        ours = log_ratio(action, new, old, action.free(out.z[i], out.z[i + 1]), "sum")
        assert torch.allclose(ours, density(new) - density(old), atol=1e-9, rtol=1e-9)


def test_the_chain_is_drawn_from_the_policy():
    """a, s of an action are those that made z_{k-1}: the noise recovered from the chain is the noise drawn."""
    steps = plan(SCHEDULE, "backward", 10)
    drawn = {}

    def noise(k, like):
        drawn[k] = torch.randn_like(like)
        return drawn[k]

    out = sample(
        lambda y, t, lam, c: y / (1 + lam), steps, torch.randn(4, 3, dtype=torch.float64), noise=noise, keep_chain=True
    )
    for action in actions(steps):
        recovered = (out.z[action.index + 1] - action.a * out.prox[action.index]) / action.s
        assert torch.allclose(recovered, drawn[action.step.k - 1], atol=1e-10)


def test_exactly_zero_at_equal_weights():
    steps, out = chain()
    for action in actions(steps):
        old, z_next = out.prox[action.index].float(), out.z[action.index + 1].float()
        for reduction in ("mean", "sum"):
            assert torch.equal(log_ratio(action, old, old.clone(), z_next, reduction), torch.zeros(6))
            assert torch.equal(kl(action, old, old.clone(), reduction), torch.zeros(6))


def test_float32_log_ratio_keeps_its_digits():
    """A tiny update of a 3072-dimensional image: subtracting two log densities would lose it in float32."""
    steps, out = chain(shape=(3, 32, 32))
    action = actions(steps)[4]
    old, z_next = out.prox[action.index], out.z[action.index + 1]
    old, z_next = old.float(), z_next.float()
    new = old + 1e-6 * torch.randn_like(old)
    exact = policy(action, new.double()).log_prob(z_next.double()) - policy(action, old.double()).log_prob(
        z_next.double()
    )
    assert torch.allclose(log_ratio(action, new, old, z_next, "sum").double(), exact, atol=1e-7)
    naive = log_prob(action, new, z_next) - log_prob(action, old, z_next)
    assert float((naive.double() - exact).abs().max()) > 1e-5  # what the stable form is for


def test_regulated_is_the_centred_ratio_in_units_of_the_step():
    """s (ln rho - E_old ln rho), and E_old ln rho = -KL(old || new)."""
    steps, out = chain()
    for action in actions(steps):
        old, z_next = out.prox[action.index], out.z[action.index + 1]
        new = old + 0.05 * torch.randn_like(old)
        for reduction in ("mean", "sum"):
            centred = log_ratio(action, new, old, z_next, reduction) + kl(action, old, new, reduction)
            assert torch.allclose(log_ratio(action, new, old, z_next, reduction, regulated=True), action.s * centred)


def test_kl_closed_form_and_monte_carlo():
    steps = plan(SCHEDULE, "hybrid", 10)
    action = actions(steps)[3]
    generator = torch.Generator().manual_seed(5)
    new, ref = torch.randn(2, 1, 3, dtype=torch.float64, generator=generator).mul(0.3).unbind(0)
    exact = kl_divergence(policy(action, new), policy(action, ref))
    assert torch.allclose(kl(action, new, ref, "sum"), exact, atol=1e-12)
    assert torch.allclose(kl(action, new, ref), exact / 3, atol=1e-12)
    count = 200_000
    z = action.a * new + action.s * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    draws = log_ratio(action, new.expand(count, 3), ref.expand(count, 3), z, "sum")  # E_new[ln new/ref]
    assert float(draws.mean()) == pytest.approx(float(exact), abs=5 * float(draws.std()) / math.sqrt(count))


def test_one_action_less_than_steps_and_the_next_steps_coefficients():
    steps = plan(SCHEDULE, "hybrid", 10)
    taken = actions(steps)
    assert len(taken) == 9 and [a.index for a in taken] == list(range(9))
    for i, action in enumerate(taken):
        assert action.step is steps[i] and (action.a, action.s) == (steps[i + 1].a, steps[i + 1].s)


def test_refusals():
    with pytest.raises(ValueError, match="draws no noise"):
        actions(plan(SCHEDULE, "ode", 10))
    with pytest.raises(ValueError, match="sampler.eta above 0"):
        actions(plan(SCHEDULE, "ddim", 10))
    with pytest.raises(ValueError, match="at least 2"):
        actions(plan(SCHEDULE, "hybrid", 1))
