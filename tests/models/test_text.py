import json
import shutil

import pytest
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from fixtures import tiny_checkpoints as tiny
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import load_encoder
from rlproxi.models.text import TextEncoder, TextStates, build_text_encoder

CAPTIONS = ["A photo of a cat", "", " An ASTRONAUT riding a horse, 8k", "a very long prompt " * 200, "£ 猫"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints by name, each made once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def folder(name: str, **options):
        key = name + "".join(f"-{k}={v}" for k, v in options.items())
        if key not in made:
            made[key] = getattr(tiny, name)(root / key, **options)
        return made[key]

    return folder


def diffusers_answer(folder, captions):
    """(text, null): TextStates as the checkpoint's own pipeline encodes its prompts, and no negative prompt."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    with torch.no_grad():
        if name == "StableDiffusionPipeline":
            pair = StableDiffusionPipeline.from_pretrained(folder).encode_prompt(captions, "cpu", 1, True)
            return [TextStates(x, x[:, 0], torch.ones(x.shape[:2])) for x in pair]
        if name == "StableDiffusionXLPipeline":
            out = StableDiffusionXLPipeline.from_pretrained(folder).encode_prompt(captions, device="cpu")
            return [TextStates(x, p, torch.ones(x.shape[:2])) for x, p in (out[::2], out[1::2])]
        if name == "StableDiffusion3Pipeline":
            left_out = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
            out = StableDiffusion3Pipeline.from_pretrained(folder, **left_out).encode_prompt(captions, None, None)
            return [TextStates(x, p, torch.ones(x.shape[:2])) for x, p in (out[::2], out[1::2])]
        kind, length = (PixArtSigmaPipeline, 300) if "Sigma" in name else (PixArtAlphaPipeline, 120)
        out = kind.from_pretrained(folder).encode_prompt(captions)
        assert out[0].shape[1] == length
        return [TextStates(x, torch.zeros(len(x), 0), m.float()) for x, m in (out[:2], out[2:])]


def assert_same(mine: TextStates, theirs: TextStates, pooled: bool = True):
    assert torch.allclose(mine.states, theirs.states, atol=1e-6, rtol=0)
    assert torch.equal(mine.mask, theirs.mask)
    assert not pooled or torch.allclose(mine.pooled, theirs.pooled, atol=1e-6, rtol=0)
    assert {x.dtype for x in (mine.states, mine.pooled, mine.mask)} == {torch.float32}


KINDS = [
    ("sd15", {}),
    ("sdxl", {}),
    ("sdxl", {"force_zeros_for_empty_prompt": False}),
    ("sd3", {}),
    ("sd3", {"with_t5": False}),
    ("pixart", {}),
    ("pixart", {"sigma": True}),
]


@pytest.mark.parametrize("name, options", KINDS)
def test_a_stack_gives_what_the_pipeline_of_diffusers_gives(folders, tmp_path, name, options):
    folder = folders(name, **options)
    stack = load_encoder(folder)
    text, null = diffusers_answer(folder, CAPTIONS)
    mine = stack.encode(CAPTIONS)
    assert_same(mine, text, pooled=name != "sd15")  # Stable Diffusion 1's pipeline has no pooled vector
    assert_same(stack.null_like(mine), null, pooled=name != "sd15")
    assert mine.states.std() > 0.1 and mine.time_ids is None
    assert ModelFolder.at(folder).text_shape[1:] == (mine.states.shape[-1], mine.pooled.shape[-1])
    if name == "sdxl":
        assert stack.null_like(mine).states.any() != options.get("force_zeros_for_empty_prompt", True)

    # Saved alone, without the pipeline's index and denoiser, it is the same stack.
    stack.save_pretrained(tmp_path / "text")
    again = load_encoder(tmp_path / "text")
    assert type(again) is type(stack) and again.settings == stack.settings
    for a, b in zip((again.encode(CAPTIONS), again.null_like(mine)), (mine, stack.null_like(mine))):
        assert torch.equal(a.states, b.states) and torch.equal(a.pooled, b.pooled) and torch.equal(a.mask, b.mask)

    index = json.loads((folder / "model_index.json").read_text())
    for part, found in stack.components().items():
        assert index[part] == ([None, None] if found is None else ["transformers", type(found).__name__])
    assert {part for part in index if part.startswith(("text", "token"))} == set(stack.components())


def test_the_pooled_vector_of_stable_diffusion_1_is_that_of_its_end_token(folders):
    stack = load_encoder(folders("sd15"))
    text = stack.encode(["a photo of a cat"])
    end = stack.parts["tokenizer"]("a photo of a cat")["input_ids"]
    assert end[-1] == stack.parts["tokenizer"].eos_token_id
    assert torch.equal(text.pooled[0], text.states[0, len(end) - 1])


def test_an_attention_mask_is_passed_where_the_checkpoint_asks_for_one(folders, tmp_path):
    folder = shutil.copytree(folders("sd15"), tmp_path / "masked")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"use_attention_mask": True}))
    mine, theirs = load_encoder(folder).encode(CAPTIONS), diffusers_answer(folder, CAPTIONS)[0]
    assert_same(mine, theirs, pooled=False)
    assert not torch.allclose(mine.states, load_encoder(folders("sd15")).encode(CAPTIONS).states, atol=1e-3)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart"])
def test_an_answer_depends_neither_on_the_cache_nor_on_the_company(folders, name):
    cached, bare = load_encoder(folders(name)), load_encoder(folders(name), cache_bytes=0)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # as a sampler calls it
        first = cached.encode(CAPTIONS[:2])
        null = cached.null_like(first)
    mixed = cached.encode(CAPTIONS[::-1] + CAPTIONS)
    assert not mixed.states.is_inference() and len(cached.rows) == len(CAPTIONS) and len(bare.rows) == 0
    for i, caption in enumerate(CAPTIONS[::-1] + CAPTIONS):
        alone = bare.encode([caption])
        for part in ("states", "pooled", "mask"):
            assert torch.equal(getattr(mixed, part)[i], getattr(alone, part)[0])
    assert torch.equal(first.states, mixed[torch.tensor([5, 6])].states)
    assert torch.equal(null.states, bare.null_like(first).states)
    groups = cached.groups(CAPTIONS[:2], 3)
    assert torch.equal(groups.states, first.states.repeat_interleave(3, 0)) and len(groups) == 6


def test_the_built_in_encoders_answer_does_not_depend_on_a_callers_autocast():
    encoder, other = (build_text_encoder(CAPTIONS, 32, 1) for _ in range(2))
    plain = encoder.encode(CAPTIONS)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        text = encoder.encode(CAPTIONS)
        null = other.null_like(text)
    assert torch.equal(text.states, plain.states) and torch.equal(text.pooled, plain.pooled)
    assert torch.equal(null.states, encoder.null_like(plain).states)


def test_a_kept_caption_is_not_encoded_again_and_not_changed_by_its_reader(folders):
    stack = load_encoder(folders("sd15"))
    calls = []
    stack.parts["text_encoder"].register_forward_hook(lambda *_: calls.append(1))
    first = stack.encode(["cat", "dog", "cat"])
    kept = first.states.clone()
    first.states.zero_()
    assert torch.equal(stack.encode(["cat", "dog", "cat"]).states, kept) and len(calls) == 2
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])


def test_the_cache_holds_at_most_its_bytes_and_forgets_the_least_recently_used(folders):
    row = load_encoder(folders("sd15")).encode(["a"])
    size = row.states.nbytes + row.pooled.nbytes + row.mask.nbytes
    stack = load_encoder(folders("sd15"), cache_bytes=3 * size)
    for name in "abca":
        stack.encode([name])
    assert list(stack.rows) == ["b", "c", "a"]
    stack.encode(["d"])
    assert list(stack.rows) == ["c", "a", "d"]
    small = load_encoder(folders("sd15"), cache_bytes=size - 1)
    assert torch.equal(small.encode(["a"]).states, row.states) and not small.rows


def test_bfloat16_weights_give_float32_states_near_those_of_float32(folders):
    for name in ("sd3", "pixart"):
        full, half = load_encoder(folders(name)), load_encoder(folders(name), dtype=torch.bfloat16)
        # Layer norms aside, where T5 keeps a precision of its own.
        assert all(p.dtype == torch.bfloat16 for p in half.parts["text_encoder"].parameters() if p.ndim > 1)
        a, b = full.encode(CAPTIONS).states, half.encode(CAPTIONS).states
        assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.03


def test_the_weights_are_frozen(folders):
    stack = load_encoder(folders("sd3"))
    for model in (stack.parts["text_encoder"], stack.parts["text_encoder_2"], stack.parts["text_encoder_3"]):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not stack.encode(["a cat"]).states.requires_grad


def test_half_precision_files_alone_are_found_and_held_in_float32(folders, tmp_path):
    folder = shutil.copytree(folders("sd15"), tmp_path / "half")
    load_encoder(folder).parts["text_encoder"].half().save_pretrained(folder / "text_encoder", variant="fp16")
    (folder / "text_encoder" / "model.safetensors").unlink()
    stack = load_encoder(folder)
    assert stack.parts["text_encoder"].dtype == torch.float32
    a, b = stack.encode(CAPTIONS).states, load_encoder(folders("sd15")).encode(CAPTIONS).states
    assert 0 < (a - b).norm() / b.norm() < 0.003


def test_unknown_words(folders):
    assert load_encoder(folders("pixart")).unknown_words("a cat Größe") == ["Größe"]
    assert load_encoder(folders("sd3")).unknown_words("a cat Größe") == []  # its CLIPs spell by bytes
    assert build_text_encoder(["a cat"]).unknown_words("a dog") == ["dog"]


def test_the_built_in_encoder_is_loaded_as_before(tmp_path):
    encoder = build_text_encoder(["a cat", "a dog"])
    encoder.save_pretrained(tmp_path)
    for index in (None, {"_class_name": "TextToImage"}):
        if index:
            (tmp_path / "model_index.json").write_text(json.dumps(index))
        loaded = load_encoder(tmp_path)
        assert type(loaded) is TextEncoder
        assert torch.equal(loaded.encode(["a cat"]).states, encoder.encode(["a cat"]).states)
    assert ModelFolder.at(tmp_path).text_shape[1:] == (64, 64)
    assert set(encoder.components()) == {"text_encoder", "tokenizer"} and encoder.to("cpu") is encoder


def test_sizes_of_the_image_go_where_the_text_goes():
    generator = torch.Generator().manual_seed(0)
    rows = TextStates(*(torch.randn(shape, generator=generator) for shape in ((2, 5, 4), (2, 3), (2, 5), (2, 6))))
    assert torch.equal(rows.repeat(2).time_ids, rows.time_ids[[0, 0, 1, 1]])
    assert torch.equal(rows[1:].time_ids, rows.time_ids[1:])
    assert torch.equal(TextStates.join(rows, rows[:1]).time_ids, rows.time_ids[[0, 1, 0]])
    assert torch.equal(rows.to("cpu").time_ids, rows.time_ids)
    bare = TextStates(rows.states, rows.pooled, rows.mask)
    assert TextStates.join(bare, bare.repeat(2)).to("cpu")[:3].time_ids is None
    with pytest.raises(ValueError, match="with and without time_ids"):
        TextStates.join(rows, bare)


def test_the_null_is_told_of_the_same_sizes(folders):
    """As diffusers does, where no negative sizes are given."""
    stack = load_encoder(folders("sdxl"))
    text = stack.encode(["a cat", "a dog"])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [80, 64, 8, 0, 64, 64]])
    text = TextStates(text.states, text.pooled, text.mask, sizes)
    assert torch.equal(stack.null_like(text).time_ids, sizes)
    assert len(TextStates.join(text, stack.null_like(text))) == 4


def test_what_cannot_be_loaded_is_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="text_encoder is missing"):
        load_encoder(tmp_path)

    def changed(name, source="sd15", **index):
        folder = shutil.copytree(folders(source), tmp_path / name)
        values = json.loads((folder / "model_index.json").read_text()) | index
        (folder / "model_index.json").write_text(json.dumps(values))
        return folder

    flux = changed("flux", _class_name="FluxPipeline")
    shutil.copytree(folders("pixart") / "text_encoder", flux / "text_encoder_2")
    with pytest.raises(ValueError, match="FluxPipeline with text_encoder of class CLIPTextModel, text_encoder_2 of"):
        load_encoder(flux)
    with pytest.raises(ValueError, match="IFPipeline .* not supported"):
        load_encoder(changed("if", "pixart", _class_name="IFPipeline"))

    folder = changed("no-tokenizer", "sdxl")
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="tokenizer_2 is missing, the tokenizer of text_encoder_2"):
        load_encoder(folder)

    folder = changed("no-weights")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        load_encoder(folder)

    folder = changed("cut")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
        load_encoder(folder)

    folder = changed("another")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="missing.*layers.2"):
        load_encoder(folder)

    load_encoder(folders("sdxl")).save_pretrained(tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "text_encoder_2")
    with pytest.raises(ValueError, match="but text.json says sdxl"):
        load_encoder(tmp_path / "ours")
    (tmp_path / "ours" / "text.json").write_text('{"kind": "sd9"}')
    with pytest.raises(ValueError, match="text.json is not of this version"):
        load_encoder(tmp_path / "ours")
    with pytest.raises(ValueError, match="no captions"):
        load_encoder(folders("sd15")).encode([])
