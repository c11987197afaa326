import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rlproxi.data import faces
from rlproxi.data.faces import ATTRIBUTES
from rlproxi.rewards import RewardError, TorchScorer, build, checked_params, checked_scores, get, names, register
from rlproxi.rewards.attributes import HEADS, AttributeClassifier, blur, classification_loss
from rlproxi.rewards.registry import SCORERS

PROMPTS = [
    "a smiling person with pale skin",
    "a frowning person on a blue background",
    "a person with a red hat and sunglasses",
]


def pictures(count: int = 3, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


class Answers(nn.Module):
    """A classifier whose logits are known: a fixed linear map of the image's mean colour."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3, sum(HEADS), generator=torch.Generator().manual_seed(1)) * 20

    def forward(self, pixels):
        return pixels.mean((2, 3)) @ self.weight


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "new" / "reward.safetensors"
    torch.manual_seed(3)
    AttributeClassifier(16, 8).save(path)
    return path


def with_answers(name: str, file, **params):
    scorer = build(name, {"path": str(file), **params})
    scorer.model = Answers()
    return scorer


def by_hand(logits: np.ndarray, prompt: str) -> tuple[list[float], list[float]]:
    """(probability of each claimed value, whether it is the most likely one), from the definition."""
    at, probabilities, right = 0, [], []
    for name, values in ATTRIBUTES.items():
        part = np.exp(logits[at : at + len(values)].astype(np.float64))
        at += len(values)
        claim = faces.parse_caption(prompt).get(name)
        if claim is not None:
            probabilities.append(part[values.index(claim)] / part.sum())
            right.append(float(part.argmax() == values.index(claim)))
    return probabilities, right


# -- the registry -------------------------------------------------------------------------


def test_unknown_rewards_are_refused_with_a_suggestion():
    assert {"attributes", "judge", "jpeg", "python"} <= set(names())
    with pytest.raises(ValueError, match=r"'jpegg' is unknown: did you mean jpeg\? choose one of .*attributes, "):
        build("jpegg")
    with pytest.raises(ValueError, match="'zzzzz' is unknown: choose one of "):
        build("zzzzz")


def test_parameters_it_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"reward 'jpeg' cannot be built from params \{'qualty': 3\}.*qualty"):
        build("jpeg", {"qualty": 3})
    with pytest.raises(ValueError, match="reward 'attributes' cannot be built.*path"):
        build("attributes")


def test_a_registered_scorer_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(SCORERS, "_found", dict(SCORERS._found))  # other tests list the scorers

    @register("known-in-one-test")
    class Mine:
        def __init__(self, value=2.0):
            self.value = value

        def score(self, images, prompts):
            return np.full(len(images), self.value)

    assert "known-in-one-test" in names() and get("known-in-one-test") is Mine
    assert build("known-in-one-test", {"value": 3.0}).score(pictures(), PROMPTS).tolist() == [3, 3, 3]


# -- checked_scores -----------------------------------------------------------------------


class Fixed:
    def __init__(self, answer):
        self.answer = answer

    def score(self, images, prompts):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer, words",
    [
        (RuntimeError("CUDA out of memory"), "reward 'x' raised RuntimeError: CUDA out of memory"),
        ([1.0, float("nan"), 2.0], "returned 1 scores that are NaN or infinite for 'a smiling"),
        ([1.0, float("inf"), float("-inf")], "returned 2 scores that are NaN or infinite"),
        ([1.0, 2.0], r"returned shape \(2,\) for 3 images"),
        ([[1.0], [2.0], [3.0]], r"returned shape \(3, 1\) for 3 images"),
        (None, r"returned shape \(\) for 3 images"),
        (["a", "b", "c"], "reward 'x' raised ValueError"),
    ],
)
def test_what_is_no_score_is_an_error_and_never_a_zero(answer, words):
    with pytest.raises(RewardError, match=words):
        checked_scores(Fixed(answer), "x", pictures(), PROMPTS)


def test_good_scores_pass_as_float32():
    scores = checked_scores(Fixed([0, 1, 2.5]), "x", pictures(), PROMPTS)
    assert scores.dtype == np.float32 and scores.tolist() == [0, 1, 2.5]


# -- jpeg and python ----------------------------------------------------------------------


def test_jpeg_prefers_what_is_small():
    flat, noise = np.full((32, 32, 3), 128, np.uint8), pictures(1, 32)[0]
    images = np.stack([flat, noise])
    small, large = build("jpeg").score(images, ["", ""])
    assert large < small < 0
    assert build("jpeg", {"incompressible": True}).score(images, ["", ""]).tolist() == [-small, -large]
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=50)
    assert build("jpeg", {"quality": 50}).score(images, ["", ""])[1] == pytest.approx(-len(buffer.getvalue()) / 1000)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text(
        "import numpy as np\n"
        "def length(images, prompts):\n"
        "    return [len(p) + image.mean() for image, p in zip(images, prompts)]\n"
        "def broken(images, prompts):\n"
        "    raise KeyError('oops')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_own_reward"


def test_ones_own_function_is_a_reward(module):
    scorer, images = build("python", {"function": f"{module}:length"}), pictures()
    scores = checked_scores(scorer, "python", images, PROMPTS)
    assert scores.dtype == np.float32
    assert scores == pytest.approx([len(p) + image.mean() for image, p in zip(images, PROMPTS)])
    with pytest.raises(RewardError, match="reward 'python' raised KeyError: 'oops'"):
        checked_scores(build("python", {"function": f"{module}:broken"}), "python", images, PROMPTS)


@pytest.mark.parametrize(
    "function, words",
    [
        ("my_own_reward.length", "not of the form package.module:name"),
        ("my_own_reward:lenght", "cannot be imported: .*lenght"),
        ("no_such_module:f", "cannot be imported: .*no_such_module"),
    ],
)
def test_a_bad_function_path_is_refused_when_it_is_built(module, function, words):
    with pytest.raises(ValueError, match=words) as error:
        build("python", {"function": function})
    assert function in str(error.value)


# -- attributes and judge -----------------------------------------------------------------


def test_the_reward_is_the_mean_probability_of_what_is_claimed(file):
    scorer = with_answers("attributes", file, copies=1, noise=0.0)
    images = pictures()
    logits = scorer.model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()
    expected = [np.mean(by_hand(row, p)[0]) for row, p in zip(logits, PROMPTS)]
    assert scorer.score(images, PROMPTS) == pytest.approx(expected, abs=1e-5)


def test_the_reward_averages_noised_and_blurred_views(file):
    scorer = build("attributes", {"path": str(file), "copies": 4, "noise": 0.3})
    images = pictures()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    noise = 0.3 * torch.randn((4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    views = []
    for i in range(4):
        with torch.no_grad():
            logits = scorer.model((blur(pixels) if i % 2 else pixels) + noise[i]).numpy()
        views.append([np.mean(by_hand(row, p)[0]) for row, p in zip(logits, PROMPTS)])
    assert scorer.score(images, PROMPTS) == pytest.approx(np.mean(views, 0), abs=1e-5)
    assert np.std(views, 0).min() > 1e-5  # the views do differ
    assert np.array_equal(scorer.score(images, PROMPTS), scorer.score(images, PROMPTS))


def test_blur_keeps_the_mean_of_a_flat_image_and_smooths_a_point():
    assert torch.allclose(blur(torch.full((1, 3, 5, 5), 0.7)), torch.full((1, 3, 5, 5), 0.7))
    point = torch.zeros(1, 2, 5, 5)
    point[0, 1, 2, 2] = 1
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    assert torch.allclose(blur(point)[0, 1, 1:4, 1:4], kernel) and not blur(point)[0, 0].any()


def test_the_judge_is_the_share_of_claims_found(file):
    scorer = with_answers("judge", file)
    images = pictures(60)
    prompts = [PROMPTS[i % 3] for i in range(60)]
    logits = scorer.model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()
    expected = [np.mean(by_hand(row, p)[1]) for row, p in zip(logits, prompts)]
    assert scorer.score(images, prompts) == pytest.approx(expected)
    assert len(set(expected)) > 1
    details = scorer.details(images, prompts)
    assert list(details) == [*ATTRIBUTES, "all"] and details["all"] == pytest.approx(expected)
    claims = np.array([["mouth" in faces.parse_caption(p), "hat" in faces.parse_caption(p)] for p in prompts])
    assert np.array_equal(~np.isnan(np.stack([details["mouth"], details["hat"]], 1)), claims)
    assert np.isnan(details["hand"]).all()


def test_silent_prompts_are_an_error(file):
    for name in ("attributes", "judge"):
        with pytest.raises(ValueError, match="prompt 'a robot' names none of the attributes skin, hair_color"):
            build(name, {"path": str(file)}).score(pictures(2), [PROMPTS[0], "a robot"])


@pytest.mark.parametrize("name", ["attributes", "judge"])
def test_a_score_does_not_depend_on_the_rest_of_the_batch(name, file):
    scorer = build(name, {"path": str(file)})
    images = pictures(6)
    together = scorer.score(images, PROMPTS * 2)
    alone = [scorer.score(images[i : i + 1], [PROMPTS[i % 3]])[0] for i in range(6)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together.dtype == np.float32 and together.shape == (6,)


def test_a_classifier_can_learn_the_portraits_and_the_judge_follows(tmp_path):
    """A few steps on a few portraits: the loss falls, and the true caption beats a wrong one."""
    images, captions, labels = faces.batch(1, np.arange(24), 16)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    torch.manual_seed(0)
    model = AttributeClassifier(16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = classification_loss(model(pixels), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save(tmp_path / "judge.safetensors")
    judge = build("judge", {"path": str(tmp_path / "judge.safetensors")})
    assert judge.score(images, captions).mean() > 0.8 > judge.score(images, captions[::-1]).mean() + 0.2


def test_unclaimed_labels_do_not_enter_the_loss():
    logits = torch.randn(4, sum(HEADS))
    labels = torch.tensor([[0] * len(HEADS), *[[-1] * len(HEADS)] * 3])
    direct = torch.stack([-part[0].log_softmax(0)[0] for part in logits.split(HEADS, 1)]).mean()
    assert torch.allclose(classification_loss(logits, labels), direct)


# -- the classifier's file ----------------------------------------------------------------


def test_a_classifier_comes_back_as_it_was_saved(tmp_path):
    model = AttributeClassifier(24, 16).eval()
    model.save(tmp_path / "deep" / "a.safetensors")
    again = AttributeClassifier.load(tmp_path / "deep" / "a.safetensors")
    assert again.sizes == {"sample_size": 24, "width": 16} and not again.training
    x = torch.rand(2, 3, 24, 24)
    assert torch.equal(again(x), model(x))


def test_a_missing_file_says_who_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.safetensors' is missing: the stage 'prepare' makes it"):
        AttributeClassifier.load(tmp_path / "gone.safetensors")


def test_damaged_or_foreign_files_are_named(tmp_path, file):
    from safetensors.torch import save_file

    whole = file.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (b"", b"garbage" * 10, whole[:100], whole[:-50]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.safetensors is not a usable attribute classifier"):
            AttributeClassifier.load(bad)
    for weights, facts in (
        ({"x": torch.zeros(2)}, None),
        ({"x": torch.zeros(2)}, {"sample_size": "16", "width": "8"}),
        ({"x": torch.zeros(2)}, {"other": "1"}),
        ({"x": torch.zeros(2)}, {"width": "wide"}),
    ):
        save_file(weights, bad, metadata=facts)
        with pytest.raises(ValueError, match="bad.safetensors is not a usable attribute classifier"):
            AttributeClassifier.load(bad)


# -- parameters, provenance, tuning -------------------------------------------------------


def test_parameters_are_typed_before_anything_is_built(file):
    assert checked_params("jpeg", {"quality": 50}) == {"quality": 50}
    with pytest.raises(ValueError, match=r"quality = 'high'"):
        checked_params("jpeg", {"quality": "high"})
    with pytest.raises(ValueError, match="it takes no 'qualiti', did you mean 'quality'"):
        checked_params("jpeg", {"qualiti": 3})


class Mean(TorchScorer):
    """Counts its forwards; the score is the mean pixel."""

    def __init__(self, **options):
        super().__init__(nn.Identity(), **options)
        self.seen: list[int] = []

    def rewards(self, pixels, prompts):
        self.seen.append(len(pixels))
        return pixels.mean((1, 2, 3))


def test_a_torch_scorer_scores_in_micro_batches_that_change_nothing():
    images = pictures(7)
    small, large = Mean(device="cpu", micro_batch=3), Mean(device="cpu", micro_batch=32)
    assert np.array_equal(small.score(images, ["x"] * 7), large.score(images, ["x"] * 7))
    assert small.seen == [3, 3, 1] and large.seen == [7]
    assert large.score(images, ["x"] * 7) == pytest.approx(images.mean((1, 2, 3)) / 255, abs=1e-6)
    assert large.score(images[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="micro_batch is 0"):
        Mean(device="cpu", micro_batch=0)


def test_the_micro_batch_is_the_smallest_near_the_best_throughput(monkeypatch):
    """Seconds of a call: 1 for each forward and 0.01 for each image; so the whole request at once is best."""
    from rlproxi.rewards import tuning

    scorer = Mean(device="cpu")
    cost = lambda s, images, prompts: -(-len(images) // s.micro_batch) + 0.01 * len(images)  # noqa: E731
    monkeypatch.setattr(tuning, "_seconds", cost)
    rates = tuning.tune_micro_batch(scorer, pictures(6), ["x"] * 6)
    assert list(rates) == [1, 2, 4, 6] and scorer.micro_batch == 6
    assert rates[2] == pytest.approx(6 / 3.06)
    monkeypatch.setattr(tuning, "_seconds", lambda s, images, prompts: 1.0 if s.micro_batch > 1 else 1.04)
    tuning.tune_micro_batch(scorer, pictures(6), ["x"] * 6)
    assert scorer.micro_batch == 1, "within 5 % of the best"


def test_partial_answers_keep_what_is_there():
    scores = checked_scores(Fixed([1.0, float("nan"), float("inf")]), "x", pictures(), PROMPTS, partial=True)
    assert scores.dtype == np.float32 and scores[0] == 1 and np.isnan(scores[1:]).all()
    with pytest.raises(RewardError, match="returned 3 scores that are NaN"):
        checked_scores(Fixed([float("nan")] * 3), "x", pictures(), PROMPTS, partial=True)


def test_provenance_hashes_the_checkpoint(tmp_path):
    import hashlib

    from rlproxi.rewards import provenance

    (tmp_path / "weights").write_bytes(b"abc")
    scorer = Mean(device="cpu", files=[tmp_path / "weights"])
    facts = provenance(scorer)
    assert facts[str(tmp_path / "weights")] == hashlib.sha256(b"abc").hexdigest()
    assert facts["class"].endswith(".Mean")
    assert set(provenance(build("jpeg"))) == {"class"}
