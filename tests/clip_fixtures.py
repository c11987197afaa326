"""Small CLIPs, images, prompts and a vocabulary, made from formulas: the same in the test suite and in the environments
of the cross-checks, so that nothing but their answers has to be kept. Needs numpy only.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

#: ViT-H-14 as open_clip publishes it (model_configs/ViT-H-14.json): HPSv2's and PickScore's network.
VIT_H_14 = {"embed_dim": 1024, "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80,
                                              "patch_size": 14},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}}

PROMPTS = [
    "a photo of a cat, highly detailed",
    "An ASTRONAUT riding   a horse\n on Mars, 8k, f/1.4",
    "the dog\u2019s ball isn't hers, \u201che said\u201d; they'll see & we've seen",
    "fish &amp; chips for &lt;5&gt; \u00a3, &quot;caf\u00e9&quot; cafe\u0301 na\u00efve",
    "\u4e00\u53ea\u732b \U0001f431\U0001f3fd \uff26\uff35\uff2c\uff2c\u3000width \ufb01ne o\ufb03ce",
    "!!! ??? --- ... #hash_tag @me 1234567890 x2",
    "",
    "a very long prompt " * 30,
]

SIZES = {"square": (256, 256), "wide": (130, 391), "tall": (300, 222), "small": (57, 40), "exact": (224, 224),
         "photo": (512, 768)}


def image(name: str) -> np.ndarray:
    """uint8 [H, W, 3]: broad waves, fine stripes and hard edges, so that every detail of a resize shows."""
    height, width = SIZES[name]
    y, x, c = np.ogrid[:height, :width, :3]
    waves = (x * (3 + c) + y * 2 + (x * y) // 31) % 256
    grain = ((x * 7919 + y * 104729 + c * 1299709) * 2654435761 >> 13) % 97
    edges = 120 * (((x // 23) + (y // 17) + c) % 2)
    return ((waves + grain + edges) // 2 % 256).astype(np.uint8)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights of a layer from its name: of a size that keeps activations near 1."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name == "logit_scale":
        return np.float32(np.log(100)) + 0 * draw
    if len(shape) < 2:  # biases, norms, class embedding
        return np.float32(0.1) * draw + np.float32("bias" not in name)
    if "embedding" in name:
        return np.float32(0.3) * draw
    fan_in = shape[0] if name.endswith("proj") or name == "text_projection" else int(np.prod(shape[1:]))
    return draw * np.float32(fan_in ** -0.5)


def open_clip_layout(config: dict) -> dict[str, tuple[int, ...]]:
    """Every key and shape of open_clip's CLIP (a ViT and a text transformer) of a model config in its layout."""
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    v, t, p = vision["width"], text["width"], vision["patch_size"]
    keys: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text["context_length"], t), "text_projection": (t, embed), "logit_scale": (),
        "visual.class_embedding": (v,), "visual.positional_embedding": ((vision["image_size"] // p) ** 2 + 1, v),
        "visual.proj": (v, embed), "visual.conv1.weight": (v, 3, p, p),
        "token_embedding.weight": (text["vocab_size"], t)}
    norms = {"visual.ln_pre": v, "visual.ln_post": v, "ln_final": t}
    for prefix, layers, w in (("visual.", vision["layers"], v), ("", text["layers"], t)):
        for block in (f"{prefix}transformer.resblocks.{i}" for i in range(layers)):
            norms |= {f"{block}.ln_1": w, f"{block}.ln_2": w}
            keys |= {f"{block}.attn.in_proj_weight": (3 * w, w), f"{block}.attn.in_proj_bias": (3 * w,),
                     f"{block}.attn.out_proj.weight": (w, w), f"{block}.attn.out_proj.bias": (w,),
                     f"{block}.mlp.c_fc.weight": (4 * w, w), f"{block}.mlp.c_fc.bias": (4 * w,),
                     f"{block}.mlp.c_proj.weight": (w, 4 * w), f"{block}.mlp.c_proj.bias": (w,)}
    return keys | {f"{norm}.{part}": (w,) for norm, w in norms.items() for part in ("weight", "bias")}


def merges(count: int = 300) -> list[tuple[str, str]]:
    """Byte pair merges learnt from PROMPTS: CLIP's algorithm on a vocabulary small enough to be made each time."""
    words = Counter(word for prompt in PROMPTS for word in prompt.lower().split() if word.isascii() and word.isalpha())
    split = {(*word[:-1], word[-1] + "</w>"): n for word, n in words.items()}
    found = []
    while len(found) < count:
        pairs: Counter = Counter()
        for word, n in split.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        joined: Counter = Counter()
        for word, n in split.items():
            parts, i = [], 0
            while i < len(word):
                both = word[i : i + 2] == best
                parts.append("".join(best) if both else word[i])
                i += 1 + both
            joined[tuple(parts)] += n
        split = joined
    return found


def write_merges(file: Path) -> Path:
    """The merges in the format of bpe_simple_vocab_16e6.txt.gz: a heading, then one pair a line."""
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(["#version: small", *(" ".join(pair) for pair in merges())]))
    return file


#: Its vocabulary: 256 bytes, the same ending a word, the merges, start and end.
VOCABULARY = 2 * 256 + len(merges()) + 2

TINY = {"embed_dim": 96,
        "vision_cfg": {"image_size": 224, "layers": 3, "width": 192, "head_width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "width": 128, "heads": 2, "layers": 3}}

#: With OpenAI's activation and ViT-L/14's 768 features: what the aesthetic predictor takes.
TINY_L = {"embed_dim": 768, "quick_gelu": True,
          "vision_cfg": {"image_size": 224, "layers": 2, "width": 128, "head_width": 64, "patch_size": 32},
          "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 1}}

#: Arguments of transformers' CLIPConfig: PickScore's and CLIP score's networks are published in its format.
TINY_TRANSFORMERS = {
    "projection_dim": 48,
    "vision_config": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
                      "patch_size": 32, "image_size": 224, "hidden_act": "gelu", "projection_dim": 48},
    "text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "vocab_size": VOCABULARY, "hidden_act": "gelu", "projection_dim": 48,
                    "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}}

AESTHETIC_LAYERS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def aesthetic_weights() -> dict[str, np.ndarray]:
    """The predictor's weights in the authors' names."""
    return {f"layers.{i}.{part}": tensor(f"layers.{i}.{part}", (b, a) if part == "weight" else (b,))
            for i, (a, b) in AESTHETIC_LAYERS.items() for part in ("weight", "bias")}


def byte_letters() -> dict[int, str]:
    """GPT-2's letters for bytes, by rule: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)}


def transformers_vocabulary() -> dict[str, int]:
    """The vocabulary of ``merges`` as transformers' CLIPTokenizer wants it."""
    letters = list(byte_letters().values())
    words = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges()),
             "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def strided(images: np.ndarray) -> np.ndarray:
    """A part of [..., 3, 224, 224] that is small enough to keep: every 13th row and column, and three sums of all."""
    weights = np.cos(np.arange(images[0].size)).reshape(images[0].shape)
    sums = [(images.astype(np.float64) * w).sum((-3, -2, -1)) for w in (1 / 1000, weights / 100, weights**2 / 1000)]
    return np.concatenate([images[..., ::13, ::13].reshape(len(images), -1), np.stack(sums, -1)], -1)
