r"""The memory estimate against what is really allocated: the figures of docs/memory.md.

    PYTHONPATH=.:tests python tests/studies/memory_estimate.py
    PYTHONPATH=.:tests python tests/studies/memory_estimate.py configs/sd15-prox-lora.yaml \
        model.init=rlproxi/models/published/stable-diffusion-v1-5

Without arguments: small networks on the CPU, by torch's profiler. With a config: one loss and backward of the learner,
one prox and one decoding of the rollout, at the config's sizes and with random weights, on the GPU if there is one
(``torch.cuda.max_memory_allocated``), else on the CPU; and images a second. A model folder's config.json files are
enough. What DeepSpeed, the text encoders and the CUDA context hold is not part of either figure.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch

from fixtures.memory import profiled_peak, real_network, real_step, small_folder
from rlproxi.config.loading import Config, build_config, load_config
from rlproxi.models.autoencoder import Autoencoder
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import empty_form
from rlproxi.models.precision import autocast
from rlproxi.planning.memory import estimate
from rlproxi.planning.memory_parts import empty_vae
from rlproxi.planning.memory_steps import forward_peak, inputs, learner_losses
from rlproxi.planning.memory_trace import no_memory, without_data

_MIB = 1024**2


def small_table() -> None:
    print(
        f"{'network':12} {'precision':9} {'trained':7} {'checkpointing':13} {'estimate':>9} {'measured':>9} MiB"
        f" {'error':>7}"
    )
    with tempfile.TemporaryDirectory() as root:
        either = (False, True)
        for case in itertools.product(("new", "sd15", "sd3-medium"), ("float32", "bfloat16"), either, either):
            kind, precision, lora, checkpointing = case
            if kind != "new" or not lora:  # adapters need something to adapt
                config = _small(kind, precision, lora, checkpointing, Path(root) / "-".join(map(str, case)))
                estimated, measured = (x / _MIB for x in (_activations(config), _measured(config)))
                print(
                    f"{kind:12} {precision:9} {'LoRA' if lora else 'all':7} {checkpointing!s:13} "
                    f"{estimated:9.2f} {measured:9.2f}     {estimated / measured - 1:+7.2%}",
                    flush=True,
                )


def _small(kind: str, precision: str, lora: bool, checkpointing: bool, folder: Path) -> Config:
    model = {"channels": [32, 64]} if kind == "new" else {"init": str(small_folder(kind, folder))}
    return build_config(
        {
            "run": {"stages": ["rl"]},
            "data": {"size": 32 if kind == "new" else 128},
            "model": {
                **model,
                "precision": precision,
                "gradient_checkpointing": checkpointing,
                "lora": {"rank": 4, "alpha": 4} if lora else None,
            },
            "rl": {"group_size": 16, "prompts_per_step": 1, "groups_per_micro_batch": 1},
            "grpo": {"kl_coef": 0.0},
        }
    )


def _activations(config: Config) -> int:
    return next(role for role in estimate(config).roles if role.name == "learner rank").parts["activations"]


def _rows(config: Config) -> int:
    return config.rl.groups_per_micro_batch * config.rl.group_size


def _measured(config: Config) -> int:
    dtype = getattr(torch, config.model.precision)
    network = real_network(config, dtype)
    real_step(learner_losses(config, network, _rows(config)), dtype)
    losses = learner_losses(config, network, _rows(config))
    return profiled_peak(lambda: real_step(losses, dtype))


class Recipe:
    """One config on one device."""

    def __init__(self, config: Config):
        # Without a reference: its forward is measured as the rollout's.
        self.config = config.model_copy(
            update={
                "grpo": config.grpo.model_copy(update={"kl_coef": 0.0}),
                "run": config.run.model_copy(update={"stages": ["rl"]}),
            }
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        gpus = dict.fromkeys(("learner_gpus", "rollout_gpus"), 1.0 if self.device == "cuda" else 0.0)
        self.config = self.config.model_copy(update={"resources": config.resources.model_copy(update=gpus)})
        self.dtype = torch.float32 if config.model.precision == "float32" else torch.bfloat16
        self.rows = _rows(config)

    def run(self) -> None:
        c, n = self.config, self.config.sampler.num_inference_steps
        learner = self._learner()
        print(f"learner: {self.rows / (learner * (c.grpo.trained_steps or n - 1)):.2f} images/s on this device")
        forward, decoding = self._forward(), self._decoding()
        print(f"rollout: {self.rows / (n * forward + decoding):.2f} images/s on this device, {n} steps")

    def _learner(self) -> float:
        network = real_network(self.config, self.dtype, self.device)
        losses = [learner_losses(self.config, network, self.rows) for _ in range(3)]
        real_step(losses[0], self.dtype, self.device)
        self._compare(
            "loss and backward", _activations(self.config), lambda: real_step(losses[1], self.dtype, self.device)
        )
        return self._seconds(lambda: real_step(losses[2], self.dtype, self.device))

    def _forward(self) -> float:
        network = real_network(self.config, self.dtype, self.device).requires_grad_(False)
        prox, z, text = inputs(self.config, network, self.rows)

        def step():
            with torch.no_grad(), autocast(self.dtype, self.device):
                prox(z, 0.5, 0.5, text)

        step()
        ghost = without_data(empty_form(self.config, "rl", self.dtype).requires_grad_(False))
        with no_memory():
            estimated = forward_peak(self.config, ghost, self.rows, self.dtype, self.device)
        self._compare("prox", estimated, step)
        return self._seconds(step)

    def _decoding(self) -> float:
        vae = empty_vae(ModelFolder.of(self.config))
        if vae is None:
            return 0.0
        real = vae.to_empty(device=self.device)
        with torch.no_grad():
            for x in real.parameters():
                x.normal_(0, 0.02)
        rollout = next(role for role in estimate(self.config).roles if role.name == "rollout actor")
        side = self.config.data.size // Autoencoder(real).factor
        z = torch.zeros(self.rows, real.config.latent_channels, side, side, device=self.device)

        def decode():
            with torch.no_grad():
                ((Autoencoder(real).decode(z) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

        decode()
        if "decoding" in rollout.parts:
            self._compare("decoding", rollout.parts["decoding"], decode)
        return self._seconds(decode)

    def _compare(self, name: str, estimated: int, step) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            measured = torch.cuda.max_memory_allocated() - before
        else:
            measured = profiled_peak(step)
        print(
            f"{name}: estimate {estimated / _MIB:.1f} MiB, measured {measured / _MIB:.1f} MiB, "
            f"{estimated / measured - 1:+.1%}",
            flush=True,
        )

    def _seconds(self, step) -> float:
        begun = time.perf_counter()
        step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arguments", nargs="*", metavar="CONFIG | key=value")
    options = parser.parse_args()
    torch.manual_seed(0)
    if not options.arguments:
        return small_table()
    Recipe(load_config(options.arguments[0], options.arguments[1:])).run()


if __name__ == "__main__":
    main()
