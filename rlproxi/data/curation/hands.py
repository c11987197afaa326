"""The hand-focused subset, by words of captions and by detection. It is a tag and drops nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...config.curation import HandDetector
from . import models

KEY = "curate.hands.detector.model"


def hand_words(caption: str, words: Sequence[str]) -> list[str]:
    """Those of ``words`` that a caption has as whole words, in any case, in the order of ``words``."""
    return [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE)]


class HandFinder:
    """An object-detection model. Raises FileNotFoundError or ValueError for one that cannot be used."""

    def __init__(self, settings: HandDetector, device: str = "cpu"):
        import transformers
        from transformers.models.auto import modeling_auto

        self.settings, self.device = settings, torch.device(device)
        config = models.load(settings.model, KEY, transformers.AutoConfig.from_pretrained)
        self.zero_shot = config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
        kind: Any = transformers.AutoModelForObjectDetection
        processor: Any = transformers.AutoImageProcessor
        if self.zero_shot:
            kind, processor = transformers.AutoModelForZeroShotObjectDetection, transformers.AutoProcessor
        self.wanted = {label.lower() for label in settings.labels}
        known = {str(name).lower() for name in config.id2label.values()}
        if not self.zero_shot and not self.wanted & known:
            classes = ", ".join(sorted(known)[:20])
            message = f"{settings.model!r} knows none of {settings.labels}; its classes are {classes}"
            raise ValueError(f"curate.hands.detector.labels: {message}")
        self.processor = models.load(settings.model, KEY, processor.from_pretrained)
        self.model = models.load(settings.model, KEY, kind.from_pretrained).eval().to(self.device)

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[dict]]:
        """The hands of each image, uint8 [H, W, 3] of any sizes: {x, y, w, h, confidence, label} in pixels."""
        size = self.settings.batch
        return [hands for k in range(0, len(images), size) for hands in self._detect(images[k : k + size])]

    def _detect(self, images: Sequence[np.ndarray]) -> list[list[dict]]:
        text = {"text": [self._queries() for _ in images], "padding": True} if self.zero_shot else {}
        inputs = self.processor(images=list(images), return_tensors="pt", **text).to(self.device)
        with torch.no_grad():
            outputs = self.model(**inputs)
        sizes = torch.tensor([image.shape[:2] for image in images])
        results = self._results(outputs, inputs, sizes)
        return [self._hands(result) for result in results]

    def _queries(self) -> Any:
        """A zero-shot model's query: a list of texts, or one text of sentences if it grounds phrases."""
        if "input_ids" in inspect.signature(self.processor.post_process_grounded_object_detection).parameters:
            return " ".join(f"{label.lower()}." for label in self.settings.labels)
        return list(self.settings.labels)

    def _results(self, outputs: Any, inputs: Any, sizes: torch.Tensor) -> list[dict]:
        given = {"outputs": outputs, "threshold": self.settings.min_score, "target_sizes": sizes}
        if not self.zero_shot:
            return self.processor.post_process_object_detection(**given)
        process = self.processor.post_process_grounded_object_detection
        if "input_ids" in inspect.signature(process).parameters:
            given["input_ids"] = inputs["input_ids"]
        else:
            given["text_labels"] = [list(self.settings.labels) for _ in sizes]
        return process(**given)

    def _hands(self, result: dict) -> list[dict]:
        names = result.get("text_labels") if self.zero_shot else None
        if names is None:
            names = [self.model.config.id2label[int(i)] for i in result["labels"]]
        hands, scores, boxes = [], result["scores"].tolist(), result["boxes"].tolist()
        for name, score, (left, top, right, bottom) in zip(names, scores, boxes, strict=True):
            if self.zero_shot or str(name).lower() in self.wanted:
                box = {"x": round(left), "y": round(top), "w": round(right - left), "h": round(bottom - top)}
                hands.append({**box, "confidence": round(score, 4), "label": str(name)})
        return hands
