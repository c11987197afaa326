import pytest
import torch

from fixtures.closed_form import Gaussian, alpha_bar
from fixtures.score import ScoreModel
from rlproxi.models.text import TextStates
from rlproxi.models.transformer import ProximalTransformer
from rlproxi.models.unet import ProximalUNet, Subpixels
from rlproxi.proximal.operator import ProximalOperator


def text(batch: int, length: int = 5, dim: int = 16) -> TextStates:
    mask = torch.ones(batch, length)
    mask[:, -2:] = 0
    return TextStates(torch.randn(batch, length, dim), torch.randn(batch, dim), mask)


def network(randomise: bool = False, kind: str = "unet", **options) -> ProximalUNet | ProximalTransformer:
    torch.manual_seed(0)
    if kind == "transformer":
        model = ProximalTransformer(
            sample_size=8, in_channels=3, layers=2, heads=2, head_dim=8, text_dim=16, data_std=0.5, **options
        )
    else:
        model = ProximalUNet(
            sample_size=8, channels=(32, 32), blocks=(1, 1), text_dim=16, pooled_dim=16, data_std=0.5, **options
        )
    if randomise:  # the zero-initialised layers too, so that every path matters
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


Y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.0, 0.1, 0.5, 0.9])
LAM = torch.tensor([0.01, 1.0, 0.3, 2.0])
both_kinds = pytest.mark.parametrize("kind", ["unet", "transformer"])


@both_kinds
@torch.no_grad()
def test_zero_head_is_the_exact_gaussian_prox(kind):
    model, target = network(kind=kind), Gaussian(0.0, 0.5)
    v = target.marginal(T)[1][:, None, None, None]
    lam = LAM[:, None, None, None]
    assert torch.allclose(model(Y, T, LAM, text(4)), lam.sqrt() * Y / (v + lam), atol=1e-6)
    out = ProximalOperator(model)(Y, 0.3, 0.7, text(4))
    assert torch.allclose(out, target.prox(Y, 0.3, 0.7), atol=1e-6)


@both_kinds
@torch.no_grad()
def test_the_networks_share_is_what_y_leaves_open_of_its_target(kind):
    """N(0, 0.25 I): F's factor is the deviation of n2, or of E[n2 | y, x0], about its mean given y.

    F = 0 stays the Gaussian's prox.
    """
    ab = alpha_bar(T)
    total = 0.25 * ab + 1 - ab + LAM
    left = {"noise": 1 - LAM / total, "expected": LAM * ab * 0.25 / ((1 - ab + LAM) * total)}
    for target, variance in left.items():
        model = network(kind=kind, target=target)
        prox = model(Y, T, LAM, text(4))
        assert torch.allclose(prox, LAM.sqrt()[:, None, None, None] * Y / total[:, None, None, None], atol=1e-6)
        model.network = lambda x, t, lam, cond: torch.ones_like(Y)
        share = model(Y, T, LAM, text(4)) - prox
        assert torch.allclose(share, variance.sqrt()[:, None, None, None].expand_as(Y), atol=1e-5)


@both_kinds
@torch.no_grad()
def test_a_network_that_predicts_the_clean_image_gives_its_noise(kind):
    """F = (x_0 - m) / s gives E[n2 | y, x_0], whatever t and lam; s^2 is the largest variance."""
    model, x0 = network(kind=kind, target="clean"), torch.rand_like(Y) - 0.5
    model.network = lambda x, t, lam, cond: x0 / 0.5
    alpha, lam = alpha_bar(T)[:, None, None, None], LAM[:, None, None, None]
    expected = lam.sqrt() * (Y - alpha.sqrt() * x0) / (1 - alpha + lam)
    assert torch.allclose(model(Y, T, LAM, text(4)), expected, atol=1e-5)
    seen = []
    model.network = lambda x, t, lam, cond: (seen.append(x), x0)[1]
    model(Y, T, LAM, text(4))
    total = 0.25 * alpha + 1 - alpha + lam
    assert torch.allclose(seen[0], torch.cat([Y / total.sqrt(), 0.25 * alpha.sqrt() / total * Y], 1), atol=1e-5)


@torch.no_grad()
def test_constant_features_give_constant_pixels():
    torch.manual_seed(0)
    layer = Subpixels(6, 3, 4)
    torch.nn.init.normal_(layer.bias)
    pixels = layer(torch.randn(1, 6, 1, 1).expand(2, 6, 5, 5))[:, :, 4:-4, 4:-4]  # the border sees the padding
    assert pixels.shape == (2, 3, 12, 12)
    assert (pixels - pixels[:, :, :1, :1]).abs().max() < 1e-5
    assert layer(torch.randn(1, 6, 5, 5))[0, 0].std() > 0.01


@torch.no_grad()
def test_a_refined_network_starts_at_the_gaussian_and_keeps_its_shape(tmp_path):
    model = network(target="expected", refine=16)
    assert torch.equal(model(Y, T, LAM, text(4)), network(target="expected")(Y, T, LAM, text(4)))
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    again = ProximalUNet.from_pretrained(tmp_path).eval()
    cond = text(4)
    assert again.config.refine == 16 and torch.allclose(model(Y, T, LAM, cond), again(Y, T, LAM, cond), atol=1e-6)


@both_kinds
@torch.no_grad()
def test_round_trip(kind, tmp_path):
    model, cond = network(True, kind), text(4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.data_std == 0.5 and again.schedule == model.schedule
    assert torch.allclose(model(Y, T, LAM, cond), again(Y, T, LAM, cond), atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values()))
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


@both_kinds
def test_gradient_checkpointing_changes_no_gradient(kind):
    cond, grads = text(4), []
    for checkpointing in (False, True):
        model, calls = network(True, kind), []
        if checkpointing:
            model.enable_gradient_checkpointing()
        block = next(m for m in model.modules() if type(m).__name__ in ("ResBlock", "BasicTransformerBlock"))
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        model(Y, T, LAM, cond).square().mean().backward()
        assert len(calls) == (2 if checkpointing else 1)  # computed again in the backward pass
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads) if a is not None)


@both_kinds
@torch.no_grad()
def test_every_input_matters_and_padding_does_not(kind):
    model, cond = network(True, kind), text(4)
    base = model(Y, T, LAM, cond)
    both = torch.cat([Y, Y.flip(0)], 1)
    plain = model.network(both, T, LAM, cond)
    assert not torch.allclose(plain, model.network(both, T + 0.05, LAM, cond))
    assert not torch.allclose(plain, model.network(both, T, LAM * 2, cond))
    states = cond.states.clone()
    states[:, -2:] += 10.0  # masked tokens
    assert torch.allclose(base, model(Y, T, LAM, TextStates(states, cond.pooled, cond.mask)), atol=1e-5)
    states[:, 0] += 10.0
    assert not torch.allclose(base, model(Y, T, LAM, TextStates(states, cond.pooled, cond.mask)), atol=1e-4)
    assert torch.allclose(base[1:3], model(Y[1:3], T[1:3], LAM[1:3], cond[1:3]), atol=1e-5)


@torch.no_grad()
def test_score_adapter_over_the_unet():
    cond, target = text(4), Gaussian(0.0, 0.5)
    model, told = network(), []
    times = T.clamp(min=0.02)  # at t = 0 there is no noise to estimate
    flat = target.eps(Y.flatten(1), times).reshape_as(Y)
    run = model.network
    model.network = lambda x, t, lam, text: (told.append(lam), run(x, t, lam, text))[1]
    assert torch.allclose(ScoreModel(model)(Y, times, cond), flat, atol=1e-4)
    assert torch.equal(told[0], torch.zeros(4)), "a score model has no lam"
    assert ScoreModel(network(randomise=True))(Y, T, cond).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"refine": 16, "target": "clean"}])
def test_every_parameter_gets_a_gradient(options):
    model = network(randomise=True, **options).train()
    model(Y, T, LAM, text(4)).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_config_is_refused_by_name():
    with pytest.raises(TypeError, match="chanels"):
        ProximalUNet(chanels=(32,))


@torch.no_grad()
def test_fitted_gaussian_is_the_prox_of_its_own_covariance():
    """F = 0 after ``fit``: against the dense formula sqrt(lam) (C + lam I)^-1 (y - sqrt(ab) m)."""
    model, g = network(), torch.Generator().manual_seed(3)
    blur = torch.nn.functional.avg_pool2d(torch.randn(500, 3, 8, 8, generator=g), 3, 1, 1)
    model.gaussian.fit(0.3 + blur + 0.5 * blur[:, [1, 2, 0]])
    fitted = model.gaussian
    eye = torch.eye(192).reshape(192, 3, 8, 8)
    basis = fitted.to_basis(eye).flatten(1)
    assert torch.allclose(basis.T @ basis, torch.eye(192), atol=1e-5)
    assert torch.allclose(fitted.from_basis(fitted.to_basis(Y)), Y, atol=1e-5)
    covariance = basis @ torch.diag(fitted.variance.flatten()) @ basis.T
    for i, (t, lam) in enumerate(zip(T, LAM)):
        ab = model.schedule.alpha_bar(t)
        total = ab * covariance + (1 - ab + lam) * torch.eye(192)
        expected = lam.sqrt() * torch.linalg.solve(total, (Y[i] - ab.sqrt() * fitted.mean).flatten())
        assert torch.allclose(model(Y, T, LAM, text(4))[i].flatten(), expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_a_score_model_is_told_lam_only_where_asked():
    model, cond = ScoreModel(network(randomise=True)), text(4)
    times = T.clamp(min=0.02)
    plain = model(Y, times, cond)
    assert torch.equal(plain, model(Y, times, cond, torch.zeros(4)))
    assert not torch.allclose(plain, model(Y, times, cond, LAM), atol=1e-4)
