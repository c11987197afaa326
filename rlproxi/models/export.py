"""``rlproxi export``: from a run to a folder that stands alone.

An export shares no file with the run. It can merge adapters, change the weights' dtype, or write the adapters alone.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..config.plain_yaml import read_yaml
from ..config.sections import LoRA
from ..files import folder_draft
from ..run_directory import RunDirectory
from . import lora
from .backbone import ProximalBackbone
from .folders import ModelFolder
from .pipeline import TextToImage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What diffusers calls a file of adapters.
ADAPTER = "pytorch_lora_weights.safetensors"
CARD = "README.md"
#: Tensors that stay in float32: the closed-form prox needs its basis orthogonal. Not the first tensor, the mean:
#: by its dtype diffusers decides whether it casts a file.
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
        dtype: of the weights as stored (float32, bfloat16, float16); None leaves them as they are.
        adapter_only: writes the adapters alone, in diffusers' own format.

    Raises FileExistsError where ``out`` holds something, ValueError for adapters that are not there or a dtype that the
    weights do not fit, FileNotFoundError for a source without a model.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another name")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    found = ModelFolder.find(source)
    folder, has_adapters = found.path, found.has_adapters
    if not has_adapters and (merge or adapter_only):
        option = "--adapter-only" if adapter_only else "--merge"
        raise ValueError(f"{folder} has no adapters (no {lora.FOLDER}/ in it): export it without {option}")
    if merge and adapter_only:
        raise ValueError("--merge and --adapter-only exclude each other: give one of them")
    model = TextToImage.from_pretrained(found)
    published = isinstance(model.denoiser, ProximalBackbone)
    if adapter_only and not published:
        raise ValueError(
            f"{folder} is a {type(model.denoiser).__name__}: diffusers' adapter format is for diffusers' "
            "own networks; --no-merge keeps the adapters beside the base"
        )
    merged = has_adapters and not adapter_only and (published if merge is None else merge)
    if merged:
        model.merged()
    adapter = model.denoiser.lora if adapter_only else None
    with folder_draft(out) as fresh:
        if adapter is not None:
            _write_adapter(model, adapter, fresh)
        else:
            model.save_pretrained(fresh)
            _stand_alone(fresh)
        if dtype is not None:
            _cast(fresh, DTYPES[dtype])
        text = card(model, folder, out.name, merged, adapter, dtype)
        (fresh / CARD).write_text(text, encoding="utf-8")
    return out


def _stand_alone(folder: Path) -> None:
    """Gives every file of ``folder`` an inode of its own."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.stat().st_nlink > 1:
            copy = file.with_name(file.name + ".copy")
            shutil.copy2(file, copy)
            copy.replace(file)


def _cast(folder: Path, dtype: torch.dtype) -> None:
    """Rewrites the weights but for the adapters in ``dtype``. Raises ValueError for a tensor that does not fit it."""
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
                    largest = f"{value.abs().max():.3g}"
                    raise ValueError(f"{file.parent.name}: {name} has {largest}, too large for {dtype}: use bfloat16")
        save_file(tensors, file, metadata=facts)
    for file in sorted(folder.rglob("*.safetensors.index.json")):  # of weights in several files
        values = json.loads(file.read_text(encoding="utf-8"))
        shards = {file.with_name(name) for name in values["weight_map"].values()}
        values.setdefault("metadata", {})["total_size"] = sum(t.nbytes for s in shards for t in load_file(s).values())
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_adapter(model: TextToImage, settings: LoRA, folder: Path) -> None:
    """The adapters in diffusers' format: names with the part in front, rank and alpha in the file's header."""
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

    part = model.denoiser.part
    found = lora.adapter_weights(model.denoiser)
    weights = {name.replace(".default.", "."): p.detach().contiguous() for name, p in found.items()}
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    facts = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets}
    writer: Any = StableDiffusionLoraLoaderMixin if part == "unet" else SD3LoraLoaderMixin
    folder.mkdir()
    contents = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": facts}
    writer.save_lora_weights(folder, weight_name=ADAPTER, **contents)


def card(model: TextToImage, folder: Path, name: str, merged: bool, adapter: LoRA | None, dtype: str | None) -> str:
    """README.md of an export: what it is, how it is loaded, how it was trained and what was measured.

    ``adapter`` has the settings of adapters that are exported without their base.
    """
    tags = ["rlproxi", "proximal-diffusion", *(["lora"] if adapter else [])]
    network = type(lora.network_of(model.denoiser) if isinstance(model.denoiser, ProximalBackbone) else model.denoiser)
    s, schedule, kept = model.sampler, model.schedule, model.denoiser.lora
    adapters = "merged into the network" if merged else "none"
    if kept:
        place = "this file" if adapter else f"in {lora.FOLDER}/"
        adapters = f"rank {kept.rank}, alpha {kept.alpha:g}, {place}"
    rows = [
        ("network", f"{network.__name__} ({model.denoiser.part}/)"),
        ("images", f"{model.size} x {model.size} pixels"),
        ("sampler", f"{s.name}, {s.num_inference_steps} steps from t = {s.start_time:g} on the {s.grid} grid"),
        ("guidance scale", f"{s.guidance_scale:g}{' (none)' if s.guidance_scale == 1 else ''}"),
        ("schedule", f"VP, beta from {schedule.beta_min:g} to {schedule.beta_max:g}"),
        ("adapters", adapters),
        ("weights", dtype or "as trained"),
    ]
    lines = [
        "---",
        f"library_name: {'peft' if adapter else 'diffusers'}",
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
        *(_adapter_use(model, adapter) if adapter else USE),
        *_results(folder),
    ]
    return "\n".join(lines) + "\n"


def _adapter_use(model: TextToImage, settings: LoRA) -> list[str]:
    part = model.denoiser.part
    if hasattr(lora.network_of(model.denoiser), "load_lora_adapter"):
        code = [f'pipe.{part}.load_lora_adapter("path/to/this/folder", prefix="{part}", weight_name="{ADAPTER}")']
    else:  # a network without that method in diffusers
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
    note = "on the pipeline of the base. The adapters were trained for the proximal sampler named above."
    lines = ["```python", *code, "```", "", note]
    if isinstance(model.denoiser, ProximalBackbone) and model.denoiser.lam_embedding.linear_2.weight.any():
        lines.append(
            "The branch for lam was trained too and is in no file here: export without `--adapter-only` has it."
        )
    return lines


def _results(folder: Path) -> list[str]:
    """What the run measured, for models/final and models/pretrained of a run directory; nothing for another folder."""
    run, tuned = RunDirectory(folder.parent.parent), folder.name == "final"
    if folder not in (run.final, run.pretrained):
        return []
    summary, config = _read(run.summary), _read(run.config)
    rewards, steps = _dig(config, "rewards", "train") or [], _dig(config, "sampler", "num_inference_steps")
    scores = [_dig(_read(run.evaluation(tag)), "by_steps", str(steps), "heldout") or {} for tag in ("before", "after")]
    judge = next((name for found in scores for name in found), None)
    lines = []
    if tuned and _dig(summary, "reward", "last") is not None:
        names = " + ".join(str(_dig(reward, "name")) for reward in rewards)
        first, last = (_number(_dig(summary, "reward", key)) for key in ("first", "last"))
        lines.append(f"| training reward ({names}), first and last iteration | {first} | {last} |")
    before, after = (_dig(summary, "heldout", tag) for tag in ("before", "after"))
    after = after if tuned else None
    if before is not None or after is not None:
        errors = [_dig(found, judge, "sem") if judge else None for found in scores]
        cells = [_number(mean, sem) for mean, sem in zip((before, after), errors, strict=True)]
        lines.append(f"| held-out {judge or 'judge'}, {steps} steps | {cells[0]} | {cells[1]} |")
    if not lines:
        return []
    head = ["", "## Measured in training", "", "| | before RL | after RL |", "|---|---|---|"]
    source = f"Run `{run.path.resolve().name}`, seed {summary.get('seed')}."
    note = "The held-out reward is the mean over fixed prompts and seeds, with its standard error."
    return [*head, *lines, "", f"{source} {note}"]


def _read(file: Path) -> dict[str, Any]:
    """A JSON or YAML file of a run; {} where it is missing or damaged: the card then lacks its line."""
    try:
        values = (json.loads if file.suffix == ".json" else read_yaml)(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _dig(values: Any, *keys: str) -> Any:
    """values[a][b]..., or None where a part of the path is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _number(value: Any, error: Any = None) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, (int, float)) else f"{value:.4f}"
