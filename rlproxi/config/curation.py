"""Section ``curate`` of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import Section

#: What a caption says where hands are in the picture; whole words, in any case.
HAND_WORDS = tuple(
    word + ending
    for word in ("hand", "finger", "fingertip", "thumb", "palm", "fist", "knuckle", "fingernail", "handshake")
    for ending in ("", "s")
)

#: Smallest confidence of a face where the config names none, by detector. A cascade's is the last stage's sum, no
#: probability (docs/curation.md tells how it was chosen); YuNet's is a probability, and 0.9 its authors' default.
CONFIDENCE = {"haar": 4.0, "yunet": 0.9}


class Duplicates(Section):
    """Which images count as copies of one picture."""

    distance: int = Field(
        4,
        ge=0,
        le=16,
        description="Images whose 64-bit perceptual hashes differ in at most so many bits are the "
        "same picture; the largest is kept.",
    )


class Faces(Section):
    """Which images count as portraits."""

    detector: Literal["haar", "yunet"] = Field(
        "haar", description="haar: an OpenCV cascade; yunet: OpenCV's YuNet network, whose file `model` names."
    )
    model: str | None = Field(
        None,
        description="The detector's file: a cascade (.xml) or YuNet (.onnx); null: the frontal cascade inside "
        "OpenCV's wheel.",
    )
    min_size: int = Field(128, ge=24, description="The largest face is at least so many pixels wide and high.")
    min_confidence: float | None = Field(
        None,
        description="Less certain detections do not count; null: 4 for haar (a sum, not a probability), 0.9 for yunet.",
    )
    max_faces: int | None = Field(None, ge=1, description="Images with more faces are dropped; null: any number.")

    @model_validator(mode="after")
    def _file(self) -> Faces:
        if self.detector == "yunet" and self.model is None:
            raise ValueError(
                "detector is 'yunet' but model is null: set it to the path of "
                "face_detection_yunet_2023mar.onnx (OpenCV's model zoo)"
            )
        return self

    @property
    def confidence(self) -> float:
        """The smallest confidence that counts."""
        return CONFIDENCE[self.detector] if self.min_confidence is None else self.min_confidence


class Filter(Section):
    """One scorer with bounds on its score."""

    name: str = Field(
        description="What the manifest calls it: a registered scorer (docs/rewards/), or any word with `scorer`."
    )
    scorer: str | None = Field(None, description="The registered scorer; null: `name` is one.")
    params: dict[str, Any] = Field({}, description="What the scorer's constructor takes (docs/rewards/).")
    min: float | None = Field(None, allow_inf_nan=False, description="Images that score less are dropped; null: none.")
    max: float | None = Field(None, allow_inf_nan=False, description="Images that score more are dropped; null: none.")

    @model_validator(mode="after")
    def _bounds(self) -> Filter:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"filter {self.name!r}: min {self.min} is above max {self.max}, so nothing would pass")
        return self

    @property
    def kind(self) -> str:
        """The registered scorer's name."""
        return self.scorer or self.name


class Caption(Section):
    """A vision-language model that writes new captions."""

    model: str = Field(
        description="A vision-language model of transformers: a folder or a hub id (BLIP, BLIP-2, LLaVA, Qwen-VL, ...)."
    )
    prompt: str | None = Field(
        None,
        description="What it is asked; {caption} stands for the original caption. null: no text, for models "
        "that only caption.",
    )
    max_tokens: int = Field(128, ge=1, description="Longest caption, in the model's tokens.")
    batch: int = Field(8, ge=1, description="Images captioned in one call.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="The model's arithmetic. auto: bfloat16 where it is fast."
    )


class HandDetector(Section):
    """A network that finds hands."""

    model: str = Field(
        description="An object-detection model of transformers, zero-shot ones too (OWL-ViT, Grounding "
        "DINO): a folder or a hub id."
    )
    labels: list[str] = Field(
        ["hand"], min_length=1, description="Its classes that mean a hand; for a zero-shot model, what it looks for."
    )
    min_score: float = Field(0.5, ge=0, le=1, description="Detections below this do not count.")
    batch: int = Field(8, ge=1, description="Images looked at in one call.")


class Hands(Section):
    """How the hand-focused subset is tagged."""

    words: list[str] = Field(
        list(HAND_WORDS),
        description="Words of the original or the new caption that tag an image 'hands'; []: captions do not count.",
    )
    detector: HandDetector | None = Field(
        None, description="Tags by looking at the image as well; null: captions alone."
    )


class Curate(Section):
    """From raw image-text shards to filtered, re-captioned, tagged ones (docs/curation.md)."""

    urls: list[str] = Field(
        [],
        description="Raw shards: tars in img2dataset's layout or parquet files: paths, folders, globs, "
        "{00000..00099} ranges.",
    )
    out: str | None = Field(
        None,
        description="Folder of the curated shards, the manifest and the statistics page; on a cluster, storage "
        "all nodes share. null: <run directory>/curated.",
    )
    min_size: int = Field(256, ge=1, description="The shorter side has at least so many pixels.")
    max_aspect: float = Field(2.0, ge=1, description="The longer side is at most so many times the shorter one.")
    max_pixels: int = Field(
        64_000_000, ge=1, description="Images with more pixels are not decoded, and count as unreadable."
    )
    faces: Faces | None = Field(Faces(), description="Only images with a face; null: any image.")
    filters: list[Filter] = Field(
        [], description="Scorers with bounds, in this order: {name, scorer, params, min, max}."
    )
    duplicates: Duplicates | None = Field(
        Duplicates(), description="One image of each picture, over all shards; null: all."
    )
    caption: Caption | None = Field(None, description="New captions by a vision-language model; null: captions stay.")
    hands: Hands | None = Field(Hands(), description="Tags the hand-focused subset; drops nothing. null: no tags.")
    unreadable: Literal["stop", "skip"] = Field(
        "stop",
        description="Shards that cannot be opened: stop the job once all others are examined, or leave them out.",
    )
    samples_per_shard: int = Field(
        10_000, ge=1, le=10_000, description="Samples of each curated shard; the last has the rest."
    )
    workers: int = Field(2, ge=1, description="Processes that work on shards side by side; each loads the models once.")
    num_cpus: float = Field(1.0, ge=0, description="CPUs that Ray counts for each; also its threads.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of each; may be a fraction.")
    batch: int = Field(
        32, ge=1, description="Decoded images a worker holds at once; those of one size are scored together."
    )
    examples: int = Field(6, ge=0, le=50, description="Pictures of the statistics page for each stage.")

    @model_validator(mode="after")
    def _names(self) -> Curate:
        names = [f.name for f in self.filters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"filters: {', '.join(twice)} appears twice; give each a name of its own and set scorer: {twice[0]}"
            )
        return self
