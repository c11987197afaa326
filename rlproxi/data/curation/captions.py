"""New captions from a vision-language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...config.curation import Caption
from ...models.precision import compute_dtype
from . import models

KEY = "curate.caption.model"


class Captioner:
    """A caption model, decoded greedily. Raises FileNotFoundError or ValueError for one that cannot be used."""

    def __init__(self, settings: Caption, device: str = "cpu"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.settings, self.device = settings, torch.device(device)
        self.dtype = compute_dtype(settings.precision, self.device)
        load = partial(models.load, settings.model, KEY)
        self.processor = load(partial(AutoProcessor.from_pretrained, trust_remote_code=False))
        kind = AutoModelForImageTextToText
        self.model = load(partial(kind.from_pretrained, dtype=self.dtype, trust_remote_code=False))
        self.model.eval().to(self.device)
        self.chats = getattr(self.processor, "chat_template", None) is not None
        if self.chats and settings.prompt is None:
            remedy = "set it to a question, for example 'Describe this picture of a person in one detailed sentence.'"
            raise ValueError(f"curate.caption.prompt is not set, but {settings.model!r} is a chat model: {remedy}")
        if self.chats:
            self.processor.tokenizer.padding_side = "left"  # answers begin where questions end

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[str]:
        """New captions of images, uint8 [H, W, 3] of any sizes; an empty answer leaves the old caption."""
        answers, template = list(captions), self.settings.prompt
        prompts = [None if template is None else template.replace("{caption}", c) for c in captions]
        for chosen in self._batches(prompts):
            texts = self._answer([Image.fromarray(images[i]) for i in chosen], [prompts[i] for i in chosen])
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = " ".join(text.split()) or captions[i]
        return answers

    def _batches(self, prompts: Sequence[str | None]) -> list[list[int]]:
        """Indices that form batches; of models that cannot pad on the left (BLIP), those with prompts of one length."""
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            known = prompt is None or self.chats
            groups.setdefault(0 if known else len(self.processor.tokenizer(prompt)["input_ids"]), []).append(i)
        size = self.settings.batch
        return [group[k : k + size] for group in groups.values() for k in range(0, len(group), size)]

    def _answer(self, images: list[Image.Image], prompts: list[str | None]) -> list[str]:
        inputs = self._inputs(images, prompts).to(self.device, self.dtype)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False)
        asked = inputs.get("input_ids")
        # Decoder-only models repeat the question. BLIP's answer begins with the prompt, which stays.
        if asked is not None and torch.equal(tokens[:, : asked.shape[1]], asked):
            tokens = tokens[:, asked.shape[1] :]
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _inputs(self, images: list[Image.Image], prompts: list[str | None]) -> Any:
        if not self.chats:
            text = {} if prompts[0] is None else {"text": prompts}
            return self.processor(images=images, return_tensors="pt", **text)
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
        return self.processor.apply_chat_template(chats, add_generation_prompt=True, **options)
