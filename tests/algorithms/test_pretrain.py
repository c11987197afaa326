import math

import numpy as np
import pytest
import torch
from torch import nn

from rlproxi.algorithms.ema import EMA
from rlproxi.algorithms.pretrain import Matching, drop_captions, first_samples, start_denoiser
from rlproxi.config.loading import build_config
from rlproxi.config.sections import Pretrain
from rlproxi.data import faces
from rlproxi.data.faces import collection
from rlproxi.models.loading import build_denoiser
from rlproxi.models.text import TextStates
from rlproxi.proximal.schedule import VPSchedule

SCHEDULE = VPSchedule()


def matching(seed: int = 0, **settings) -> Matching:
    config = build_config({"run": {"seed": seed}, "sampler": {"name": "hybrid", "start_time": 0.8}})
    settings = Pretrain(**{"steps": 100, "candidates": [4, 8], "loss": "matching", "target": "noise", **settings})
    return Matching(config.model_copy(update={"pretrain": settings}))


def numbered(count: int) -> TextStates:
    """Text whose pooled vector is the row's number."""
    rows = torch.arange(count, dtype=torch.float32)[:, None]
    return TextStates(rows[:, None].expand(count, 3, 1), rows, torch.ones(count, 3))


class Recorder:
    """A denoiser that remembers what it was asked and answers with a fixed share of y."""

    def __init__(self, share: float = 0.0):
        self.share, self.calls = share, []

    def __call__(self, y, t, lam, text):
        self.calls.append((y, t, lam, text.pooled[:, 0].tolist()))
        return self.share * y


def values(algorithm: Matching, step: int = 3, rank: int = 0, count: int = 8, share: float = 0.3) -> list[float]:
    images = torch.linspace(-1, 1, count * 3 * 16).reshape(count, 3, 4, 4)
    return [loss.item() for loss, _ in algorithm.losses(Recorder(share), images, numbered(count), step, rank)]


# -- the plan -----------------------------------------------------------------------------


def test_learning_rate_warms_up_holds_and_decays_to_three_percent():
    algorithm = matching(steps=200, warmup_steps=20, decay_from=0.5, lr=2e-3)
    lr = np.array([algorithm.lr(step) for step in range(201)])
    assert lr[:20] == pytest.approx(2e-3 * np.arange(1, 21) / 20)
    assert lr[20:101] == pytest.approx(2e-3)
    assert (np.diff(lr[101:]) < 0).all()
    assert lr[150] == pytest.approx(2e-3 * (0.03 + 0.97 / 2)) and lr[200] == pytest.approx(0.03 * 2e-3)


@pytest.mark.parametrize("settings", [{"warmup_steps": 0}, {"decay_from": 1.0}, {"decay_from": 0.0}, {"steps": 1}])
def test_learning_rate_is_positive_at_every_step_of_any_plan(settings):
    algorithm = matching(lr=1e-3, **settings)
    for step in range(algorithm.settings.steps):
        assert 0 < algorithm.lr(step) <= 1e-3
    if settings.get("warmup_steps") == 0:
        assert algorithm.lr(0) == pytest.approx(1e-3)


def test_l1_first_then_the_zetas_in_equal_phases():
    algorithm = matching(steps=100, l1_fraction=0.4, zetas=[2.0, 1.0, 0.5])
    phases = [algorithm.zeta(step) for step in range(100)]
    assert phases == [None] * 40 + [2.0] * 20 + [1.0] * 20 + [0.5] * 20
    assert all(matching(l1_fraction=1.0).zeta(step) is None for step in range(100))
    assert matching(l1_fraction=0.0, zetas=[]).zeta(50) is None
    assert matching(l1_fraction=0.0, zetas=[2.0, 1.0]).zeta(0) == 2.0
    assert matching(loss="square").zeta(0) == math.inf


# -- the loss -----------------------------------------------------------------------------


def test_losses_are_named_by_seed_step_and_place_in_the_global_batch():
    base = values(matching())
    assert len(base) == 1 and base == values(matching())
    others = [values(matching(seed=1)), values(matching(), step=4), values(matching(), rank=1)]
    assert all(other != base for other in others)
    split = values(matching(micro_batch_size=4))
    assert len(split) == 2 and split == values(matching(micro_batch_size=4)) and split[0] != split[1]


def test_two_ranks_draw_what_one_rank_would():
    algorithm, images, text = matching(micro_batch_size=2), torch.randn(8, 3, 4, 4), numbered(8)
    half = [slice(0, 4), slice(4, 8)]
    one = [loss.item() for loss, _ in algorithm.losses(Recorder(0.3), images, text, 5)]
    two = [
        loss.item()
        for rank, part in enumerate(half)
        for loss, _ in algorithm.losses(Recorder(0.3), images[part], text[part], 5, rank)
    ]
    assert len(one) == 4 and one == two
    captions = [f"c{i}" for i in range(64)]
    parts = [drop_captions(captions[32 * rank : 32 * rank + 32], 0.3, 0, 5, rank) for rank in range(2)]
    assert parts[0] + parts[1] == drop_captions(captions, 0.3, 0, 5) != captions


def test_each_micro_batch_sees_its_own_images_and_captions():
    recorder, algorithm = Recorder(), matching(micro_batch_size=3)
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 3, 4, 4) * 1000
    losses = list(algorithm.losses(recorder, images, numbered(7), 0))
    assert len(losses) == 3 and [len(call[0]) for call in recorder.calls] == [3, 3, 1]
    for y, t, _, rows in recorder.calls:
        signal = y.mean((1, 2, 3)) / (SCHEDULE.alpha_bar(t).sqrt() * 1000)
        assert signal.tolist() == pytest.approx(rows, abs=0.2)
    assert [row for call in recorder.calls for row in call[3]] == list(range(7))


def test_times_come_from_the_samplers_own_grid():
    recorder, algorithm = Recorder(), matching()
    list(algorithm.losses(recorder, torch.zeros(64, 1, 1, 1), numbered(64), 0))
    _, t, lam, _ = recorder.calls[0]
    asked = {(float(np.float32(a)), float(np.float32(b))) for a, b in zip(algorithm.times.t, algorithm.times.lam)}
    drawn = set(zip(t.tolist(), lam.tolist()))
    assert drawn <= asked and len(drawn) > 4


def test_the_target_is_the_noise_that_lam_scales():
    """For x0 = 0, y = sqrt(1 - ab) n1 + sqrt(lam) n2; the best linear guess of n2 is sqrt(lam) y/(1 - ab + lam), whose
    remaining variance is (1 - ab)/(1 - ab + lam). The L1 loss of a Gaussian is sqrt(2/pi) of its std."""
    algorithm = matching(lam_power=0.0)
    expected = []

    def best(y, t, lam, text):
        t, lam = t.reshape(-1, 1, 1, 1), lam.reshape(-1, 1, 1, 1)
        spread = 1 - SCHEDULE.alpha_bar(t)
        expected.append(math.sqrt(2 / math.pi) * float((spread / (spread + lam)).sqrt().mean()))
        return lam.sqrt() * y / (spread + lam)

    ((loss, metrics),) = algorithm.losses(best, torch.zeros(64, 3, 16, 16), numbered(64), 0)
    assert loss.item() == pytest.approx(expected[0], rel=0.02) and metrics["loss"] == loss.item()
    late = matching(l1_fraction=0.0, zetas=[2.0], lam_power=0.0)
    ((loss, _),) = late.losses(Recorder(), torch.zeros(64, 3, 16, 16), numbered(64), 0)
    assert loss.item() == pytest.approx(1 - math.exp(-1 / 4), rel=0.02)  # guess 0: m = E n2^2 = 1, zeta = 2


@pytest.mark.parametrize("loss", ["matching", "square"])
def test_the_expected_target_is_known_where_the_data_are_but_one_image(loss):
    """At x0 = 0, E[n2 | y, x0] = sqrt(lam) y/(1 - ab + lam) follows from y alone, so the best guess above has no error.

    A zeta looks for the mode of n2, which only n2 itself has.
    """
    best = lambda y, t, lam, text: _row(lam).sqrt() * y / (1 - SCHEDULE.alpha_bar(_row(t)) + _row(lam))  # noqa: E731
    first = matching(loss=loss, target="expected", l1_fraction=0.5 if loss == "matching" else 1.0, zetas=[2.0])
    ((found, _),) = first.losses(best, torch.zeros(64, 3, 16, 16), numbered(64), 49)
    assert found.item() < 1e-6
    if loss == "matching":
        losses = [
            next(
                matching(target=target, l1_fraction=0.5, zetas=[2.0]).losses(
                    best, torch.zeros(64, 3, 16, 16), numbered(64), 50
                )
            )
            for target in ("expected", "noise")
        ]
        assert losses[0][0] == losses[1][0] > 0.01


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@pytest.mark.parametrize("target", ["noise", "expected"])
def test_a_new_network_has_the_factor_of_its_target_and_keeps_it(kind, target, tmp_path):
    config = build_config(
        {
            "pretrain": {"target": target},
            "data": {"size": 16},
            "model": {"kind": kind, "channels": [32, 32], "layers": 1, "heads": 2},
        }
    )
    network = build_denoiser(config)
    network.save_pretrained(tmp_path)
    assert network.target == type(network).from_pretrained(tmp_path).target == target


def _row(number: torch.Tensor) -> torch.Tensor:
    return number.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "weight", ["lam", "level"]
)  # which is for the expected noise: of the drawn one it would weigh n1 as well
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_lam_power_weighs_the_draws_around_a_mean_of_one(power, weight):
    """With a loss of sqrt(2/pi) for every draw, what is left is the draws' mean weight."""
    algorithm, recorder = matching(lam_power=power, weight=weight), Recorder()
    scale = (algorithm.times.lam**power * algorithm.times.probability).sum()
    ((loss, _),) = algorithm.losses(recorder, torch.zeros(400, 3, 16, 16), numbered(400), 0)
    weight = recorder.calls[0][2].double().numpy() ** power / scale
    assert loss.item() == pytest.approx(math.sqrt(2 / math.pi) * weight.mean(), rel=0.01)
    assert weight.mean() == pytest.approx(1, abs=5 * weight.std() / 20) and weight.std() > 0.1


@pytest.mark.parametrize("loss, factor", [("matching", 0.5), ("square", 1.0)])
def test_weighed_by_level_the_draws_have_a_mean_of_one_too(loss, factor):
    algorithm = matching(
        loss=loss, target="expected", weight="level", l1_fraction=1.0 if loss == "square" else 0.5, zetas=[2.0]
    )
    t, lam = torch.from_numpy(algorithm.times.t), torch.from_numpy(algorithm.times.lam)
    noise = 1 - SCHEDULE.alpha_bar(t) + lam
    expected = (noise / lam) ** factor * (noise / SCHEDULE.alpha_bar(t)) ** 0.5
    weights = algorithm.weight(t, lam, algorithm.zeta(0))
    assert (weights.numpy() * algorithm.times.probability).sum() == pytest.approx(1)
    assert torch.allclose(weights / weights[0], expected / expected[0], rtol=1e-6)
    if loss == "matching":  # a zeta looks for the mode of n2 itself
        late = algorithm.weight(t, lam, algorithm.zeta(99))
        assert torch.allclose(late / late[0], (lam / lam[0]) ** 0.5) and not torch.allclose(late, weights)


def test_the_start_is_fitted_to_the_data():
    config = build_config({"data": {"size": 16}, "model": {"channels": [32, 32], "text_dim": 32}})
    unet = start_denoiser(config, first_samples(config, None, None))
    images = faces.batch(collection(0, "pretrain"), np.arange(2000, 2300), 16)[0] / 127.5 - 1
    mean = unet.gaussian.mean.permute(1, 2, 0).numpy()
    assert np.abs(mean - images.mean(0)).mean() < 0.03
    variance = unet.gaussian.variance.flatten().sort().values
    assert float(variance[-1] / variance[0]) > 100  # smooth pictures: low frequencies carry far more than high ones
    assert variance[0] >= 1e-4 and not torch.equal(unet.gaussian.colors, torch.eye(3))
    again, plain = start_denoiser(config, first_samples(config, None, None)), build_denoiser(config)
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), again.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), plain.parameters()))


# -- captions and EMA ---------------------------------------------------------------------


def test_captions_are_dropped_at_the_rate_and_by_name():
    captions = [f"c{i}" for i in range(4000)]
    kept = drop_captions(captions, 0.1, seed=0, step=5)
    dropped = [k == "" for k in kept]
    assert all(k in ("", c) for k, c in zip(kept, captions))
    assert np.mean(dropped) == pytest.approx(0.1, abs=5 * (0.09 / 4000) ** 0.5)
    assert kept == drop_captions(captions, 0.1, seed=0, step=5)
    for other in ((1, 5), (0, 6), (0, 5, 1)):
        assert drop_captions(captions, 0.1, *other) != kept
    assert drop_captions(captions, 0.0, 0, 5) == captions
    assert captions[0] == "c0" and "" not in captions


def test_ema_is_the_warmed_up_average():
    module = nn.Linear(2, 1)
    ema, expected = EMA(module, 0.6), {n: p.detach().clone() for n, p in module.named_parameters()}
    for k in range(8):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0 + k)
        decay = min(0.6, (1 + k) / (10 + k))
        expected = {n: decay * expected[n] + (1 - decay) * p.detach() for n, p in module.named_parameters()}
        ema.update(dict(module.named_parameters()))
        assert all(torch.allclose(ema.values[n], expected[n], atol=1e-5) for n in expected)
    assert not any(v.requires_grad for v in ema.values.values())


def test_ema_goes_on_from_its_state():
    module = nn.Linear(3, 2)
    one, two = EMA(module, 0.9), EMA(nn.Linear(3, 2), 0.9)
    for _ in range(3):
        one.update({n: torch.randn_like(p) for n, p in module.named_parameters()})
    two.load_state_dict({n: v.clone() for n, v in one.state_dict().items()})
    weights = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    one.update(weights)
    two.update(weights)
    assert two.updates == 4 and all(torch.equal(one.values[n], two.values[n]) for n in weights)
