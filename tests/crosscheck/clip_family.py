"""Golden values of the CLIP scorers from their authors' own code, for tests/rewards/test_clip_golden.py.

    python3 -m venv /somewhere && . /somewhere/bin/activate
    pip install torch==2.6.0 torchvision==0.21.0 open_clip_torch transformers clint requests
    pip install --no-deps hpsv2==1.2.0
    python tests/crosscheck/clip_family.py

It needs an environment of its own: torchvision has to match torch, and the hpsv2 wheel pins protobuf<4 and
pytest==7.2.0. The wheel also lacks its tokenizer's vocabulary; the script copies the one of open_clip_torch there.

The networks are small and their weights follow from their names (tests/fixtures/clip.py). What is computed by whom:

- hpsv2.*: ``hpsv2.img_score.score`` with a checkpoint file, and the model, transform and tokenizer it uses.
- pick.*, clip.*: transformers' processor and model in the few lines of the authors' README, and torchmetrics'
  formula. The image processor is the PIL one: there was no other when both were published.
- aesthetic.*: open_clip's model with OpenAI's activation, torchvision's transforms as in openai/CLIP, and the
  predictor's layers as in the authors' simple_inference.py.

With the checkout on PYTHONPATH it also compares the tokens of CLIP's full vocabulary, which is not kept here.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from fixtures import clip as fixtures

GOLDEN = Path(__file__).parents[1] / "rewards" / "golden" / "clip_family.npz"
NAMES = list(fixtures.SIZES)
PAIRS = [fixtures.PROMPTS[i] for i in range(len(NAMES))]  # the prompt of each image


def pictures() -> list[Image.Image]:
    return [Image.fromarray(fixtures.image(name)) for name in NAMES]


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(fixtures.tensor(name, tuple(shape)))) for name, shape in shapes.items()}


def import_hpsv2():
    """The package, with the vocabulary that its wheel forgot."""
    import importlib.util

    here, there = (Path(importlib.util.find_spec(name).origin).parent for name in ("open_clip", "hpsv2"))
    vocabulary = there / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        shutil.copy(here / vocabulary.name, vocabulary)
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    return img_score, open_clip


def hpsv2_values(folder: Path) -> dict[str, np.ndarray]:
    img_score, open_clip = import_hpsv2()
    check_layouts(open_clip)
    full = open_clip.tokenizer._tokenizer
    compare_full_vocabulary(open_clip.tokenizer, folder)

    (folder / "tiny.json").write_text(json.dumps(fixtures.TINY))
    open_clip.add_model_config(folder / "tiny.json")
    # img_score asks for ViT-H-14 and its pretrained weights by name: it is given the small model under that name.
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny", None, precision="amp", light_augmentation=True, aug_cfg={}, output_dict=True
    )
    model.load_state_dict(weights(fixtures.open_clip_layout(fixtures.TINY)))
    torch.save({"state_dict": model.state_dict()}, folder / "tiny.pt")
    nn.init.zeros_(model.visual.proj)  # so that the scores show that the checkpoint was loaded
    img_score.model_dict.update(model=model, preprocess_val=transform)
    open_clip.tokenizer._tokenizer = open_clip.tokenizer.SimpleTokenizer(
        str(fixtures.write_merges(folder / "merges.txt.gz"))
    )
    try:
        scores = [
            img_score.score(picture, prompt, cp=str(folder / "tiny.pt"))[0]
            for picture, prompt in zip(pictures(), PAIRS)
        ]
        tokens = open_clip.tokenizer.tokenize(fixtures.PROMPTS)
    finally:
        open_clip.tokenizer._tokenizer = full
    # An image whose longest side is 224 already is not padded by the authors, and then does not fit their model.
    images = torch.stack([transform(picture) for picture in pictures()])
    with torch.no_grad():
        image_features, text_features = model.encode_image(images, True), model.encode_text(tokens, True)
    return {
        "hpsv2.images": fixtures.strided(images.numpy()),
        "hpsv2.tokens": tokens.numpy(),
        "hpsv2.image_features": image_features.numpy(),
        "hpsv2.text_features": text_features.numpy(),
        "hpsv2.scores": np.array(scores, np.float32),
    }


def check_layouts(open_clip) -> None:
    """The keys and shapes that the tests build are those of the authors' own class, ViT-H-14 included."""
    for name, config in (("ViT-H-14", open_clip.factory.get_model_config("ViT-H-14")), ("tiny", fixtures.TINY)):
        with torch.device("meta"):
            state = open_clip.model.CLIP(**config).state_dict()
        ours = fixtures.open_clip_layout(fixtures.VIT_H_14 if name == "ViT-H-14" else config)
        assert {key: tuple(value.shape) for key, value in state.items()} == ours, name
        print(f"layout of {name}: {len(ours)} keys agree")


def compare_full_vocabulary(tokenizer, folder: Path) -> None:
    try:
        from rlproxi.rewards.clip_text import load_tokens, open_clip_clean
    except ImportError:
        print("rlproxi is not on PYTHONPATH: the full vocabulary's tokens were not compared")
        return
    words = " ".join(Path(file).read_text() for file in Path(__file__).parents[2].glob("docs/*.md")).split()
    texts = [
        *fixtures.PROMPTS,
        *(" ".join(words[i : i + 20]) for i in range(0, len(words), 20)),
        *("".join(map(chr, range(i, i + 16))) for i in range(0x20, 0x3000, 16)),
    ]
    file = tokenizer.default_bpe()
    wanted = tokenizer.tokenize(texts)
    save_tokenizer(file, folder / "full")
    for kind, name in (("file", file), ("transformers folder", str(folder / "full"))):
        same = (load_tokens(name, open_clip_clean)(texts) == wanted).all(1)
        odd = [text for text, equal in zip(texts, same) if not equal]
        print(f"full vocabulary, {kind}: {int(same.sum())} of {len(texts)} texts have the same ids; others: {odd[:8]}")


def save_tokenizer(file: str | Path, folder: Path) -> None:
    """A vocabulary file of open_clip's as a transformers tokenizer folder."""
    from transformers import CLIPTokenizer

    with gzip.open(file, "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(fixtures.byte_letters().values())
    words = [
        *letters,
        *(x + "</w>" for x in letters),
        *(line.replace(" ", "") for line in lines),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(line.split()) for line in lines],
        model_max_length=77,
    ).save_pretrained(folder)


def transformers_values(folder: Path) -> dict[str, np.ndarray]:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel(CLIPConfig(**fixtures.TINY_TRANSFORMERS)).eval()
    model.load_state_dict(weights({key: value.shape for key, value in model.state_dict().items()}))
    save_tokenizer(fixtures.write_merges(folder / "merges.txt.gz"), folder / "tokenizer")
    processor = CLIPProcessor(CLIPImageProcessorPil(), CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    found: dict[str, list] = {"images": [], "pick": [], "clip": [], "image_features": [], "text_features": []}
    with torch.no_grad():
        for picture, prompt in zip(pictures(), PAIRS):
            inputs = processor(images=picture, padding=True, truncation=True, max_length=77, return_tensors="pt")
            texts = processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            image, text = model.get_image_features(**inputs), model.get_text_features(**texts)
            image, text = (getattr(x, "pooler_output", x) for x in (image, text))
            image, text = image / torch.norm(image, dim=-1, keepdim=True), text / torch.norm(text, dim=-1, keepdim=True)
            found["images"].append(inputs["pixel_values"][0])
            found["image_features"].append(image[0])
            found["text_features"].append(text[0])
            found["pick"].append((model.logit_scale.exp() * (text @ image.T)[0])[0])
            found["clip"].append(torch.clamp(100 * (image * text).sum(), min=0))
    found = {key: torch.stack(value).numpy() for key, value in found.items()}
    return {
        "transformers.images": fixtures.strided(found["images"]),
        "pick.scores": found["pick"],
        "clip.scores": found["clip"],
        "transformers.image_features": found["image_features"],
        "transformers.text_features": found["text_features"],
    }


def aesthetic_values() -> dict[str, np.ndarray]:
    from open_clip.model import CLIP
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    transform = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            lambda picture: picture.convert("RGB"),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    model = CLIP(**fixtures.TINY_L).eval()
    model.load_state_dict(weights(fixtures.open_clip_layout(fixtures.TINY_L)))
    widths = [768, 1024, "drop", 128, "drop", 64, "drop", 16, 1]
    layers, last = [], widths[0]
    for width in widths[1:]:
        layers.append(nn.Dropout(0.2) if width == "drop" else nn.Linear(last, width))
        last = last if width == "drop" else width
    head = nn.Sequential(*layers).eval()
    head.load_state_dict(
        {key.removeprefix("layers."): torch.from_numpy(value) for key, value in fixtures.aesthetic_weights().items()}
    )
    images = torch.stack([transform(picture) for picture in pictures()])
    with torch.no_grad():
        features = model.encode_image(images)
        features = features / features.norm(dim=-1, keepdim=True)
        scores = head(features)[:, 0]
    return {
        "aesthetic.images": fixtures.strided(images.numpy()),
        "aesthetic.features": features.numpy(),
        "aesthetic.scores": scores.numpy(),
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        values = {**hpsv2_values(Path(folder)), **transformers_values(Path(folder)), **aesthetic_values()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, names=NAMES, **values)
    for key in ("hpsv2.scores", "pick.scores", "clip.scores", "aesthetic.scores"):
        print(key, np.round(values[key], 5).tolist())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
