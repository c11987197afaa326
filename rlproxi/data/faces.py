"""Parametric portraits with captions that can be verified word by word.

A seed names a portrait, signed distance fields draw it at any size, and the caption says exactly what is drawn. About a
quarter are *hand-focused*, as in LAION-Face-T2I-15M: a raised hand shows one to five fingers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..seeds import Collection, seed_of
from . import degradations

#: attribute -> its values, in the order of the classifier's logits.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": ("pale", "tan", "dark"),
    "hair_color": ("black", "brown", "blond", "red", "white"),
    "hair_style": ("short", "long", "curly"),
    "mouth": ("smiling", "frowning", "surprised"),
    "glasses": ("none", "glasses", "sunglasses"),
    "hat": ("none", "red", "green", "blue"),
    "background": ("gray", "yellow", "green", "blue", "purple", "orange"),
    "hand": ("none", "one", "two", "three", "four", "five"),
}

SKIN = {"pale": (250, 214, 190), "tan": (208, 150, 104), "dark": (112, 68, 46)}
HAIR = {
    "black": (28, 24, 30),
    "brown": (110, 66, 30),
    "blond": (240, 208, 96),
    "red": (196, 62, 20),
    "white": (238, 238, 242),
}
HAT = {"red": (214, 24, 40), "green": (20, 130, 50), "blue": (24, 60, 190)}
BACKGROUND = {
    "gray": (150, 150, 154),
    "yellow": (244, 226, 120),
    "green": (120, 206, 130),
    "blue": (116, 176, 240),
    "purple": (176, 120, 214),
    "orange": (246, 160, 80),
}


@dataclass(frozen=True)
class Portrait:
    """A portrait to draw. ``attributes``: attribute -> the name of its value."""

    attributes: dict[str, str]
    caption: str
    pose: np.ndarray  # [7] in [0, 1): head x, y, scale; shade; shirt; hand x, y


def caption_of(attributes: dict[str, str]) -> str:
    """The caption of a full set of attributes, with one clause for each."""
    a = attributes
    glasses = "no glasses" if a["glasses"] == "none" else a["glasses"]
    hat = "no hat" if a["hat"] == "none" else f"a {a['hat']} hat"
    article = "an" if a["background"] == "orange" else "a"
    fingers = "one finger" if a["hand"] == "one" else f"{a['hand']} fingers"
    hand = "" if a["hand"] == "none" else f", raising a hand with {fingers}"
    return (
        f"a {a['mouth']} person with {a['skin']} skin, {a['hair_style']} {a['hair_color']} hair, {glasses} and {hat}, "
        f"on {article} {a['background']} background{hand}"
    )


_PATTERNS = {
    "mouth": r"\b(smiling|frowning|surprised)\b",
    "skin": r"\b(pale|tan|dark) skin\b",
    "hair_style": r"\b(short|long|curly)\b[\w ]*\bhair\b",
    "hair_color": r"\b(black|brown|blond|red|white) hair\b",
    "glasses": r"\b(no glasses|sunglasses|glasses)\b",
    "hat": r"\b(no|red|green|blue) hat\b",
    "background": r"\b(gray|yellow|green|blue|purple|orange) background\b",
    "hand": r"\b(one|two|three|four|five) fingers?\b",
}


def parse_caption(caption: str) -> dict[str, str]:
    """attribute -> value, for the attributes that a caption mentions. The inverse of ``caption_of``."""
    found: dict[str, str] = {}
    for attribute, pattern in _PATTERNS.items():
        match = re.search(pattern, caption.lower())
        if match:
            found[attribute] = "none" if match[1].startswith("no") else match[1]
    return found


def draw_attributes(rng: np.random.Generator, hand_fraction: float = 0.25) -> dict[str, str]:
    """Draw every attribute uniformly from its values, and a hand with probability ``hand_fraction``."""
    attributes = {name: values[int(rng.integers(len(values)))] for name, values in ATTRIBUTES.items() if name != "hand"}
    fingers = ATTRIBUTES["hand"][1 + int(rng.integers(5))]
    attributes["hand"] = fingers if rng.random() < hand_fraction else "none"
    return attributes


def collection(seed: int, purpose: str) -> int:
    """The seed of the endless collection of portraits for one purpose of the run with ``seed``."""
    return seed_of(seed, Collection[purpose.upper()])


def portrait(seed: int, index: int, hand_fraction: float = 0.25) -> Portrait:
    """Portrait ``index`` of the endless collection ``seed``: the same in every process and at any time."""
    rng = np.random.default_rng((seed, index))
    attributes = draw_attributes(rng, hand_fraction)
    return Portrait(attributes, caption_of(attributes), rng.random(7))


def labels(attributes: dict[str, str]) -> np.ndarray:
    """Class indices in the order of ATTRIBUTES, [8] int64; -1 for an attribute that is missing."""
    found = [values.index(attributes[name]) if name in attributes else -1 for name, values in ATTRIBUTES.items()]
    return np.array(found, np.int64)


class _Canvas:
    """A batch of images that are painted from back to front by signed distances (negative is inside)."""

    def __init__(self, count: int, size: int):
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.rgb = np.zeros((count, size, size, 3), np.float32)
        self.pixel = 2.0 / size

    def paint(self, shape, frame: np.ndarray, color: np.ndarray, on: np.ndarray, box: tuple | None = None) -> None:
        """Blend a colour in where ``shape(x, y)`` < 0, with one pixel of anti-aliasing.

        Args:
            frame: [B, 3] (shift x, shift y, scale) of the shape's coordinates.
            color, on: [B, 3] colours, [B] the images to paint in.
            box: (left, top, right, bottom) around the shape, in its coordinates; pixels outside are not computed.
        """
        chosen = np.flatnonzero(on)
        if len(chosen) == 0:
            return
        shift_x, shift_y, scale = (frame[chosen, i, None, None] for i in range(3))
        columns = rows = slice(None)
        if box is not None:
            left, top, right, bottom = box
            columns = self._span(shift_x + scale * left, shift_x + scale * right)
            rows = self._span(shift_y + scale * top, shift_y + scale * bottom)
        distance = shape((self.x[:, :, columns] - shift_x) / scale, (self.y[:, rows] - shift_y) / scale)
        cover = np.clip(0.5 - distance / self.pixel, 0.0, 1.0)[..., None]
        under = self.rgb[chosen, rows, columns]
        self.rgb[chosen, rows, columns] = under + cover * (color[chosen, None, None, :] - under)

    def _span(self, low: np.ndarray, high: np.ndarray) -> slice:
        """The pixels between the smallest ``low`` and the largest ``high``, with a margin for the edge's blend."""
        first, last = int((low.min() + 1) / self.pixel) - 2, int((high.max() + 1) / self.pixel) + 3
        return slice(max(0, first), min(self.x.shape[-1], last))


def _ellipse(x, y, rx, ry):
    """Approximate signed distance to an axis-aligned ellipse at the origin."""
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1.0) * min(rx, ry)


def _box(x, y, hx, hy, round_=0.0):
    dx, dy = np.abs(x) - (hx - round_), np.abs(y) - (hy - round_)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - round_


def _capsule(x, y, ax, ay, bx, by, radius):
    px, py, dx, dy = x - ax, y - ay, bx - ax, by - ay
    h = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0.0, 1.0)
    return np.hypot(px - h * dx, py - h * dy) - radius


def render(portraits: list[Portrait], size: int = 32) -> np.ndarray:
    """Draw portraits: [B, size, size, 3] uint8. Each image depends on its own portrait alone."""
    count = len(portraits)
    pose = np.stack([p.pose for p in portraits]).astype(np.float32)
    value = {name: np.array([p.attributes[name] for p in portraits]) for name in ATTRIBUTES}
    every = np.ones(count, bool)

    def colors(table: dict[str, tuple], attribute: str) -> np.ndarray:
        return np.array([table.get(name, (0, 0, 0)) for name in value[attribute]], np.float32)

    def fixed(rgb) -> np.ndarray:
        return np.broadcast_to(np.array(rgb, np.float32), (count, 3))

    canvas = _Canvas(count, size)
    shade = (0.92 + 0.16 * pose[:, 3])[:, None]
    skin, hair, hat = colors(SKIN, "skin") * shade, colors(HAIR, "hair_color"), colors(HAT, "hat")
    ground = colors(BACKGROUND, "background") * shade

    # Background with a soft vertical light.
    light = 1.06 - 0.12 * (canvas.y[..., None] * 0.5 + 0.5)
    canvas.rgb[:] = ground[:, None, None, :] * light

    hand = value["hand"] != "none"
    head = np.stack([(pose[:, 0] - 0.5) * 0.12 - 0.28 * hand, (pose[:, 1] - 0.5) * 0.12, 0.94 + 0.12 * pose[:, 2]], 1)

    def paint(shape, color, on=every, box=None):
        canvas.paint(shape, head, color, on, box)

    # Hair behind the head; every style leaves colour beside the face, also under a hat.
    paint(lambda x, y: _box(x, y - 0.17, 0.60, 0.66, 0.30), hair, value["hair_style"] == "long")
    curly = value["hair_style"] == "curly"
    paint(lambda x, y: np.minimum.reduce([np.hypot(x - cx, y - cy) - 0.21 for cx, cy in _CURLS]), hair, curly)
    paint(lambda x, y: _ellipse(x, y + 0.16, 0.53, 0.55), hair, box=(-0.53, -0.71, 0.53, 0.39))

    # Shoulders, neck, face; the fringe, then the hat over it.
    shirt = np.repeat(60 + 150 * pose[:, 4:5], 3, 1)
    paint(lambda x, y: _ellipse(x, y - 1.10, 0.85, 0.42), shirt, box=(-0.85, 0.68, 0.85, 1.2))
    paint(lambda x, y: _box(x, y - 0.60, 0.15, 0.25, 0.05), skin * 0.88, box=(-0.15, 0.35, 0.15, 0.85))
    paint(lambda x, y: _ellipse(x, y, 0.43, 0.56), skin, box=(-0.43, -0.56, 0.43, 0.56))
    paint(lambda x, y: np.maximum(_ellipse(x, y, 0.45, 0.58), y + 0.30), hair, box=(-0.45, -0.58, 0.45, -0.30))
    hatted = value["hat"] != "none"
    crown = (-0.52, -0.86, 0.52, -0.34)
    paint(lambda x, y: np.maximum(_ellipse(x, y + 0.36, 0.52, 0.50), y + 0.34), hat, hatted, crown)
    paint(lambda x, y: _box(x, y + 0.34, 0.66, 0.085, 0.06), hat * 0.8, hatted, (-0.66, -0.43, 0.66, -0.25))

    # Mouth, eyes, glasses.
    lips, teeth, white, pupil = (fixed(c) for c in ((160, 20, 40), (255, 255, 255), (250, 250, 250), (30, 22, 26)))
    smiling, frowning, surprised = (value["mouth"] == mouth for mouth in ATTRIBUTES["mouth"])
    paint(lambda x, y: np.maximum(np.hypot(x, y - 0.20) - 0.27, 0.20 - y), lips, smiling, (-0.27, 0.20, 0.27, 0.47))
    paint(lambda x, y: np.maximum(np.hypot(x, y - 0.22) - 0.17, 0.24 - y), teeth, smiling, (-0.17, 0.24, 0.17, 0.39))
    arc = (-0.28, 0.24, 0.28, 0.44)
    paint(lambda x, y: np.maximum(np.abs(np.hypot(x, y - 0.52) - 0.22) - 0.055, y - 0.43), lips, frowning, arc)
    paint(lambda x, y: _ellipse(x, y - 0.32, 0.115, 0.145), lips * 0.45, surprised, (-0.12, 0.17, 0.12, 0.47))
    for eye in (-0.185, 0.185):
        around = (eye - 0.11, -0.15, eye + 0.11, 0.03)
        paint(lambda x, y, eye=eye: _ellipse(x - eye, y + 0.06, 0.105, 0.085), white, every, around)
        around = (eye - 0.07, -0.13, eye + 0.07, 0.01)
        paint(lambda x, y, eye=eye: np.hypot(x - eye, y + 0.06) - 0.062, pupil, every, around)
    clear, dark = value["glasses"] == "glasses", value["glasses"] == "sunglasses"
    frame, lens, bridge = fixed((20, 20, 24)), fixed((12, 12, 16)), fixed((16, 16, 20))
    for eye in (-0.20, 0.20):
        around = (eye - 0.21, -0.26, eye + 0.21, 0.16)
        paint(lambda x, y, eye=eye: np.abs(np.hypot(x - eye, y + 0.05) - 0.175) - 0.032, frame, clear, around)
        around = (eye - 0.20, -0.20, eye + 0.20, 0.10)
        paint(lambda x, y, eye=eye: _box(x - eye, y + 0.05, 0.195, 0.145, 0.08), lens, dark, around)
    paint(lambda x, y: _box(x, y + 0.06, 0.10, 0.028), bridge, clear | dark, (-0.10, -0.09, 0.10, -0.03))

    _paint_hand(canvas, pose, skin, value["hand"])
    return np.clip(canvas.rgb + 0.5, 0, 255).astype(np.uint8)


_SIDE_CURLS = ((0.27, -0.62), (0.50, -0.40), (0.58, -0.12), (0.50, 0.15))
_CURLS = ((0.0, -0.70), *((side * x, y) for side in (-1, 1) for x, y in _SIDE_CURLS))


def _paint_hand(canvas: _Canvas, pose: np.ndarray, skin: np.ndarray, hand: np.ndarray) -> None:
    """The raised hand, in front of everything, beside the head: palm, wrist and the first n fingers."""
    frame = np.stack([0.60 + (pose[:, 5] - 0.5) * 0.10, 0.42 + (pose[:, 6] - 0.5) * 0.10, np.ones(len(pose))], 1)
    on, outline = hand != "none", skin * 0.55

    def palm(x, y):
        return np.minimum(_box(x, y, 0.25, 0.26, 0.12), _box(x, y - 0.46, 0.14, 0.30, 0.04))

    around = (-0.35, -0.35, 0.35, 0.85)
    canvas.paint(lambda x, y: palm(x, y) - 0.045, frame, outline, on, around)
    count = np.array([ATTRIBUTES["hand"].index(value) for value in hand])
    for j, base in enumerate(np.linspace(-0.24, 0.24, 5)):
        upright = (min(base, base * 1.45) - 0.1, -0.85, max(base, base * 1.45) + 0.1, -0.10)

        def finger(x, y, base=base, j=j):
            return _capsule(x, y, base, -0.20, base * 1.45, -0.74 + 0.10 * abs(j - 2), 0.062)

        canvas.paint(lambda x, y, finger=finger: finger(x, y) - 0.035, frame, outline, count > j, upright)
        canvas.paint(finger, frame, skin, count > j, upright)
    canvas.paint(palm, frame, skin, on, around)


def batch(seed: int, indices: np.ndarray, size: int = 32, hand_fraction: float = 0.25, degraded: float = 0.0):
    """Draw portraits ``indices`` of collection ``seed``: (images [B, size, size, 3] uint8, captions, labels [B, 8]).

    ``degraded``: the share of them that is degraded (``degradations``).
    """
    drawn = [portrait(seed, int(i), hand_fraction) for i in indices]
    # Chunks of 32 stay in the processor's cache, which is twice as fast as 512 at once.
    images = np.concatenate([render(drawn[i : i + 32], size) for i in range(0, len(drawn), 32)])
    if degraded:
        images, _ = degradations.degraded(images, seed, indices, degraded)
    return images, [p.caption for p in drawn], np.stack([labels(p.attributes) for p in drawn])
