"""``rlproxi export``: from a run to a folder that stands alone.

A run's model folders share their frozen files by hard links, and keep adapters apart from the base. An export shares
nothing, and can merge adapters, change the weights' dtype, or take the adapters alone in diffusers' own format.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..files import folder_draft
from ..run_directory import RunDirectory
from ..telemetry.run_reader import RunReader, dig
from . import lora
from .backbone import ProximalBackbone
from .folders import find_model
from .loading import part_of
from .pipeline import TextToImage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What diffusers calls a file of adapters.
ADAPTER = "pytorch_lora_weights.safetensors"
CARD = "README.md"
#: Tensors that stay in float32 whatever is asked for: the closed-form prox needs its basis orthogonal. Not its mean, a
#: network's first tensor: by the first alone diffusers decides whether a file is cast as it is loaded.
EXACT = ("gaussian.variance", "gaussian.colors")

USE = [
    "```python",
    "import torch",
    "import rlproxi.models.diffusers_pipeline  # makes the class known to diffusers",
    "from diffusers import DiffusionPipeline",
    "",
    'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")',
    'image = pipe("a prompt", generator=torch.Generator().manual_seed(0)).images[0]',
    "```",
    "",
    'The same image: `rlproxi sample "a prompt" --model path/to/this/folder --seed 0 --count 1`.',
]


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    merge: bool | None = None,
    dtype: str | None = None,
    adapter_only: bool = False,
) -> Path:
    """Writes ``out``, atomically, and returns it.

    Args:
        source: a run directory or a model folder.
        merge: adds adapters to the base's weights; None: where the base is a published network, so that plain tools
            read what was trained. Merged weights give the same images to rounding, kept adapters bit for bit.
        dtype: of the weights as stored (float32, bfloat16, float16); None leaves them as they are. Loaded, they compute
            in float32 all the same.
        adapter_only: writes the adapters alone, as diffusers' ``load_lora_adapter`` and ``load_lora_weights`` read
            them.

    Raises FileExistsError where ``out`` holds something, ValueError for adapters that are not there or a dtype that the
    weights do not fit, FileNotFoundError for a source without a model.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another name")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    folder = find_model(source)
    has_adapters = (folder / lora.FOLDER).is_dir()
    if not has_adapters and (merge or adapter_only):
        raise ValueError(
            f"{folder} has no adapters (no {lora.FOLDER}/ in it): it was trained whole; export it without "
            f"{'--adapter-only' if adapter_only else '--merge'}"
        )
    if merge and adapter_only:
        raise ValueError("--merge and --adapter-only exclude each other: merged adapters are no adapters any more")
    model = TextToImage.from_pretrained(folder)
    published = isinstance(model.denoiser, ProximalBackbone)
    if adapter_only and not published:
        raise ValueError(
            f"{folder} is a {type(model.denoiser).__name__}: diffusers' adapter format is for diffusers' "
            "own networks; --no-merge keeps the adapters beside the base"
        )
    merged = has_adapters and not adapter_only and (published if merge is None else merge)
    if merged:
        model.merged()
    with folder_draft(out) as fresh:
        if adapter_only:
            _write_adapter(model, fresh)
        else:
            model.save_pretrained(fresh)
            _stand_alone(fresh)
        if dtype is not None:
            _cast(fresh, DTYPES[dtype])
        told = card(model, folder, out.name, has_adapters, merged, adapter_only, dtype)
        (fresh / CARD).write_text(told, encoding="utf-8")
    return out


def _stand_alone(folder: Path) -> None:
    """Gives every file of ``folder`` an inode of its own."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.stat().st_nlink > 1:
            copy = file.with_name(file.name + ".copy")
            shutil.copy2(file, copy)
            copy.replace(file)


def _cast(folder: Path, dtype: torch.dtype) -> None:
    """Rewrites the weights of ``folder`` in ``dtype``. A model's adapters stay in float32: they are small.

    Raises ValueError naming a tensor that has no finite value in ``dtype``.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        if file.parent.name == lora.FOLDER:
            continue
        with safe_open(file, framework="pt") as stored:
            facts = stored.metadata()
        tensors = {}
        for name, value in load_file(file).items():
            tensors[name] = value
            if value.is_floating_point() and name not in EXACT:
                tensors[name] = value.to(dtype).contiguous()
                if value.isfinite().all() and not tensors[name].isfinite().all():
                    raise ValueError(
                        f"{file.parent.name}: {name} does not fit {dtype}: its largest value is "
                        f"{value.abs().max():.3g}; choose bfloat16"
                    )
        save_file(tensors, file, metadata=facts)
    for file in sorted(folder.rglob("*.safetensors.index.json")):  # of weights in several files
        values = json.loads(file.read_text(encoding="utf-8"))
        shards = {file.with_name(name) for name in values["weight_map"].values()}
        values.setdefault("metadata", {})["total_size"] = sum(t.nbytes for s in shards for t in load_file(s).values())
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_adapter(model: TextToImage, folder: Path) -> None:
    """The adapters in diffusers' format: names with the part in front, rank and alpha in the file's header."""
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

    part, settings = part_of(model.denoiser), model.denoiser.lora
    weights = {
        name.replace(".default.", "."): p.detach().contiguous()
        for name, p in lora.adapter_weights(model.denoiser).items()
    }
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    facts = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets}
    writer = StableDiffusionLoraLoaderMixin if part == "unet" else SD3LoraLoaderMixin
    folder.mkdir()
    writer.save_lora_weights(
        folder, weight_name=ADAPTER, **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": facts}
    )


def card(
    model: TextToImage, folder: Path, name: str, has_adapters: bool, merged: bool, adapter_only: bool, dtype: str | None
) -> str:
    """README.md of an export: what it is, how it is loaded, how it was trained and what was measured."""
    tags = ["rlproxi", "proximal-diffusion", *(["lora"] if adapter_only else [])]
    network = type(lora.network_of(model.denoiser) if isinstance(model.denoiser, ProximalBackbone) else model.denoiser)
    s, schedule = model.sampler, model.schedule
    rows = [
        ("network", f"{network.__name__} ({part_of(model.denoiser)}/)"),
        ("images", f"{model.size} x {model.size} pixels"),
        ("sampler", f"{s.name}, {s.num_inference_steps} steps from t = {s.start_time:g} on the {s.grid} grid"),
        ("guidance scale", f"{s.guidance_scale:g}{' (none)' if s.guidance_scale == 1 else ''}"),
        ("schedule", f"VP, beta from {schedule.beta_min:g} to {schedule.beta_max:g}"),
        ("adapters", _adapters(model, has_adapters, merged, adapter_only)),
        ("weights", dtype or "as trained"),
    ]
    lines = [
        "---",
        f"library_name: {'diffusers' if not adapter_only else 'peft'}",
        "pipeline_tag: text-to-image",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {name}",
        "",
        "A text-to-image model by proximal diffusion, written by `rlproxi export`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows),
        "",
        "## Use",
        "",
        *(_adapter_use(model) if adapter_only else USE),
        *_results(folder),
    ]
    return "\n".join(lines) + "\n"


def _adapters(model: TextToImage, has_adapters: bool, merged: bool, adapter_only: bool) -> str:
    if not has_adapters:
        return "none"
    if merged:
        return "merged into the network"
    told = f"rank {model.denoiser.lora.rank}, alpha {model.denoiser.lora.alpha:g}"
    return f"{told}, {'this file' if adapter_only else f'in {lora.FOLDER}/'}"


def _adapter_use(model: TextToImage) -> list[str]:
    part, settings = part_of(model.denoiser), model.denoiser.lora
    if hasattr(lora.network_of(model.denoiser), "load_lora_adapter"):
        code = [f'pipe.{part}.load_lora_adapter("path/to/this/folder", prefix="{part}", weight_name="{ADAPTER}")']
    else:  # a network for which diffusers has no such verb
        code = [
            "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
            "from safetensors.torch import load_file",
            "",
            f'weights = load_file("path/to/this/folder/{ADAPTER}")',
            f'weights = {{name.removeprefix("{part}."): value for name, value in weights.items()}}',
            'targets = sorted({name.rsplit(".lora_", 1)[0] for name in weights})',
            f"config = LoraConfig(r={settings.rank}, lora_alpha={settings.alpha:g}, target_modules=targets)",
            f"inject_adapter_in_model(config, pipe.{part})",
            f"set_peft_model_state_dict(pipe.{part}, weights)",
        ]
    lines = [
        "```python",
        *code,
        "```",
        "",
        "on the pipeline of the base. The adapters were trained for the proximal sampler named above; under an "
        "ordinary sampler the network is the base's with what training changed in it.",
    ]
    if model.denoiser.lam_embedding.linear_2.weight.any():
        lines.append(
            "The branch that tells the network of lam was trained too, and is not in this file: the policy as "
            "trained is what `rlproxi export` writes without `--adapter-only`."
        )
    return lines


def _results(folder: Path) -> list[str]:
    """What the run measured, for models/final and models/pretrained of a run directory; nothing for another folder."""
    files = RunDirectory(folder.parent.parent)
    if folder not in (files.final, files.pretrained):
        return []
    try:
        run = RunReader(files.path)
    except FileNotFoundError:
        return []
    tuned = folder == files.final
    rewards = dig(run.config, "rewards", "train") or []
    lines = [
        f"| training reward ({' + '.join(str(r.get('name')) for r in rewards)}), first and last iteration | "
        f"{_number(dig(run.summary, 'reward', 'first'))} | {_number(dig(run.summary, 'reward', 'last'))} |"
    ]
    if not tuned or dig(run.summary, "reward", "last") is None:
        lines = []
    before, after = dig(run.summary, "heldout", "before"), dig(run.summary, "heldout", "after") if tuned else None
    if before is not None or after is not None:
        lines.append(
            f"| held-out {run.judge or 'judge'}, {run.headline_steps} steps | "
            f"{_measured(run, 'before', before)} | {_measured(run, 'after', after)} |"
        )
    if not lines:
        return []
    return [
        "",
        "## Measured in training",
        "",
        "| | before RL | after RL |",
        "|---|---|---|",
        *lines,
        "",
        f"Run `{folder.parent.parent.resolve().name}`, seed {run.summary.get('seed')}. The held-out reward is the "
        "mean over fixed prompts and seeds, with its standard error; nothing was trained on it.",
    ]


def _measured(run: RunReader, tag: str, mean: float | None) -> str:
    found = run.score(tag, run.judge) if mean is not None and run.judge else None
    return f"{_number(mean)} ± {found[1]:.4f}" if found else _number(mean)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
