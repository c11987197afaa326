import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crosscheck import imagereward as authors
from torch import nn

from rlproxi.rewards import build, checked_params, provenance
from rlproxi.rewards.base import to_pixels
from rlproxi.rewards.blip import Sizes, load_network, network_from, renamed
from rlproxi.rewards.clip import normalise, shortest_side
from rlproxi.rewards.imagereward import MEAN, STD

PICTURES = list(authors.images().values())
PROMPTS = authors.PROMPTS


@pytest.fixture(scope="module")
def golden() -> dict:
    with np.load(authors.GOLDEN, allow_pickle=False) as stored:
        values = {name: stored[name] for name in stored.files}
    return values | json.loads(str(values.pop("facts")))


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    weights = authors.weights(authors.published_shapes(authors.TINY))
    return {name: torch.from_numpy(value) for name, value in weights.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawn) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(drawn, path / "ImageReward.pt")
    (path / "vocab.txt").write_text("\n".join(authors.WORDS) + "\n")
    return path


def made(folder: Path, **options):
    return build(
        "imagereward",
        {
            "checkpoint": str(folder / "ImageReward.pt"),
            "tokenizer": str(folder),
            "precision": "float32",
            "device": "cpu",
            **options,
        },
    )


@pytest.fixture(scope="module")
def scorer(folder):
    return made(folder)


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """As _unrounded of the cross-check: resized without rounding, cut at 0 and 1 after each axis."""
    return torch.cat([unrounded(to_pixels(picture[None])) for picture in PICTURES])


def unrounded(pixels: torch.Tensor) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    short = min(height, width)
    target = [224 * side // short for side in (height, width)]
    for shape in ((height, target[1]), target):
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (round((side - 224) / 2) for side in pixels.shape[-2:])
    return normalise(pixels[..., top : top + 224, left : left + 224])


def assert_close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float) -> None:
    """The largest difference, as a share of the largest value."""
    theirs = torch.from_numpy(np.asarray(theirs, np.float32))
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


# -- the checkpoint ------------------------------------------------------------------------


def test_the_listed_names_are_those_of_the_authors_model(golden):
    tiny, whole = authors.published_shapes(authors.TINY), authors.published_shapes(authors.PUBLISHED)
    assert {name: list(shape) for name, shape in tiny.items()} == golden["tiny_keys"]
    assert len(whole) == golden["published_count"] and authors.digest(whole) == golden["published_digest"]


def test_the_published_checkpoint_fits_every_weight():
    shapes = authors.published_shapes(authors.PUBLISHED)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = network_from(weights)
    assert network.sizes == Sizes(**authors.PUBLISHED)
    ours = {name: value.shape for name, value in network.state_dict().items() if not name.endswith("position_ids")}
    assert {name: value.shape for name, value in renamed(weights).items()} == ours
    assert network.vision.config.num_attention_heads == 16 and network.text.config.num_attention_heads == 12
    epsilons = {
        tower: {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)}
        for tower in (network.vision, network.text)
    }
    assert epsilons == {network.vision: {1e-6}, network.text: {1e-12}}
    # The figure that docs/rewards/imagereward.md computes memory from.
    assert sum(value.numel() for value in network.parameters()) == PARAMETERS


def test_every_weight_arrives_where_it_belongs(drawn):
    network, found = network_from(drawn), renamed(drawn)
    for name, value in network.named_parameters():
        assert torch.equal(value, found[name]), name
    assert torch.equal(network.text.embeddings.position_ids[0], torch.arange(authors.TINY["positions"]))
    query, key, value = network.vision.encoder.layers[1].self_attn.qkv.weight.chunk(3)
    assert torch.equal(torch.cat([query, key, value]), drawn["blip.visual_encoder.blocks.1.attn.qkv.weight"])


def test_what_the_reward_does_not_use_is_ignored(drawn):
    network_from({**drawn, "blip.queue": torch.zeros(2), "blip.visual_encoder_m.norm.weight": torch.zeros(2)})
    network_from({name: value for name, value in drawn.items() if "_proj." not in name and "position_ids" not in name})


def test_weights_that_do_not_fit_are_named(drawn, tmp_path):
    eye, head, none = "blip.visual_encoder.", "mlp.layers.", torch.zeros
    for change, told in (
        ({head + "6.bias": None}, "does not fit ImageReward's network; missing: head.6.bias"),
        ({eye + "extra.weight": none(2)}, "unexpected: vision.extra.weight"),
        ({head + "7.bias": none(3)}, r"other shape: head.7.bias is \(3,\), not \(1,\)"),
        ({eye + "pos_embed": None}, "has no weight 'blip.visual_encoder.pos_embed'"),
        ({eye + "pos_embed": none(1, 48, 192)}, "48 positions"),
        ({eye + "patch_embed.proj.weight": none(100, 3, 2, 2)}, "100 wide"),
    ):
        weights = {name: value for name, value in (drawn | change).items() if value is not None}
        torch.save(weights, tmp_path / "ImageReward.pt")
        with pytest.raises(ValueError, match=told) as raised:
            load_network(tmp_path / "ImageReward.pt")
        assert str(tmp_path / "ImageReward.pt") in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    file = tmp_path / "ImageReward.pt"
    file.write_bytes(content) if content is not None else torch.save({"model": {}}, file)
    with pytest.raises(ValueError, match="ImageReward.pt"):
        load_network(file)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        build("imagereward", {"checkpoint": str(tmp_path / "none.pt"), "tokenizer": str(folder)})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build("imagereward", {"checkpoint": str(folder / "ImageReward.pt"), "tokenizer": str(tmp_path / "nowhere")})


def test_without_a_checkpoint_or_a_network_the_repository_is_named(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="THUDM/ImageReward"):
        build("imagereward", {"tokenizer": str(folder)})


@pytest.mark.parametrize("words, told", [(authors.WORDS[:-1], "has 42 tokens"), (None, "tokenizer")])
def test_another_vocabulary_is_refused(words, told, folder, tmp_path):
    if words:
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(ValueError, match=told):
        made(folder, tokenizer=str(tmp_path))


def test_parameters_are_checked(folder, scorer):
    assert checked_params("imagereward", {"checkpoint": "a.pt", "micro_batch": "8"})["micro_batch"] == 8
    with pytest.raises(ValueError, match="did you mean 'checkpoint'"):
        checked_params("imagereward", {"checkpoints": "a.pt"})
    assert len(provenance(scorer)[str(folder / "ImageReward.pt")]) == 64


# -- the authors' values -------------------------------------------------------------------


def test_tokens_are_the_authors(scorer, golden):
    tokens, mask = scorer.tokens(PROMPTS)
    np.testing.assert_array_equal(tokens, golden["tokens"])
    np.testing.assert_array_equal(mask, golden["mask"])
    assert tokens.shape == (7, 35) and (tokens[:, 0] == authors.WORDS.index("[CLS]")).all()
    assert tokens[2, -1] == authors.WORDS.index("[SEP]") and mask[2].all() and mask[6].sum() == 2
    again, _ = scorer.tokens([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(again, tokens[[1, 0, 1]])


def test_preprocessing_is_the_authors(inputs, golden):
    for i, name in enumerate(authors.IMAGES):
        ours = authors.sample(shortest_side(to_pixels(PICTURES[i][None]))[0].numpy())
        np.testing.assert_allclose(ours, golden["pil"][i], atol=1e-5, err_msg=name)
        # What the features below are made of.
        np.testing.assert_allclose(authors.sample(inputs[i].numpy()), golden["unrounded"][i], atol=2e-6, err_msg=name)


def test_features_and_rewards_are_the_authors(scorer, inputs, golden):
    with torch.no_grad():
        seen = scorer.model.image_features(inputs)
        features = scorer.model(inputs, *scorer.tokens(PROMPTS))
        rewards = (scorer.model.raw_rewards(features) - MEAN) / STD
    assert_close(seen[:, [0, 24, 49]], golden["vision"], 1e-5)
    assert_close(features, golden["text"], 1e-5)
    np.testing.assert_allclose(rewards, golden["rewards"], atol=1e-4)


def test_scores_are_the_authors(scorer, folder, golden):
    """From uint8 images, square, wide and tall, to the score; without rounding, by what that moves this network."""
    ours, smooth = (
        np.concatenate([made.score(picture[None], [text]) for picture, text in zip(PICTURES, PROMPTS)])
        for made in (scorer, made_smooth(folder))
    )
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, golden["pil_rewards"], atol=1e-4)
    np.testing.assert_allclose(smooth, golden["pil_rewards"], atol=0.02)
    assert np.abs(smooth - ours).max() > 1e-3


def made_smooth(folder: Path):
    return made(folder, eight_bit=False)


# -- batches, gradients, precision ---------------------------------------------------------


def test_a_batch_scores_as_its_images_do_alone(folder, scorer):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), np.uint8)
    texts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[6], PROMPTS[3]]
    alone = np.concatenate([scorer.score(pictures[i : i + 1], [texts[i]]) for i in range(5)])
    np.testing.assert_allclose(scorer.score(pictures, texts), alone, atol=1e-5)
    np.testing.assert_allclose(made(folder, micro_batch=2).score(pictures, texts), alone, atol=1e-5)
    assert np.ptp(alone) > 0.05
    with pytest.raises(ValueError, match="5 images came with 4 prompts"):
        scorer.rewards(to_pixels(pictures), texts[:4])


def test_gradient_agrees_with_finite_differences(folder):
    scorer = made_smooth(folder)  # rounding has no gradient to compare with
    scorer.model.double()
    pixels = to_pixels(PICTURES[3][None]).double().clamp(0.02, 0.98).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.rewards(pixels, PROMPTS[:1]).sum(), pixels)
    for direction in (gradient, torch.randn_like(gradient), torch.ones_like(gradient)):
        step = 1e-4 * F.normalize(direction.flatten(), dim=0).view_as(gradient)
        with torch.no_grad():
            ahead, behind = (scorer.rewards(pixels + sign * step, PROMPTS[:1]) for sign in (1, -1))
        torch.testing.assert_close((ahead - behind)[0] / 2, (gradient * step).sum(), rtol=1e-4, atol=0)


def test_an_image_has_the_gradient_of_its_own_reward_alone(scorer):
    pixels = torch.rand(2, 3, 30, 44).requires_grad_()
    rewards = scorer.rewards(pixels, PROMPTS[:2])
    assert rewards.dtype is torch.float32 and rewards.shape == (2,)
    (gradient,) = torch.autograd.grad(rewards[1], pixels)
    assert not gradient[0].any() and gradient[1].abs().max() > 0 and gradient.isfinite().all()
    assert not any(value.requires_grad for value in scorer.model.parameters())


def test_bfloat16_holds_half_the_weights_and_scores_alike(folder, scorer):
    half = made(folder, precision="bfloat16")
    kinds = {name: value.dtype for name, value in half.model.named_parameters()}
    assert (
        kinds["vision.encoder.layers.0.mlp.fc1.weight"]
        is kinds["text.encoder.layer.1.output.dense.bias"]
        is torch.bfloat16
    )
    assert {dtype for name, dtype in kinds.items() if name.startswith("head.") or "norm" in name.lower()} == {
        torch.float32
    }
    pixels = torch.rand(3, 3, 64, 64).requires_grad_()
    exact, close = (s.rewards(pixels, PROMPTS[:3]) for s in (scorer, half))
    assert close.dtype is torch.float32
    torch.testing.assert_close(close, exact, atol=0.1, rtol=0)
    first, second = (torch.autograd.grad(value.sum(), pixels)[0].flatten() for value in (exact, close))
    assert F.cosine_similarity(first, second, dim=0) > 0.97


def test_importing_the_module_leaves_transformers_out():
    import subprocess
    import sys

    code = "import sys, rlproxi.rewards.imagereward; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


#: Both towers and the head, without the two projections of the checkpoint that the reward does not use.
PARAMETERS = 446_206_689
