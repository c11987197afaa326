import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fixtures import clip as fixtures
from fixtures.clip_models import save_tokenizer, weights
from rlproxi.models.precision import autocast
from rlproxi.rewards import build, checked_params, hpsv2, names, provenance
from rlproxi.rewards.base import to_pixels
from rlproxi.rewards.clip import MEAN, STD, longest_side, pillow_resize, shortest_side
from rlproxi.rewards.clip_text import load_tokens, open_clip_clean
from rlproxi.rewards.open_clip import clip_model, load_open_clip, open_clip_config, open_clip_to_transformers

# -- images -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new",
    [
        ((60, 100), (30, 50)),
        ((37, 91), (64, 40)),
        ((50, 50), (113, 113)),
        ((40, 64), (40, 33)),
        ((48, 20), (17, 20)),
        ((1, 9), (5, 3)),
    ],
)
def test_the_eight_bit_resize_is_pillows(old, new):
    image = np.random.default_rng(sum(old)).integers(0, 256, (*old, 3), np.uint8)
    image[: old[0] // 2, : old[1] // 2] = 255 * (np.indices((old[0] // 2, old[1] // 2)).sum(0) % 2)[..., None]
    theirs = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BICUBIC))
    ours = pillow_resize(to_pixels(image[None]), *new)[0].permute(1, 2, 0) * 255
    assert np.array_equal(ours.round().numpy().astype(np.uint8), theirs)


def test_the_gradient_passes_the_rounding_unchanged():
    x = torch.rand(1, 3, 40, 60, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 3, 25, 31, dtype=torch.float64)
    (rounded,) = torch.autograd.grad(pillow_resize(x, 25, 31), x, upstream)
    (smooth,) = torch.autograd.grad(F.interpolate(x, (25, 31), mode="bicubic", antialias=True), x, upstream)
    assert (rounded - smooth).abs().max() < 1e-5 < smooth.abs().max()


def test_the_smooth_resize_is_half_a_step_away():
    x = to_pixels(fixtures.image("photo")[None])
    apart = (shortest_side(x, eight_bit=False) - shortest_side(x)).abs() * 255 * torch.tensor(STD)[:, None, None]
    inside = (
        shortest_side(x, eight_bit=False) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    ).sub(0.5).abs() < 0.48  # overshoots are cut by 8 bits
    assert apart[inside].max() < 1.6 and 0.1 < apart[inside].mean() < 0.5


@pytest.mark.parametrize(
    "height, width, box",
    [
        (100, 100, (0, 0, 224, 224)),
        (50, 100, (56, 0, 112, 224)),
        (300, 200, (0, 37, 224, 149)),
        (224, 99, (0, 62, 224, 99)),
        (1000, 3, (0, 111, 224, 1)),
    ],
)
def test_the_longest_side_fills_the_square_and_the_rest_is_black(height, width, box):
    grey = torch.full((2, 3, height, width), 0.6)
    out = longest_side(grey)
    assert out.shape == (2, 3, 224, 224)
    top, left, h, w = box
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    expected = (-mean / std).expand(3, 224, 224).clone()
    expected[:, top : top + h, left : left + w] = (0.6 - mean) / std
    assert (out - expected).abs().max() < 1e-5


def test_antialias_is_what_tells_old_from_new_torchvision():
    x = to_pixels(fixtures.image("photo")[None])
    old, new = longest_side(x, antialias=False), longest_side(x)
    assert (old - new).abs().max() > 1
    assert torch.equal(longest_side(x[..., :200, :200], antialias=False).isfinite(), torch.ones(1, 3, 224, 224) > 0)


def test_the_middle_is_kept():
    x = torch.zeros(1, 3, 224, 301)
    x[..., 38:262] = 1  # 77 columns are too many: 38 are cut on the left
    white = ((1 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None]
    assert torch.allclose(shortest_side(x, crop_down=True)[0], white.expand(3, 224, 224), atol=1e-6)
    x = torch.zeros(1, 3, 224, 227)
    x[..., 2:226] = 1  # openai/CLIP rounds 1.5 to 2, transformers to 1
    assert torch.allclose(shortest_side(x)[0], white.expand(3, 224, 224), atol=1e-6)
    assert shortest_side(x, crop_down=True)[0, 0, 0, 0] < 0


# -- text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, clean",
    [
        ("  Two\n\tWORDS ", "two words"),
        ("a &amp;amp; b", "a & b"),
        ("it\u2019s \u201cso\u201d", 'it\'s "so"'),
        ("o\ufb03ce \uff21\u3000b", "office a b"),
        ("cafe\u0301\x00", "caf\u00e9"),
        ("", ""),
    ],
)
def test_cleaning(text, clean):
    assert open_clip_clean(text) == clean


def test_a_prompt_is_framed_padded_and_cut(files):
    tokens = load_tokens(files["hpsv2"]["tokenizer"])
    start, end = fixtures.VOCABULARY - 2, fixtures.VOCABULARY - 1
    short, empty, long = tokens(["a", "", "b " * 200])
    assert short[[0, 2]].tolist() == [start, end] and not short[3:].any()
    assert empty[:2].tolist() == [start, end] and not empty[2:].any()
    assert long[-1] == end and long[0] == start and len(set(long[1:-1].tolist())) == 1


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "words.txt").write_text("heading\nthree of them\n")
    with pytest.raises(ValueError, match="words.txt' is not in the format.*line 2 is 'three of them'"):
        load_tokens(str(tmp_path / "words.txt"))
    (tmp_path / "broken.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="broken.txt.gz' is no readable list of merges"):
        load_tokens(str(tmp_path / "broken.txt.gz"))
    with pytest.raises(FileNotFoundError, match="tokenizer '.*nothing here' is no folder"):
        load_tokens(str(tmp_path / "nothing here"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no tokenizer"):
        load_tokens(str(tmp_path / "empty"))


# -- open_clip's names --------------------------------------------------------------------


def test_every_weight_of_vit_h_14_finds_its_place():
    """The published network, key by key and shape by shape, without its 4 GB."""
    from transformers import CLIPModel

    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in fixtures.open_clip_layout(fixtures.VIT_H_14).items()}
        config, renamed = open_clip_to_transformers(state)
        model = CLIPModel(config)
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(value.numel() for value in renamed.values()) == 986_109_441
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.patch_size, vision.image_size, vision.intermediate_size) == (14, 224, 5120)
    assert vision.hidden_act == text.hidden_act == "gelu"
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (text.vocab_size, text.max_position_embeddings) == (49408, 77)
    assert (text.eos_token_id, config.projection_dim) == (49407, 1024)


@pytest.mark.parametrize("width, patch, heads", [(768, 32, 12), (1024, 14, 16), (1408, 14, 16), (1664, 14, 16)])
def test_heads_of_the_other_published_towers(width, patch, heads):
    config = {**fixtures.TINY, "vision_cfg": {**fixtures.TINY["vision_cfg"], "width": width, "patch_size": patch}}
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in fixtures.open_clip_layout(config).items()}
    assert open_clip_config(state).vision_config.num_attention_heads == heads
    assert open_clip_config(state, {"vision_cfg": {"head_width": 32}}).vision_config.num_attention_heads == width // 32


def test_a_checkpoint_that_does_not_fit_says_where(tmp_path):
    whole = weights(fixtures.open_clip_layout(fixtures.TINY))

    def load(changes: dict, dropped: str = "nothing"):
        state = {k: v for k, v in {**whole, **changes}.items() if dropped not in k}
        torch.save({"state_dict": state}, tmp_path / "bad.pt")
        return load_open_clip(tmp_path / "bad.pt")

    with pytest.raises(ValueError, match=r"bad.pt does not fit.*missing: .*ln_post.*and 0|missing: .*post_layernorm"):
        load({}, "visual.ln_post")
    with pytest.raises(ValueError, match="unexpected: score_predictor.layers.0.weight"):
        load({"score_predictor.layers.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"other shape: text_model.final_layer_norm.bias is \(3,\), not \(128,\)"):
        load({"ln_final.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="no open_clip checkpoint of a ViT: 'visual.conv1.weight' is missing"):
        load({}, "visual.conv1")
    torch.save(whole, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="bare.pt has no key 'state_dict' with tensors; it holds"):
        load_open_clip(tmp_path / "bare.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="pointer.pt is not a torch checkpoint"):
        load_open_clip(tmp_path / "pointer.pt")


def test_half_precision_checkpoints_load_as_float32(tmp_path):
    state = {key: value.half() for key, value in weights(fixtures.open_clip_layout(fixtures.TINY)).items()}
    torch.save({"state_dict": state}, tmp_path / "half.pt")
    model = load_open_clip(tmp_path / "half.pt")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])


# -- the scorers --------------------------------------------------------------------------


def test_they_are_registered_and_typed(files):
    assert {"hpsv2", "hpsv2.0", "hpsv2.1", "clip", "pickscore", "aesthetic"} <= set(names())
    assert hpsv2.HPSv20.FILE == "HPS_v2_compressed.pt" and hpsv2.HPSv21.FILE == "HPS_v2.1_compressed.pt"
    assert checked_params("hpsv2.1", {"checkpoint": "x", "micro_batch": 4}) == {"checkpoint": "x", "micro_batch": 4}
    with pytest.raises(ValueError, match="it takes no 'chekpoint', did you mean 'checkpoint'"):
        checked_params("hpsv2", {"chekpoint": "x"})
    with pytest.raises(ValueError, match="'predictor' is missing"):
        checked_params("aesthetic", {})


def test_provenance_hashes_the_checkpoint(files):
    facts = provenance(build("hpsv2.0", files["hpsv2.0"]))
    assert facts["class"].endswith("HPSv20") and len(facts[files["hpsv2"]["checkpoint"]]) == 64
    assert any(key.endswith("model.safetensors") for key in provenance(build("pickscore", files["pickscore"])))
    assert len(provenance(build("aesthetic", files["aesthetic"]))) == 3


@pytest.mark.parametrize("name", ["hpsv2.1", "clip", "pickscore", "aesthetic"])
def test_batches_change_nothing(name, files):
    scorer = build(name, {**files[name], "micro_batch": 3})
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 48, 3), np.uint8)
    prompts = [fixtures.PROMPTS[i] for i in (0, 1, 0, 2)]
    together = scorer.score(images, prompts)
    alone = [scorer.score(images[i : i + 1], prompts[i : i + 1])[0] for i in range(4)]
    assert together.dtype == np.float32 and together.shape == (4,)
    assert together == pytest.approx(alone, abs=2e-5 * max(1.0, float(np.abs(alone).max())))
    assert len(set(together.round(4).tolist())) > 1


def test_a_prompt_is_encoded_once(files):
    scorer = build("hpsv2.1", files["hpsv2.1"])
    rows = []
    scorer.model.text_projection.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    features = scorer.text_features(["a", "b", "a", "a"])
    assert rows == [2] and torch.equal(features[0], features[3]) and not torch.equal(features[0], features[1])
    with pytest.raises(ValueError, match="2 images came with 1 prompts"):
        scorer.rewards(torch.rand(2, 3, 32, 32), ["a"])


@pytest.mark.parametrize("name", ["hpsv2.1", "clip", "pickscore", "aesthetic"])
def test_the_gradient_is_that_of_the_score(name, files):
    """The directional derivative against central differences in float64, on an image that is resized."""
    smooth = {} if name == "hpsv2.1" else {"eight_bit": False}
    scorer = build(name, {**files[name], **smooth, **({"clamp": False} if name == "clip" else {})})
    scorer.model.double()
    if name == "aesthetic":
        scorer.head.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 48, 80, generator=generator, dtype=torch.float64).requires_grad_()
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    prompts = [fixtures.PROMPTS[0], fixtures.PROMPTS[2]]
    values = scorer.rewards(x, prompts)
    assert values.dtype is torch.float64 and values.shape == (2,)
    for i in range(2):
        (gradient,) = torch.autograd.grad(values[i], x, retain_graph=True)
        assert not gradient[1 - i].any()  # an image's reward is its own
        step = 1e-5
        with torch.no_grad():
            ahead, behind = (scorer.rewards(x + s * direction, prompts)[i] for s in (step, -step))
        assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["pickscore", "clip", "aesthetic"])
def test_the_rounded_gradient_points_where_the_smooth_one_does(name, files):
    x = to_pixels(fixtures.image("wide")[None]).requires_grad_()
    prompts = [fixtures.PROMPTS[3]]
    ours, smooth = (
        torch.autograd.grad(build(name, {**files[name], "eight_bit": e}).rewards(x, prompts).sum(), x)[0]
        for e in (True, False)
    )
    assert smooth.abs().max() > 0 and F.cosine_similarity(ours.flatten(), smooth.flatten(), 0) > 0.98


@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore", "aesthetic"])
def test_bfloat16_is_autocast_in_half_the_memory(name, files):
    exact, fast = (build(name, {**files[name], "precision": p}) for p in ("float32", "bfloat16"))
    images, prompts = fixtures.image("small")[None], [fixtures.PROMPTS[0]]
    half = fast.score(images, prompts)
    assert half.dtype == np.float32
    scale = 100 if name == "pickscore" else 1
    assert 0 < abs(half - exact.score(images, prompts))[0] < 0.02 * scale
    linear = fast.model.visual_projection
    assert linear.weight.dtype is torch.bfloat16 and fast.model.vision_model.pre_layrnorm.weight.dtype is torch.float32
    exact.dtype = torch.bfloat16  # the same weights, cast by autocast at each call
    assert np.array_equal(exact.score(images, prompts), half)


def test_features_are_normalised_outside_autocast(files):
    scorer = build("hpsv2.1", {**files["hpsv2.1"], "precision": "bfloat16"})
    images = longest_side(to_pixels(fixtures.image("small")[None]))
    for features in (scorer.image_features(images), scorer.text_features(["a"])):
        assert features.dtype is torch.float32
        assert features.norm(dim=-1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["hpsv2.1", "clip", "pickscore", "aesthetic"])
def test_a_callers_autocast_changes_nothing(name, files):
    scorer = build(name, files[name])
    image, prompts = to_pixels(fixtures.image("small")[None]), [fixtures.PROMPTS[1]]
    with autocast(torch.bfloat16, "cpu"):
        inside = scorer.rewards(image, prompts)
    assert torch.equal(inside, scorer.rewards(image, prompts)) and inside.dtype is torch.float32


def test_clip_score_can_be_scaled_and_left_unclamped(files):
    x, prompts = to_pixels(fixtures.image("square")[None]), [fixtures.PROMPTS[0]]
    plain, cut = (build("clip", {**files["clip"], "scale": 2.5, "clamp": c}).rewards(x, prompts) for c in (False, True))
    hundred = build("clip", {**files["clip"], "clamp": False}).rewards(x, prompts)
    assert plain.item() < 0 == cut.item() and hundred.item() == pytest.approx(40 * plain.item(), rel=1e-5)


# -- files --------------------------------------------------------------------------------


def test_missing_files_are_named_with_what_to_do(files, tmp_path):
    gone = str(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match="gone.pt' is no file; leave it out to download HPS_v2.1_compressed.pt"):
        build("hpsv2.1", {**files["hpsv2.1"], "checkpoint": gone})
    with pytest.raises(FileNotFoundError, match="predictor '.*gone.pt' is no file; it is sac"):
        build("aesthetic", {**files["aesthetic"], "predictor": gone})
    with pytest.raises(FileNotFoundError, match="clip '.*gone.pt' is no folder"):
        build("pickscore", {**files["pickscore"], "clip": gone})


def test_a_folder_of_pickled_weights_loads_too(files, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(files["clip"]["clip"])
    folder = save_tokenizer(tmp_path / "bin")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    scorers = build("clip", files["clip"]), build("clip", {**files["clip"], "clip": str(folder)})
    image, prompt = fixtures.image("small")[None], [fixtures.PROMPTS[1]]
    assert scorers[1].score(image, prompt) == pytest.approx(scorers[0].score(image, prompt), abs=1e-4)
    assert [file.name for file in scorers[1].files] == ["pytorch_model.bin"]
    state = {key: value for key, value in model.state_dict().items() if "visual_projection" not in key}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks 1 of CLIP's weights, first 'visual_projection.weight'"):
        build("clip", {**files["clip"], "clip": str(folder)})
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds no CLIP that transformers can load"):
        build("clip", {**files["clip"], "clip": str(folder)})


def test_another_predictor_or_another_clip_is_refused(files, tmp_path):
    state = torch.load(files["aesthetic"]["predictor"], weights_only=True)
    torch.save({**state, "layers.8.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="more.pth does not fit the 768.* predictor; unexpected: 8.weight"):
        build("aesthetic", {**files["aesthetic"], "predictor": str(tmp_path / "more.pth")})
    (tmp_path / "text.pth").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="text.pth is not a torch checkpoint"):
        build("aesthetic", {**files["aesthetic"], "predictor": str(tmp_path / "text.pth")})
    with pytest.raises(ValueError, match="has 48 features; the predictor takes the 768"):
        build("aesthetic", {**files["aesthetic"], "clip": files["clip"]["clip"]})


def test_the_same_network_scores_the_same_in_both_formats(files, tmp_path):
    """HPSv2's weights, saved as a transformers folder, give PickScore's cosine of the same pre-processed image."""
    state = weights(fixtures.open_clip_layout(fixtures.TINY))
    clip_model(*open_clip_to_transformers(state), "tiny").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    image, prompt = fixtures.image("exact")[None], ["a photo of a cat"]  # nothing to resize, pad or clean
    hps = build("hpsv2.1", files["hpsv2.1"]).score(image, prompt)
    folder = {"clip": str(tmp_path), "tokenizer": str(tmp_path)}
    pick = build("pickscore", {**files["pickscore"], **folder}).score(image, prompt)
    assert pick[0] / 100 == pytest.approx(hps[0], abs=1e-5)
