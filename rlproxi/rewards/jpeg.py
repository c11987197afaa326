"""A reward that needs no model: how small (or large) the image's JPEG is (DDPO's first rewards)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from .registry import register


@register("jpeg")
class JPEGReward:
    """Minus the size in kilobytes (1000 bytes) of the image as a JPEG; plus it with ``incompressible``.

    Args:
        quality: of the JPEG, 1 to 100; 95 is DDPO's (Black et al., arXiv 2305.13301).
        incompressible: whether large is good.
    """

    def __init__(self, quality: int = 95, incompressible: bool = False):
        if not 1 <= quality <= 100:  # PIL takes others for something else
            raise ValueError(f"quality is {quality}; it must lie between 1 and 100")
        self.quality = quality
        self.sign = 1.0 if incompressible else -1.0

    def score(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """images uint8 [B, H, W, 3] -> float32 [B], in kilobytes; prompts are not used."""
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=self.quality)
            sizes.append(buffer.tell() / 1000)
        return self.sign * np.array(sizes, np.float32)
