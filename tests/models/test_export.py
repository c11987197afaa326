import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from fixtures import tiny_checkpoints
from rlproxi.config.loading import build_config
from rlproxi.config.sections import Sampler, Schedule
from rlproxi.models import export as module
from rlproxi.models.diffusers_pipeline import ProxT2IPipeline
from rlproxi.models.export import export
from rlproxi.models.loading import training_form
from rlproxi.models.pipeline import TextToImage
from rlproxi.models.text import build_text_encoder
from rlproxi.models.unet import ProximalUNet
from rlproxi.proximal.matching import TimeTable, corrupt, matching_loss

PROMPTS = ["a photo of a red cat", "the dog on a horse"]
#: 64 pixels, and guidance to show that the empty caption comes along.
SAMPLER = Sampler(num_inference_steps=3, guidance_scale=1.5)
FRESH = """
import sys
import numpy as np, torch
torch.set_num_threads(1)
import rlproxi.models.diffusers_pipeline
from diffusers import DiffusionPipeline
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [pipe(p, generator=torch.Generator().manual_seed(11)).images[0] for p in {prompts!r}]
    np.save(out, np.stack(images))
"""


def train(run: Path, base: TextToImage, lora_rank: int | None) -> Path:
    """A run directory whose models/final is models/pretrained after a few steps of proximal matching."""
    pretrained = base.save_pretrained(run / "models" / "pretrained")
    adapters = {"lora": {"rank": lora_rank, "alpha": 2.0 * lora_rank}} if lora_rank else {}
    config = build_config({"model": {"init": str(pretrained), **adapters}, "data": {"size": base.size}})
    model = TextToImage.from_pretrained(pretrained)
    model.denoiser = training_form(pretrained, config, "pretrain")
    weights = [p for p in model.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    schedule = Schedule().build()
    table, rng, draw = TimeTable(schedule, [3]), np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(4):
        t, lam = table.draw(rng, 2)
        x0, n1, n2 = (torch.randn((2, *model.denoiser.sample_shape), generator=draw) for _ in range(3))
        y = corrupt(schedule, 0.5 * x0, t, lam, n1, n2)
        loss = matching_loss(model.denoiser(y, t, lam, model.text.encode(PROMPTS)), n2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.denoiser.eval()
    model.save_pretrained(run / "models" / "final")
    return run


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A published checkpoint tuned by adapters, in a run directory with results."""
    root = tmp_path_factory.mktemp("runs")
    published = tiny_checkpoints.sd15(root / "sd15")
    run = train(root / "tuned", TextToImage.from_pretrained(published, sampler=SAMPLER), 4)
    (run / "summary.json").write_text(
        json.dumps({"reward": {"first": 0.5, "last": 0.7}, "heldout": {"before": 0.61, "after": 0.72}, "seed": 3})
    )
    (run / "config.yaml").write_text(
        yaml.safe_dump({"rewards": {"train": [{"name": "hpsv2"}]}, "sampler": {"num_inference_steps": 3}})
    )
    (run / "evaluation").mkdir()
    for tag, mean in (("before", 0.61), ("after", 0.72)):
        (run / "evaluation" / f"{tag}.json").write_text(
            json.dumps(
                {"headline_steps": 3, "by_steps": {"3": {"heldout": {"pickscore": {"mean": mean, "sem": 0.0125}}}}}
            )
        )
    return run


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A network of our own, trained whole."""
    torch.manual_seed(0)
    unet = ProximalUNet(sample_size=16, channels=(32,), blocks=(1,), attention=(True,), text_dim=32, pooled_dim=32)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    base = TextToImage(unet, build_text_encoder(PROMPTS, 32, 1, 12), Schedule(), SAMPLER)
    return train(tmp_path_factory.mktemp("runs") / "own", base, None)


def draw(folder: Path, seed: int = 11) -> np.ndarray:
    """One at a time, as the fresh process does: a batch may round differently."""
    model = TextToImage.from_pretrained(folder)
    return np.stack([model(p, seeds=[seed])[0] for p in PROMPTS])


def test_train_export_and_draw_the_same_image_in_a_fresh_process(lora_run, own_run, tmp_path):
    whole = export(own_run, tmp_path / "whole")
    kept = export(lora_run, tmp_path / "kept", merge=False)
    merged = export(lora_run, tmp_path / "merged")
    arguments = [str(x) for folder in (whole, kept, merged) for x in (folder, tmp_path / f"{folder.name}.npy")]
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(prompts=PROMPTS), *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    drawn = {name: np.load(tmp_path / f"{name}.npy") for name in ("whole", "kept", "merged")}
    assert np.array_equal(drawn["whole"], draw(own_run))
    tuned = draw(lora_run)
    assert np.array_equal(drawn["kept"], tuned)
    difference = np.abs(drawn["merged"].astype(int) - tuned)
    assert difference.max() <= 1, "W + BA rounds once more than Wx + BAx"
    assert not np.array_equal(tuned, draw(lora_run / "models" / "pretrained")), "training changed the images"


def test_an_export_stands_alone(lora_run, tmp_path):
    for merge in (True, False):
        out = export(lora_run, tmp_path / f"merge-{merge}", merge=merge)
        files = [f for f in out.rglob("*") if f.is_file()]
        assert files and all(f.stat().st_nlink == 1 for f in files)
        assert (out / "lora").is_dir() != merge
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merge-False", "merge-True"]  # no scratch folder is left


def test_plain_tools_read_the_merged_network(lora_run, tmp_path):
    out = export(lora_run, tmp_path / "out")
    tuned = TextToImage.from_pretrained(lora_run).denoiser.net
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, tiny_checkpoints.WIDTH)
    with torch.no_grad():
        plain = UNet2DConditionModel.from_pretrained(out, subfolder="unet")(x, t, states).sample
        torch.testing.assert_close(plain, tuned(x, t, states).sample, rtol=1e-4, atol=1e-4)
    whole = StableDiffusionPipeline.from_pretrained(out)
    assert torch.equal(whole.unet.conv_in.weight, tuned.conv_in.weight)


def test_adapters_alone_load_into_the_base_by_diffusers_own_verbs(lora_run, tmp_path):
    out = export(lora_run, tmp_path / "adapter", adapter_only=True)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    tuned = TextToImage.from_pretrained(lora_run).denoiser.net
    base = StableDiffusionPipeline.from_pretrained(lora_run.parent / "sd15")
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, tiny_checkpoints.WIDTH)
    with torch.no_grad():
        expected, before = tuned(x, t, states).sample, base.unet(x, t, states).sample
        assert not torch.allclose(before, expected, atol=1e-3)
        base.unet.load_lora_adapter(out, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(base.unet(x, t, states).sample, expected)  # rank and alpha as well
        again = StableDiffusionPipeline.from_pretrained(lora_run.parent / "sd15")
        again.load_lora_weights(out)
        assert torch.equal(again.unet(x, t, states).sample, expected)
    card = (out / "README.md").read_text()
    assert "pipe.unet.load_lora_adapter(" in card and "rank 4, alpha 8" in card
    assert "branch for lam was trained too" in card


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_transformers_adapters_load_into_their_base(kind, tmp_path):
    published = getattr(tiny_checkpoints, kind)(tmp_path / kind)
    run = train(tmp_path / "run", TextToImage.from_pretrained(published), 2)
    out = export(run, tmp_path / "out", adapter_only=True)
    tuned = TextToImage.from_pretrained(run).denoiser
    base = TextToImage.from_pretrained(published).denoiser
    base.lam_embedding.load_state_dict(tuned.lam_embedding.state_dict())
    text = TextToImage.from_pretrained(published).text.encode(PROMPTS)
    y, t, lam = torch.randn(2, *base.sample_shape), torch.tensor([0.2, 0.6]), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        assert not torch.allclose(base(y, t, lam, text), tuned(y, t, lam, text), atol=1e-3)
        code = (out / "README.md").read_text().split("```")[1].removeprefix("python")
        exec(code.replace("path/to/this/folder", str(out)), {"pipe": SimpleNamespace(transformer=base.net)})
        assert torch.equal(base(y, t, lam, text), tuned(y, t, lam, text))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_rounds_the_weights_and_loads_everywhere(lora_run, own_run, dtype, tmp_path):
    exact, rough = export(own_run, tmp_path / "exact"), export(own_run, tmp_path / "rough", dtype=dtype)
    a, b = (load_file(x / "unet" / "diffusion_pytorch_model.safetensors") for x in (exact, rough))
    for name in a:
        kept = name in ("gaussian.variance", "gaussian.colors")
        assert b[name].dtype is (torch.float32 if kept else getattr(torch, dtype)), name
        assert torch.equal(b[name], a[name] if kept else a[name].to(getattr(torch, dtype)))
    assert f"| weights | {dtype} |" in (rough / "README.md").read_text()
    size = [sum(f.stat().st_size for f in x.rglob("*.safetensors")) for x in (exact, rough)]
    assert size[1] < 0.6 * size[0]
    difference = np.abs(draw(rough).astype(int) - draw(exact))
    assert 0 < difference.mean() < 12
    for run in (own_run, lora_run):
        out = export(run, tmp_path / f"{run.name}-again", merge=False, dtype=dtype)
        images = ProxT2IPipeline.from_pretrained(out)(PROMPTS[0], generator=torch.Generator().manual_seed(11)).images
        assert np.array_equal(images[0], draw(out)[0])
    assert load_file(tmp_path / "tuned-again/lora/adapter_model.safetensors").popitem()[1].dtype is torch.float32
    export(tmp_path / "tuned-again", tmp_path / "back", dtype="float32", merge=False)
    assert np.array_equal(draw(tmp_path / "back"), draw(tmp_path / "tuned-again"))


def test_weights_that_float16_cannot_hold_are_refused(own_run, tmp_path):
    model = TextToImage.from_pretrained(own_run)
    with torch.no_grad():
        model.denoiser.head.bias[0] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"unet: head.bias has 1e\+06, too large for torch.float16"):
        export(tmp_path / "large", tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large"]


def test_the_card_tells_what_was_measured(lora_run, own_run, tmp_path):
    card = (export(lora_run, tmp_path / "mine") / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["rlproxi", "proximal-diffusion"],
    }
    for words in (
        "# mine",
        "| network | UNet2DConditionModel (unet/) |",
        "| images | 64 x 64 pixels |",
        "| sampler | hybrid, 3 steps from t = 0.8 on the uniform grid |",
        "| guidance scale | 1.5 |",
        "| schedule | VP, beta from 0.1 to 20 |",
        "| adapters | merged into the network |",
        "| training reward (hpsv2), first and last iteration | 0.5000 | 0.7000 |",
        "| held-out pickscore, 3 steps | 0.6100 ± 0.0125 | 0.7200 ± 0.0125 |",
        "Run `tuned`, seed 3.",
    ):
        assert words in card, words
    before = (export(lora_run / "models" / "pretrained", tmp_path / "before") / "README.md").read_text()
    assert "| held-out pickscore, 3 steps | 0.6100 ± 0.0125 |  |" in before and "0.72" not in before
    assert "training reward" not in before and "| adapters | none |" in before
    assert "Measured" not in (export(own_run, tmp_path / "bare") / "README.md").read_text()


@pytest.mark.parametrize(
    "run, options, error, words",
    [
        ("own", {"merge": True}, ValueError, "final has no adapters .*export it without --merge"),
        ("own", {"adapter_only": True}, ValueError, "export it without --adapter-only"),
        ("lora", {"merge": True, "adapter_only": True}, ValueError, "exclude each other"),
        ("lora", {"dtype": "int8"}, ValueError, "dtype 'int8' is unknown; choose one of float32, bfloat16, float16"),
        ("lora", {"out": "taken"}, FileExistsError, "taken exists and is not an empty folder"),
        ("nowhere", {}, FileNotFoundError, "nowhere is not a folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(run, options, error, words, lora_run, own_run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    source = {"own": own_run, "lora": lora_run}.get(run, tmp_path / run)
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(error, match=words):
        export(source, out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_own_networks_adapters_are_kept_and_have_no_diffusers_format(own_run, tmp_path):
    run = train(tmp_path / "run", TextToImage.from_pretrained(own_run), 2)
    assert (export(run, tmp_path / "kept") / "lora").is_dir()
    assert not (export(run, tmp_path / "merged", merge=True) / "lora").exists()
    with pytest.raises(ValueError, match="is a ProximalUNet: diffusers' adapter format is for diffusers' own networks"):
        export(run, tmp_path / "alone", adapter_only=True)


def test_an_interrupted_export_leaves_nothing(own_run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "card", fail)
    with pytest.raises(OSError, match="disk full"):
        export(own_run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
