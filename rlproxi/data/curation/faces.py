"""Faces in an image: their position, size and confidence, by OpenCV's detectors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...config.curation import Faces

#: Pixels of a Haar cascade's window: it cannot find smaller faces.
_WINDOW = 24
#: Longest side of the images that YuNet gets, in pixels: it is trained for faces of 10 to 300 pixels.
_YUNET_SIDE = 640
#: An image, uint8 [H, W, 3] -> its faces {x, y, w, h, confidence} in pixels, the largest first.
FaceDetector = Callable[[np.ndarray], list[dict]]


def load_opencv() -> Any:
    """The module cv2. Raises ImportError with the remedy."""
    try:
        import cv2
    except ImportError as error:
        remedy = 'pip install "rlproxi[data]", or set curate.faces=null'
        raise ImportError(f"face detection needs OpenCV ({error}): {remedy}") from None
    return cv2


def build_detector(settings: Faces) -> FaceDetector:
    """The detector of the config. Raises ImportError without OpenCV, FileNotFoundError or ValueError for its file."""
    return Haar(settings) if settings.detector == "haar" else YuNet(settings)


class Haar:
    """A Viola-Jones cascade. The confidence is the sum of the last stage's votes, higher for clearer faces."""

    def __init__(self, settings: Faces):
        cv2 = self.cv2 = load_opencv()
        if not hasattr(cv2, "CascadeClassifier"):
            remedy = 'pip install "rlproxi[data]" (version 4), or set curate.faces.detector=yunet and its model'
            raise ImportError(f"OpenCV {cv2.__version__} has no cascades: {remedy}")
        file = Path(settings.model or Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml")
        if not file.is_file():
            raise FileNotFoundError(f"curate.faces.model: cascade {str(file)!r} does not exist")
        self.cascade = cv2.CascadeClassifier()
        with suppress(cv2.error, SystemError):
            self.cascade.load(str(file))
        if self.cascade.empty():
            raise ValueError(f"curate.faces.model: {file} is no cascade of OpenCV")
        # Well below min_size, so that reasons name the size found.
        self.smallest = max(_WINDOW, settings.min_size // 3)

    def __call__(self, image: np.ndarray) -> list[dict]:
        grey = self.cv2.cvtColor(image, self.cv2.COLOR_RGB2GRAY)
        boxes, _, sums = self.cascade.detectMultiScale3(
            grey, scaleFactor=1.1, minNeighbors=3, minSize=(self.smallest, self.smallest), outputRejectLevels=True
        )
        return _sorted(np.reshape(boxes, (-1, 4)), np.ravel(sums), 1.0)


class YuNet:
    """OpenCV's small face network (Wu, Peng & Yu, "YuNet: a tiny millisecond-level face detector", 2023)."""

    def __init__(self, settings: Faces):
        cv2, model = load_opencv(), settings.model or ""
        self.cv2 = cv2
        if not Path(model).is_file():
            remedy = "download face_detection_yunet_2023mar.onnx of OpenCV's model zoo"
            raise FileNotFoundError(f"curate.faces.model: {model!r} does not exist; {remedy}")
        try:
            # Half of the threshold, so that reasons distinguish an uncertain face from no face.
            side = (_YUNET_SIDE, _YUNET_SIDE)
            self.network = cv2.FaceDetectorYN.create(model, "", side, settings.confidence / 2)
        except cv2.error as error:
            raise ValueError(f"curate.faces.model: OpenCV cannot read {model} ({str(error).strip()})") from None

    def __call__(self, image: np.ndarray) -> list[dict]:
        height, width = image.shape[:2]
        scale = min(1.0, _YUNET_SIDE / max(height, width))
        bgr = self.cv2.cvtColor(image, self.cv2.COLOR_RGB2BGR)
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            bgr = self.cv2.resize(bgr, size, interpolation=self.cv2.INTER_AREA)
        self.network.setInputSize(bgr.shape[1::-1])
        found = self.network.detect(bgr)[1]
        found = np.zeros((0, 15)) if found is None else found
        return _sorted(found[:, :4], found[:, 14], 1 / scale)


def _sorted(boxes: np.ndarray, confidences: np.ndarray, scale: float) -> list[dict]:
    faces = [
        dict(zip("xywh", (round(float(v) * scale) for v in box), strict=True), confidence=round(float(c), 4))
        for box, c in zip(boxes, confidences, strict=True)
    ]
    return sorted(faces, key=lambda f: (-size(f), f["x"], f["y"]))


def size(face: dict) -> int:
    """The shorter side of a face in pixels."""
    return min(face["w"], face["h"])


def objection(faces: list[dict], settings: Faces) -> str | None:
    """The reason to drop an image with these faces; None to keep it."""
    certain = [face for face in faces if face["confidence"] >= settings.confidence]
    if not certain:
        best = max((face["confidence"] for face in faces), default=None)
        return "no face" if best is None else f"face confidence {best:.5g}, needs {settings.confidence:g}"
    largest = max(size(face) for face in certain)
    if largest < settings.min_size:
        return f"face {largest} px, needs {settings.min_size}"
    if settings.max_faces is not None and len(certain) > settings.max_faces:
        return f"{len(certain)} faces, at most {settings.max_faces}"
    return None
