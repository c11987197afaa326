"""Captions, hands and scores by small random models in the real formats, against their networks asked directly."""

from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import clip_models, curation_models
from fixtures import curation as fixtures
from rlproxi.config.curation import HAND_WORDS, Caption, Curate, HandDetector
from rlproxi.data.curation import plan, records, write
from rlproxi.data.curation.captions import Captioner
from rlproxi.data.curation.examine import Examiner
from rlproxi.data.curation.hands import HandFinder, hand_words
from rlproxi.data.shards import read_shard
from rlproxi.rewards import build

CAPTIONS = ["a cat", "the red hat on a cat", "a hat", "a cat"]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (40 + 10 * i, 50, 3), dtype=np.uint8) // (i + 1) for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): the small model, saved once."""
    made = {}
    base = tmp_path_factory.mktemp("models")

    def get(name: str) -> str:
        if name not in made:
            made[name] = str(getattr(curation_models, f"save_{name}")(base / name))
        return made[name]

    return get


def _captioner(model: str, prompt: str | None = None, batch: int = 3) -> Captioner:
    return Captioner(Caption(model=model, prompt=prompt, max_tokens=6, batch=batch, precision="float32"))


def _greedy(network, step, tokens: torch.Tensor, end: int, count: int = 6) -> list[int]:
    """Greedy decoding by hand: the likeliest token again and again."""
    answer = []
    with torch.no_grad():
        while len(answer) < count and (not answer or answer[-1] != end):
            answer.append(int(step(tokens).logits[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[answer[-1]]])], 1)
    return answer


# -- captions -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, "a photo of", "{caption} with"])
def test_blip_captions_are_its_greedy_ones(folder, images, prompt):
    captioner = _captioner(folder("blip"), prompt)
    told = captioner(images, CAPTIONS)
    model, processor = captioner.model, captioner.processor
    for image, caption, got in zip(images, CAPTIONS, told):
        pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        seen = model.vision_model(pixels).last_hidden_state
        begin = "" if prompt is None else prompt.replace("{caption}", caption)
        start = torch.tensor([[5, *processor.tokenizer(begin, add_special_tokens=False)["input_ids"]]])  # [DEC]
        answer = _greedy(model, lambda t: model.text_decoder(t, encoder_hidden_states=seen), start, end=3)
        assert got == processor.decode([*start[0, 1:].tolist(), *answer], skip_special_tokens=True)
    assert len(set(told)) > 1, "captions follow the image"


def test_a_chat_model_answers_in_batches_as_it_does_alone(folder, images):
    """Prompts of different lengths: padding must not be seen."""
    captioner = _captioner(folder("llava"), "{caption} describe")
    told = captioner(images, CAPTIONS)
    model, processor = captioner.model, captioner.processor
    for image, caption, got in zip(images, CAPTIONS, told):
        asked = processor(
            images=Image.fromarray(image), text=f"USER: <image> {caption} describe ASSISTANT:", return_tensors="pt"
        )
        pixels = asked["pixel_values"]
        answer = _greedy(model, lambda t: model(input_ids=t, pixel_values=pixels), asked["input_ids"], end=2)
        text = processor.decode(answer, skip_special_tokens=True)
        assert got == (" ".join(text.split()) or caption)
    assert told != CAPTIONS and not any("describe" in text and caption in text for text, caption in zip(told, CAPTIONS))


def test_an_empty_answer_leaves_the_caption(folder, images, monkeypatch):
    captioner = _captioner(folder("blip"))
    monkeypatch.setattr(
        captioner.model, "generate", lambda pixel_values, **_: torch.zeros(len(pixel_values), 3, dtype=torch.long)
    )
    assert captioner(images, CAPTIONS) == CAPTIONS


def test_caption_models_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(ValueError, match="curate.caption.prompt is not set, .*chat model"):
        _captioner(folder("llava"))
    with pytest.raises(FileNotFoundError, match="curate.caption.model: '/nowhere/blip' is neither a folder"):
        _captioner("/nowhere/blip")
    with pytest.raises(ValueError, match="curate.caption.model: .* cannot be loaded"):
        _captioner(str(tmp_path))


# -- hands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, found",
    [
        ("She raises her Hand.", ["hand"]),
        ("hands: five fingers", ["hands", "fingers"]),
        ("a clenched fist!", ["fist"]),
        ("handsome man in Finland, with a beforehand", []),
        ("second-hand", ["hand"]),
        ("palm/thumb", ["thumb", "palm"]),
        ("", []),
    ],
)
def test_words_of_hands_are_whole_words(caption, found):
    assert hand_words(caption, HAND_WORDS) == found


def _boxes(centre: torch.Tensor, height: int, width: int) -> np.ndarray:
    """[N, 4] (x, y, w, h) of the middle and size, in shares -> left, top, width, height in pixels."""
    x, y, w, h = centre.double().numpy().T
    return np.stack([(x - w / 2) * width, (y - h / 2) * height, w * width, h * height], 1)


def test_a_detector_of_classes(folder, images):
    detector = HandFinder(HandDetector(model=folder("yolos"), min_score=0.7, batch=3))
    found = detector(images)
    for image, hands in zip(images, found):
        with torch.no_grad():
            answer = detector.model(**detector.processor(images=image, return_tensors="pt"))
        scores, classes = answer.logits[0].softmax(-1)[:, :-1].max(-1)  # the last class is 'nothing'
        chosen = (scores > 0.7) & (classes == 1)
        expected = _boxes(answer.pred_boxes[0][chosen], *image.shape[:2])
        got = np.array([[hand[k] for k in "xywh"] for hand in hands]).reshape(-1, 4)
        assert np.abs(got - expected).max(initial=0) <= 0.51
        assert [hand["confidence"] for hand in hands] == pytest.approx(scores[chosen].tolist(), abs=1e-4)
        assert {hand["label"] for hand in hands} <= {"Hand"}
    assert any(found)


def test_a_zero_shot_detector(folder, images):
    detector = HandFinder(HandDetector(model=folder("owlvit"), labels=["hand", "a cat"], min_score=0.01, batch=3))
    found = detector(images)
    for image, hands in zip(images, found):
        asked = detector.processor(images=image, text=[["hand", "a cat"]], return_tensors="pt", padding=True)
        with torch.no_grad():
            answer = detector.model(**asked)
        scores, classes = answer.logits[0].max(-1)
        chosen = scores.sigmoid() > 0.01
        assert [hand["label"] for hand in hands] == [["hand", "a cat"][int(i)] for i in classes[chosen]]
        assert [hand["confidence"] for hand in hands] == pytest.approx(scores[chosen].sigmoid().tolist(), abs=1e-4)
    assert any(found)


def test_hand_detectors_that_cannot_be_used(folder):
    with pytest.raises(ValueError, match="knows none of .*its classes are hand, person"):
        HandFinder(HandDetector(model=folder("yolos"), labels=["paw"]))
    with pytest.raises(FileNotFoundError, match="curate.hands.detector.model"):
        HandFinder(HandDetector(model="./yolos"))


# -- scores, and all of them in one shard -----------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory, folder) -> Curate:
    base = tmp_path_factory.mktemp("all")
    predictor, clip = clip_models.save_aesthetic(base)
    small = clip_models.save_transformers(base / "small")
    faces = [fixtures.real_face(i, 256 + 16 * (i % 2)) for i in range(6)]
    samples = [(f"{i:09d}", fixtures.encoded(face), CAPTIONS[i % 4], {"url": str(i)}) for i, face in enumerate(faces)]
    fixtures.write_tar(base / "raw" / "00000.tar", samples)
    aesthetic = {"predictor": str(predictor), "clip": str(clip), "precision": "float32"}
    return Curate(
        urls=[str(base / "raw")],
        faces={"min_size": 64},
        batch=4,
        filters=[
            {"name": "aesthetic", "params": aesthetic},
            {"name": "match", "scorer": "clip", "params": {"clip": str(small), "precision": "float32"}},
        ],
        caption={"model": folder("blip"), "max_tokens": 6, "batch": 3, "precision": "float32"},
        hands={"detector": {"model": folder("yolos"), "min_score": 0.7}},
    )


def test_scores_are_those_of_the_reward(settings):
    shard = str(next(Path(settings.urls[0]).iterdir()))
    found = Examiner(settings).examine(shard)
    passed = [record for record in found if record.stage is None]
    assert len(passed) >= 4
    samples = {s.key: s for s in read_shard(shard)}
    for f in settings.filters:
        scorer = build(f.kind, f.params)
        for record in passed:
            sample = samples[record.key]
            image = np.array(Image.open(BytesIO(sample.image)))
            expected = float(scorer.score(image[None], [sample.caption])[0])
            assert record.scores[f.name] == pytest.approx(expected, abs=2e-5)


def test_bounds_on_a_score_drop_by_it(settings):
    shard = str(next(Path(settings.urls[0]).iterdir()))
    free = Examiner(settings).examine(shard)
    bound = float(np.median([r.scores["match"] for r in free if r.stage is None]))
    second = settings.filters[1].model_copy(update={"min": bound})
    bounded = settings.model_copy(update={"filters": [settings.filters[0], second]})
    for before, after in zip(free, Examiner(bounded).examine(shard)):
        if before.stage is None:
            assert after.stage == ("filter/match" if before.scores["match"] < bound else None)
            assert after.scores["aesthetic"] == before.scores["aesthetic"]


def test_captions_and_hands_are_written(settings, tmp_path):
    shard = str(next(Path(settings.urls[0]).iterdir()))
    place = records.Place(tmp_path)
    found = Examiner(settings).examine(shard)
    tools = write.Writer(settings)
    with place.attempt():
        place.write_lines(place.records(shard), map(asdict, found), "")
        outputs = plan.outputs(plan.survivors(place, [shard], settings), [shard], settings)
        written = [tools.write(output, place) for output in outputs]
    assert written == [sum(r.stage is None for r in found)]
    raw = {s.key: s for s in read_shard(shard)}
    for sample in read_shard(str(place.shard(0))):
        before = raw[sample.meta["source"]["key"]]
        image = np.array(Image.open(BytesIO(sample.image)))
        told = tools.captioner([image], [before.caption])[0]
        assert sample.caption == sample.meta["caption"] == told != before.caption
        assert sample.meta["caption_original"] == before.caption
        assert sample.meta["hands"] == tools.detector([image])[0]
        assert sample.meta["hand_words"] == hand_words(f"{before.caption}\n{sample.caption}", HAND_WORDS)
        assert sample.meta["tags"] == (["hands"] if sample.meta["hands"] or sample.meta["hand_words"] else [])
        assert set(sample.meta["scores"]) == {"aesthetic", "match"}
