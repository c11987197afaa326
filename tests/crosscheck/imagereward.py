"""Runs the authors' ImageReward on a tiny random model and writes the golden values that the tests compare with.

It needs an environment of its own, as the authors' code imports what old versions of timm and transformers had
(Python 3.11; torch 2.15 with torchvision 0.29 was used last, from the two unpinned names):

    python -m venv venv
    venv/bin/pip install torch torchvision
    venv/bin/pip install "transformers==4.40.2" "numpy<2" timm==0.6.13 fairscale==0.4.13 pillow
    venv/bin/pip install --no-deps image-reward==1.5
    venv/bin/python tests/crosscheck/imagereward.py           # writes tests/rewards/golden/imagereward.npz

No weights are committed: each is drawn from a seed and its name, by ``weights``, here and in the tests. The functions
above ``main`` need numpy alone, and tests/rewards/test_imagereward.py imports them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "rewards" / "golden" / "imagereward.npz"

#: Three heads look at the image, two at the text; a grid of 7x7 patches.
TINY = {
    "image": 224,
    "patch": 32,
    "vision_width": 192,
    "vision_layers": 2,
    "vision_mlp": 768,
    "text_width": 128,
    "text_layers": 2,
    "text_mlp": 256,
    "vocabulary": 43,
    "positions": 40,
}

#: BLIP's ViT-L/16 and med_config.json, as published.
PUBLISHED = {
    "image": 224,
    "patch": 16,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_mlp": 4096,
    "text_width": 768,
    "text_layers": 12,
    "text_mlp": 3072,
    "vocabulary": 30524,
    "positions": 512,
}

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "an",
    "the",
    "of",
    "with",
    "and",
    "in",
    "on",
    ",",
    ".",
    "!",
    "-",
    "person",
    "smiling",
    "frown",
    "##ing",
    "pale",
    "skin",
    "red",
    "hat",
    "sun",
    "##glass",
    "##es",
    "blue",
    "back",
    "##ground",
    "cafe",
    "paint",
    "##ed",
    "ocean",
    "birds",
    "day",
    "8",
    "##k",
    "'",
    "s",
]

#: One for each image. The third is longer than 35 tokens; others have accents, unknown words, [ENC] spelt out, none.
PROMPTS = [
    "a smiling person with pale skin",
    "A Frowning Person, on a BLUE background!",
    " ".join(["a painted ocean with birds, day - 8k"] * 6),
    "the café of a person's red hat",
    "an unheard-of zebra in sunglasses",
    "a [ENC] person [DEC] and birds",
    "",
]

#: Name -> (height, width). The first three need no resize, so that both ways of it are exact.
IMAGES = {
    "square": (224, 224),
    "wide crop": (224, 301),
    "tall crop": (279, 224),
    "wide": (200, 333),
    "tall": (461, 300),
    "large": (512, 512),
    "small": (32, 32),
}


def published_shapes(s: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the authors' checkpoint, from timm's vision transformer and BLIP's med.py."""
    d, t = s["vision_width"], s["text_width"]
    found = {"mlp.layers.0.weight": (1024, t), "mlp.layers.0.bias": (1024,)}
    for place, (old, new) in {2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        found |= _linear(f"mlp.layers.{place}", old, new)
    eye = "blip.visual_encoder."
    found |= {
        eye + "cls_token": (1, 1, d),
        eye + "pos_embed": (1, (s["image"] // s["patch"]) ** 2 + 1, d),
        eye + "patch_embed.proj.weight": (d, 3, s["patch"], s["patch"]),
        eye + "patch_embed.proj.bias": (d,),
    }
    for i in range(s["vision_layers"]):
        block = f"{eye}blocks.{i}."
        found |= _norm(block + "norm1", d) | _norm(block + "norm2", d)
        found |= _linear(block + "attn.qkv", d, 3 * d) | _linear(block + "attn.proj", d, d)
        found |= _linear(block + "mlp.fc1", d, s["vision_mlp"]) | _linear(block + "mlp.fc2", s["vision_mlp"], d)
    found |= _norm(eye + "norm", d)
    text = "blip.text_encoder."
    found |= {
        text + "embeddings.word_embeddings.weight": (s["vocabulary"], t),
        text + "embeddings.position_embeddings.weight": (s["positions"], t),
        text + "embeddings.position_ids": (1, s["positions"]),
    } | _norm(text + "embeddings.LayerNorm", t)
    for i in range(s["text_layers"]):
        layer = f"{text}encoder.layer.{i}."
        for name, width in (("attention.", t), ("crossattention.", d)):
            found |= _linear(layer + name + "self.query", t, t) | _linear(layer + name + "output.dense", t, t)
            found |= _linear(layer + name + "self.key", width, t) | _linear(layer + name + "self.value", width, t)
            found |= _norm(layer + name + "output.LayerNorm", t)
        found |= _linear(layer + "intermediate.dense", t, s["text_mlp"])
        found |= _linear(layer + "output.dense", s["text_mlp"], t) | _norm(layer + "output.LayerNorm", t)
    return found | _linear("blip.vision_proj", d, 256) | _linear("blip.text_proj", t, 256)


def _linear(name: str, old: int, new: int) -> dict[str, tuple[int, ...]]:
    return {name + ".weight": (new, old), name + ".bias": (new,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {name + ".weight": (width,), name + ".bias": (width,)}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 weights for the authors' names: the same in every environment, of a spread that keeps signals near 1."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            found[name] = np.arange(shape[-1])[None]
            continue
        noise = np.random.default_rng([7, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
        if "norm" in name.lower():
            found[name] = noise * 0.2 + (1 if name.endswith("weight") else 0)
        elif name.endswith("bias"):
            found[name] = noise * 0.02
        elif "patch_embed" in name:
            # Small, as the published ones are and the embeddings too: the first norms' epsilons show in the features.
            found[name] = noise * 0.001
        elif "embed" in name or name.endswith("cls_token"):
            found[name] = noise * 0.02
        else:
            gain = 2 if any(part in name for part in ("qkv", "query", "key", "crossattention.self.value")) else 1
            found[name] = noise * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    return {name: value if value.dtype == np.int64 else value.astype(np.float32) for name, value in found.items()}


def images() -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] for each name: coarse squares with noise on top, in whole numbers only."""
    found = {}
    for name, (height, width) in IMAGES.items():
        random = np.random.default_rng([11, zlib.crc32(name.encode())])
        side = max(4, min(height, width) // 9)
        squares = random.integers(0, 200, (height // side + 1, width // side + 1, 3))
        squares = squares.repeat(side, 0).repeat(side, 1)[:height, :width]
        found[name] = (squares + random.integers(0, 56, (height, width, 3))).astype(np.uint8)
    return found


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """One line for a checkpoint's names and shapes, whatever their order."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample(image: np.ndarray) -> np.ndarray:
    """A few pixels of [3, 224, 224], corners included."""
    return image[:, :: 223 // 6, :: 223 // 6]


def _authors(folder: Path):
    """The module with the authors' ``ImageReward``, without the package's __init__, which imports their trainer."""
    import importlib
    import importlib.util
    import sys
    import types

    root = Path(importlib.util.find_spec("ImageReward").origin).parent
    for name, path in (("ImageReward", root), ("ImageReward.models", root / "models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    # Their tokenizer is loaded as 'bert-base-uncased', which is this folder's when the process is in ``folder``.
    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return importlib.import_module("ImageReward.ImageReward")


def _config(folder: Path, sizes: dict) -> str:
    file = folder / "med_config.json"
    file.write_text(
        json.dumps(
            {
                "architectures": ["BertModel"],
                "attention_probs_dropout_prob": 0.1,
                "hidden_act": "gelu",
                "hidden_dropout_prob": 0.1,
                "hidden_size": sizes["text_width"],
                "initializer_range": 0.02,
                "intermediate_size": sizes["text_mlp"],
                "layer_norm_eps": 1e-12,
                "pad_token_id": 0,
                "model_type": "bert",
                "max_position_embeddings": sizes["positions"],
                "num_attention_heads": sizes["text_width"] // 64,
                "num_hidden_layers": sizes["text_layers"],
                "add_type_embeddings": False,
                "vocab_size": sizes["vocabulary"],
                "encoder_width": 768,
                "add_cross_attention": True,
            }
        )
    )
    return str(file)


def _shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _make_tiny(authors, folder: Path):
    """The authors' ImageReward with their classes at the sizes of TINY; they fix 'large' and 768 in the code."""
    import torch
    from ImageReward.models.BLIP import blip_pretrain, vit

    tower = vit.VisionTransformer(
        img_size=TINY["image"],
        patch_size=TINY["patch"],
        embed_dim=TINY["vision_width"],
        depth=TINY["vision_layers"],
        num_heads=TINY["vision_width"] // 64,
        drop_path_rate=0.1,
    )
    blip_pretrain.create_vit = lambda *_: (tower, TINY["vision_width"])
    head = authors.MLP
    authors.MLP = lambda _: head(TINY["text_width"])
    model = authors.ImageReward(_config(folder, TINY))
    drawn = {name: torch.from_numpy(value) for name, value in weights(_shapes(model)).items()}
    model.load_state_dict(drawn, strict=True)
    return model.eval()


def _unrounded(array: np.ndarray):
    """The authors' pre-processing by torchvision on float tensors, cut at 0 and 1 after each axis as PIL does it."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    pixels = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    height, width = vision.resize(pixels, 224).shape[-2:]
    for shape in ([len(array), width], [height, width]):
        pixels = vision.resize(pixels, shape, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return vision.normalize(
        vision.center_crop(pixels, 224), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )


def _run(model) -> dict[str, np.ndarray]:
    """Every intermediate of the authors' score on each image with its prompt."""
    import torch
    from PIL import Image

    text = model.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pictures = [Image.fromarray(array) for array in images().values()]
    inputs = torch.stack([_unrounded(array) for array in images().values()])
    seen = model.blip.visual_encoder(inputs)
    states = model.blip.text_encoder(
        text.input_ids,
        attention_mask=text.attention_mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long),
        return_dict=True,
    ).last_hidden_state[:, 0]
    return {
        "tokens": text.input_ids.numpy(),
        "mask": text.attention_mask.numpy(),
        "pil": np.stack([sample(model.preprocess(picture).numpy()) for picture in pictures]),
        "unrounded": np.stack([sample(value.numpy()) for value in inputs]),
        "vision": seen[:, [0, 24, 49]].numpy(),
        "text": states.numpy(),
        "rewards": ((model.mlp(states)[:, 0] - model.mean) / model.std).numpy(),
        "pil_rewards": np.array([model.score(prompt, picture) for prompt, picture in zip(PROMPTS, pictures)]),
    }


def main() -> None:
    import os
    import tempfile

    import PIL
    import torch
    import torchvision
    import transformers

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        os.chdir(folder)
        authors = _authors(folder)
        # The published sizes first: _make_tiny replaces parts of the authors' modules.
        whole = _shapes(authors.ImageReward(_config(folder, PUBLISHED)))
        tiny = _make_tiny(authors, folder)
        values = _run(tiny)
    listed = {
        "tiny_keys": _shapes(tiny),
        "published_digest": digest(whole),
        "published_count": len(whole),
        "versions": {module.__name__: module.__version__ for module in (torch, torchvision, transformers, PIL)},
    }
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN, facts=json.dumps(listed), **values)
    print(
        f"wrote {GOLDEN}, {GOLDEN.stat().st_size} bytes; {listed['versions']}\nrewards {values['rewards']}, from PIL "
        f"images {values['pil_rewards']}"
    )


if __name__ == "__main__":
    main()
