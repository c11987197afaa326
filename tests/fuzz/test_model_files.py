"""Model folders and scorers' checkpoints from strangers: a fault names the file, and nothing in them is ever run."""

import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuzz.hunt import Reader, examples, hunted
from fuzz.spoil import spoil, spoilt_json

INPUTS = {
    "weights": 90,
    "network config": 60,
    "settings": 150,
    "adapter": 30,
    "text encoder": 40,
    "published folder": 40,
    "torch file": 250,
    "planted": 30,
}


class Planted:
    """Whoever unpickles this makes the folder ``ran``."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.ran),)


def torch_zip(data: bytes) -> bytes:
    """A checkpoint as torch writes it, with any pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in (("archive/data.pkl", data), ("archive/byteorder", b"little"), ("archive/version", b"3\n")):
            archive.writestr(name, member)
    return stream.getvalue()


def put(file: Path, data: bytes) -> None:
    """Replaces a file, which may be a hard link to the good one."""
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def readers(folder):
    import logging

    import diffusers
    import torch
    import transformers

    from fixtures import tiny_checkpoints
    from fixtures.clip_models import save_aesthetic, save_open_clip, save_transformers
    from rlproxi.config.sections import LoRA, Sampler, Schedule
    from rlproxi.files import link
    from rlproxi.models import lora
    from rlproxi.models.loading import load_denoiser
    from rlproxi.models.pipeline import TextToImage
    from rlproxi.models.text import build_text_encoder
    from rlproxi.models.unet import ProximalUNet
    from rlproxi.rewards.aesthetic import aesthetic_head
    from rlproxi.rewards.blip import load_network
    from rlproxi.rewards.clip_score import load_clip
    from rlproxi.rewards.open_clip import load_open_clip

    logging.disable(logging.CRITICAL)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    unet = ProximalUNet(
        sample_size=8, patch=4, channels=(32,), blocks=(1,), attention=(True,), text_dim=32, pooled_dim=32
    )
    good = TextToImage(
        unet, build_text_encoder(["a red hat"], 32, 1, 12), Schedule(), Sampler(num_inference_steps=3)
    ).save_pretrained(folder / "good")
    lora.attach(unet, LoRA(rank=2, alpha=4.0), 0)
    lora.save(unet, good)
    published = tiny_checkpoints.sd15(folder / "sd15")
    ran = folder / "ran"

    def spoilt(source: Path, name: str, read, say: str | None = None):
        """Reads a copy of a folder in which one file is other bytes."""
        place = folder / f"model-{name.replace('/', '-')}"

        def one(data):
            if not place.exists():
                link(source, place)
            put(place / name, data)
            try:
                read(place)
            finally:
                assert not ran.exists(), "it was run"

        return one

    def spoilt_any(source: Path, read):
        place = folder / f"model-{source.name}-any"

        def one(made):
            shutil.rmtree(place, ignore_errors=True)
            link(source, place)
            for name, data in made.items():
                put(place / name, data)
            try:
                read(place)
            finally:
                assert not ran.exists(), "it was run"

        return one

    def weights_of(file: Path):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        small = dict(list(header.items())[:6])
        forged = [
            b"",
            b"\xff" * 8,
            (2**62).to_bytes(8, "little") + data[8:],
            (100_000_001).to_bytes(8, "little") + data[8:],
        ]
        for shape, ends in (
            ([2**40], [0, 2**42]),
            ([2**62, 4], [0, 4]),
            ([0], [0, 0]),
            ([-1], [0, 4]),
            ([1], [2**63, 4]),
        ):
            text = json.dumps(
                {**header, next(iter(small)): {"dtype": "F32", "shape": shape, "data_offsets": ends}}
            ).encode()
            forged.append(len(text).to_bytes(8, "little") + text + body)

        def one(draw: random.Random) -> bytes:
            if draw.random() < 0.5:
                return spoil(draw, data)
            text = spoilt_json(draw, [header])
            return len(text).to_bytes(8, "little") + text + body

        return examples(forged, one)

    def json_of(*files: Path, more: Sequence[dict] = ()):
        seeds = [json.loads(file.read_text()) for file in files]
        return examples(
            [json.dumps({**seeds[0], **extra}).encode() for extra in more], lambda draw: spoilt_json(draw, seeds)
        )

    strange = [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"auto_map": {"AutoModel": "code.Planted"}},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
        {"architectures": ["os"]},
        {"architectures": "x"},
        {"model_type": "x"},
        {"torch_dtype": "x"},
        {"dtype": "float4"},
        {"_class_name": "FrozenDict"},
        {"_class_name": ["x"]},
        {"sample_size": 2**40},
    ]
    sizes = [
        {"channels": [2**20]},
        {"channels": [2**62]},
        {"blocks": [2**31]},
        {"patch": 0},
        {"channels": []},
        {"attention": [1, 2]},
        {"pooled_dim": 2**33},
        {"layers": 2**31},
        {"text_dim": 2**40},
        {"sample_size": -1},
    ]

    files = {
        "aesthetic.pth": (save_aesthetic(folder)[0], aesthetic_head),
        "hps.pt": (save_open_clip(folder / "hps.pt"), load_open_clip),
        "ImageReward.pt": (folder / "plain.pt", load_network),
    }
    torch.save({"text_encoder.embeddings.weight": torch.zeros(3, 4)}, folder / "plain.pt")
    pickles = [pickle.dumps(Planted(ran), protocol) for protocol in (0, 2, 4)]
    pickles += [
        pickle.dumps({"state_dict": Planted(ran)}),
        b"cos\nmkdir\n(V" + str(ran).encode() + b"\ntR.",
        b"\x80\x02" + b"(" * 200_000 + b".",
        b"\x80\x02]" + b"]a" * 50_000 + b".",
        b"\x80\x04\x8d" + (2**40).to_bytes(8, "little"),
        b"\x80\x02T" + b"\xff\xff\xff\x7f",
        b"\x80\x02r\xff\xff\xff\x7f.",
    ]

    def torch_file(draw: random.Random, i: int):
        name = sorted(files)[i % 3]
        if i < 6 * len(pickles):
            data = pickles[i // 6]
            return name, data if i // 3 % 2 else torch_zip(data)
        return name, spoil(draw, files[name][0].read_bytes())

    def read_torch(made):
        name, data = made
        (folder / "torch.pt").write_bytes(data)
        try:
            files[name][1](folder / "torch.pt")
        finally:
            assert not ran.exists(), "it was run"

    def planted(draw: random.Random, i: int):
        """A published folder where weights are pickles, and where code lies beside the config."""
        data = draw.choice([*pickles[:5], *(torch_zip(p) for p in pickles[:5])])
        part, stem = draw.choice(
            (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model"))
        )
        made = {f"{part}/{stem}.bin": data}
        if draw.random() < 0.7:
            safe = {"pytorch_model": "model"}.get(stem, stem)
            made[f"{part}/{safe}.safetensors.index.json"] = json.dumps(
                {
                    "metadata": {},
                    "weight_map": {"x": draw.choice((f"{stem}.bin", "../../hps.pt", "/etc/passwd", "x\0"))},
                }
            ).encode()
        config = json.loads((published / part / "config.json").read_text())
        code = f"import os\nos.mkdir({str(ran)!r})\nclass Planted: pass\n".encode()
        tokenizer = json.loads((published / "tokenizer" / "tokenizer_config.json").read_text())
        made[f"{part}/config.json"] = json.dumps(
            {**config, "auto_map": {"AutoModel": "code.Planted", "AutoConfig": "code.Planted"}}
        ).encode()
        made["tokenizer/tokenizer_config.json"] = json.dumps(
            {
                **tokenizer,
                **draw.choice(
                    (
                        {"auto_map": {"AutoTokenizer": ["code.Planted", None]}},
                        {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": ["code.Planted", None]}},
                        {"chat_template": "{{ ''.__class__.__mro__ }}"},
                        {"tokenizer_class": "os"},
                    )
                ),
            }
        ).encode()
        made.update({f"{place}/code.py": code for place in (part, "tokenizer")})
        if draw.random() < 0.5:
            made[f"{part}/{'model' if part == 'text_encoder' else stem}.safetensors"] = data
        return made

    both = save_transformers(folder / "clip")

    def clip_too(place: Path):
        """The same weights' places in a scorer's folder, and in a model's."""
        for file in list(place.rglob("*.bin")):
            scorer = place / "scorer"
            link(Path(both), scorer)
            for other in scorer.glob("*.safetensors"):
                other.unlink()
            put(scorer / "pytorch_model.bin", file.read_bytes())
            with pytest.raises(ValueError, match="scorer holds no CLIP"):
                load_clip(str(scorer))
        TextToImage.from_pretrained(place)

    both_errors, here = (ValueError, FileNotFoundError), str(folder)
    return {
        "weights": Reader(
            weights_of(good / "unet" / "diffusion_pytorch_model.safetensors"),
            spoilt(good, "unet/diffusion_pytorch_model.safetensors", load_denoiser),
            both_errors,
            here,
        ),
        "network config": Reader(
            json_of(good / "unet" / "config.json", more=sizes + strange),
            spoilt(good, "unet/config.json", load_denoiser),
            both_errors,
            here,
        ),
        "settings": Reader(
            json_of(good / "sampler.json"),
            spoilt(good, "sampler.json", TextToImage.from_pretrained),
            both_errors,
            "sampler.json",
        ),
        "adapter": Reader(
            lambda draw, i: (
                json_of(good / "lora" / lora.SETTINGS)(draw, i)
                if i % 2
                else weights_of(good / "lora" / lora.WEIGHTS)(draw, i)
            ),
            lambda data: spoilt(good, f"lora/{lora.SETTINGS if data[:1] in b'{[' else lora.WEIGHTS}", load_denoiser)(
                data
            ),
            both_errors,
            here,
        ),
        "text encoder": Reader(
            lambda draw, i: {
                name: spoilt_json(draw, [json.loads((good / name).read_text())])
                for name in [
                    draw.choice(
                        ["text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"]
                    )
                ]
            },
            spoilt_any(good, TextToImage.from_pretrained),
            both_errors,
            here,
        ),
        "published folder": Reader(
            lambda draw, i: {
                name: spoilt_json(draw, [json.loads((published / name).read_text())])
                for name in [
                    draw.choice(
                        [
                            "model_index.json",
                            "scheduler/scheduler_config.json",
                            "vae/config.json",
                            "unet/config.json",
                            "text_encoder/config.json",
                            "tokenizer/tokenizer_config.json",
                        ]
                    )
                ]
            },
            spoilt_any(published, TextToImage.from_pretrained),
            both_errors,
            here,
        ),
        "torch file": Reader(torch_file, read_torch, (ValueError,), "torch.pt"),
        "planted": Reader(planted, spoilt_any(published, clip_too), both_errors, here),
    }


def test_models_from_strangers():
    hunted("test_model_files", INPUTS)


@pytest.mark.exhaustive
def test_more_models_from_strangers():
    hunted("test_model_files", {name: 20 * count for name, count in INPUTS.items()})
