"""From a published checkpoint and a user's shards to a fine-tuned model, end to end on Ray."""

import json

import numpy as np
import pytest
import torch

from fixtures import tiny_checkpoints
from fixtures.shards import jpeg, sample, write_tar
from rlproxi.models import lora
from rlproxi.models.loading import load_denoiser
from rlproxi.models.pipeline import TextToImage

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """One tar of twelve pictures of several shapes, two of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    good = [sample(i, jpeg(80, 70 + 8 * i, seed=i), caption=f"a picture of thing number {i}") for i in range(12)]
    write_tar(folder / "00000.tar", [*good, sample(12, b"no jpeg"), sample(13, caption="")])
    return folder


@pytest.mark.parametrize(
    "kind, adapters",
    [
        ("sd3", True),  # all of them without Ray: tests/models, tests/planning/test_memory.py
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("sd15", False), ("sd15", True), ("sdxl", False), ("sdxl", True), ("sd3", False))
        ),
    ],
)
def test_shards_are_encoded_once_for_a_step_of_pretraining_and_an_iteration_of_grpo(
    kind, adapters, start, shards, tmp_path
):
    folder, cache = getattr(tiny_checkpoints, kind)(tmp_path / "checkpoint"), tmp_path / "cache"
    run = start(
        f"model.init={folder}",
        "data.source=shards",
        f"data.urls=[{shards}]",
        "data.size=64",
        f"data.cache={cache}",
        "data.cache_text=true",
        "run.stages=[encode, pretrain, rl]",
        "rewards.train=[{name: jpeg}]",
        "rewards.heldout=[]",
        "pretrain.steps=1",
        "pretrain.batch_size=4",
        "pretrain.log_every=1",
        "rl.steps=1",
        "grpo.kl_coef=0.1",
        "rl.prompts_per_step=2",
        "rl.group_size=2",
        "rl.groups_per_micro_batch=1",
        "evaluate.every=0",
        "evaluate.prompts=1",
        "sampler.guidance_scale=2.0",
        *(["model.lora={rank: 4, alpha: 8}"] if adapters else []),
    )
    told = next(r for r in run.records if r["event"] == "metrics" and r["stage"] == "encode")
    assert told["step"] == 1
    manifest = next(cache.glob("manifest-*.jsonl")).read_text().splitlines()
    totals = json.loads(manifest[0])
    assert totals["samples"] == 12 and totals["skipped"] == 2
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in manifest if '"reason"' in line}
    assert set(reasons) == {"000000012", "000000013"} and "caption" in reasons["000000013"]
    assert np.isfinite(run.series("pretrain", "loss")[1]).all()
    assert run.series("pretrain", "grad_norm")[1][0] > 0 and run.series("rl", "grad_norm")[1][0] > 0
    # Replay computes what the rollout did, through guidance, formula, branch and adapters.
    assert run.series("rl", "ratio/first_max_deviation")[1] == [0.0]
    models = run.folder / "models"
    before, pretrained, final = (load_denoiser(f) for f in (folder, models / "pretrained", models / "final"))
    bytes_sent = run.series("rl", "bytes/weights")[1][0]
    if adapters:
        assert bytes_sent == 4 * sum(p.numel() for p in lora.adapter_weights(final).values())
        # The reference of RL is the pre-trained model: its adapters went into the base.
        merged = load_denoiser(models / "pretrained-merged")
        assert merged.lora is None and final.lora is not None
        part = final.part
        for file in (models / "final" / part).iterdir():
            assert file.stat().st_ino == (models / "pretrained-merged" / part / file.name).stat().st_ino
        for file in (models / "pretrained" / part).iterdir():
            assert file.stat().st_ino == (folder / part / file.name).stat().st_ino
    else:
        assert bytes_sent == 4 * sum(p.numel() for p in final.parameters())
        changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), final.parameters())]
        assert np.mean(changed) > 0.9
    assert any(p.any() for name, p in pretrained.named_parameters() if name == "lam_embedding.linear_2.weight")
    images = TextToImage.from_pretrained(models / "final")(["a picture"], seeds=[1])
    assert images.shape == (1, 64, 64, 3)
