"""Small random models of captions and hands, saved in the formats in which the real ones are published."""

from __future__ import annotations

from pathlib import Path

import torch

import clip_models

_WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC] a photo of person with hand hands red blue hat smiling cat the "
          "on in describe this picture").split()


def _drawn(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that the answer depends on the image."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3, generator=draw)
    return model.eval()


def save_blip(folder: Path) -> Path:
    """As Salesforce/blip-image-captioning-base: BlipForConditionalGeneration with a BERT tokenizer."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]", additional_special_tokens=["[ENC]"])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "projection_dim": 32,
                     "max_position_embeddings": 64, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
                     "pad_token_id": 0},
        vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=32, image_text_hidden_size=32)
    _drawn(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """As llava-hf's: LlavaForConditionalGeneration, a decoder that is asked in a chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                              PreTrainedTokenizerFast)

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:",
                                                    *_WORDS[7:]])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", additional_special_tokens=["<image>"])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": 32, "patch_size": 16,
                       "projection_dim": 32},
        text_config={"model_type": "llama", **tower, "vocab_size": len(vocabulary), "num_key_value_heads": 2,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        image_token_id=4, vision_feature_layer=-1)
    _drawn(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    template = ("{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
                "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(images, tokenizer, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
                   num_additional_image_tokens=1, chat_template=template).save_pretrained(folder)
    return folder


def save_yolos(folder: Path) -> Path:
    """As hustvl/yolos-tiny, with the classes person and hand."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         image_size=[64, 64], patch_size=16, num_detection_tokens=8, id2label={0: "person", 1: "Hand"},
                         label2id={"person": 0, "Hand": 1})
    _drawn(YolosForObjectDetection(config)).save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_owlvit(folder: Path) -> Path:
    """As google/owlvit-base-patch32: zero-shot, with CLIP's tokenizer."""
    from transformers import (AutoTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor,
                              OwlViTProcessor)

    tokenizer = AutoTokenizer.from_pretrained(clip_models.save_tokenizer(folder))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OwlViTConfig(text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
                                       "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                                       "pad_token_id": tokenizer.pad_token_id},
                          vision_config={**tower, "image_size": 64, "patch_size": 16}, projection_dim=32)
    _drawn(OwlViTForObjectDetection(config)).save_pretrained(folder)
    OwlViTProcessor(OwlViTImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder
