"""What a run will hold in memory, role by role, from its config and its folders' config.json files, without weights.

Weights, optimizer and averages are counted from the shapes of the very networks that would run. Activations are
counted by running the very losses and samplers on tensors without data (``memory_trace``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .algorithms import grpo
from .algorithms.pretrain import Matching
from .config import Config
from .memory_parts import count, empty_vae, held, scorer_bytes, text_encoder_bytes, text_shape
from .memory_steps import decoding_peak, encoding_peak, forward_peak, inputs, learner_losses, training_peak
from .memory_trace import no_memory, without_data
from .models.backbone import NoiseLevels, adapter_of
from .models.loading import OWN, empty_form, latent_space, network_config, parts_folder, trainable
from .models.precision import compute_dtype
from .models.text_loading import text_widths
from .proximal.matching import TimeTable
from .schema import ConfigError

#: The most gradients in DeepSpeed's reduction buffer (see actors/engine.py), which is allocated whole from ZeRO 1 on.
BUCKET = 500_000_000


@dataclass(frozen=True)
class Role:
    """One process: ``parts`` are bytes by name, all of them held at its peak."""

    name: str
    gpus: float
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """parameters and trained: counts of the network's. update_bytes: of one version of the weights on its way."""

    parameters: int
    trained: int
    roles: list[Role]

    @property
    def update_bytes(self) -> int:
        return 4 * self.trained


def estimate(config: Config) -> Estimate:
    """Peak memory of each role of the run's stages.

    Raises ConfigError naming the key, the folder and the remedy where ``model.init`` or ``model.encoders`` is no usable
    folder, and where the config does not fit it.
    """
    check_folders(config)
    try:
        return _Estimator(config).estimate()
    except (FileNotFoundError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None


def check_folders(config: Config) -> None:
    """Reads every config.json that a run will need, and none of the weights. Raises ConfigError as ``estimate``."""
    key = "init" if config.model.init else "encoders"
    named = config.model.init or config.model.encoders
    if named is None:
        return
    try:
        folder = parts_folder(config)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        if config.model.init:
            _, values = network_config(folder)
            if values.get("_class_name") not in OWN:
                adapter_of(values)
                NoiseLevels(folder)
        latent_space(config)
        text_widths(folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        said = error if isinstance(error, (OSError, ValueError)) else f"an encoder's config.json lacks {error}"
        raise ConfigError(f"model.{key} = {named!r}: {said}; give a complete model folder, such as `hf download` of a "
                          "diffusers repository or a run of ours leaves it") from None


class _Estimator:
    """The parts that roles share, each worked out once."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = parts_folder(config)
        self.shape = (latent_space(config)[0], *(latent_space(config)[1],) * 2)
        self.text_shape = text_shape(config, self.folder)
        self.forward: dict[tuple, int] = {}
        self.networks: dict[tuple, nn.Module] = {}
        self.counts: tuple[int, int] | None = None
        self.vae = empty_vae(self.folder)

    def estimate(self) -> Estimate:
        c, r, stages = self.config, self.config.resources, set(self.config.run.stages)
        roles = []
        if "pretrain" in stages:
            roles.append(self._pretrainer(_device(r.learner_gpus)))
        if "rl" in stages:
            roles.append(self._learner(_device(r.learner_gpus)))
        if stages & {"before", "rl", "after"}:
            roles.append(self._rollout(_device(r.rollout_gpus)))
            for x in [*c.rewards.train, *c.rewards.heldout]:
                size = scorer_bytes(x)
                if size is not None:
                    gpus = c.rewards.num_gpus if x.num_gpus is None else x.num_gpus
                    roles.append(Role(f"reward {x.name}", gpus, {"weights": size}))
        if not self.counts:
            self._network("rl", torch.float32)
        return Estimate(*self.counts, roles)

    # -- roles ------------------------------------------------------------------------------

    def _learner(self, device: str) -> Role:
        c, g = self.config, self.config.grpo
        network, parts, dtype = self._start("rl", device)
        rows = g.groups_per_micro_batch * g.group_size
        steps = g.trained_steps or c.sampler.num_inference_steps - 1
        mine = g.micro_batches // g.updates_per_step // c.resources.learner_workers
        parts["batch"] = mine * (rows * (12 * steps * self._numel() + self._text_bytes()) + 8 * rows)
        copied = g.kl_coef and not c.model.lora
        if copied:
            parts["reference copy"] = held(network)
        trained = trainable(network)
        with no_memory():
            # The reference is traced by itself: its forward is the rollout's, and happens on top of what is saved.
            losses = learner_losses(c, network, rows)
            saved, peak = training_peak(losses, trained.values(), dtype, device)
            network.requires_grad_(False)
            if g.kl_coef:
                peak = max(peak, saved + self._forward(network, rows, dtype, device))
        return Role("learner rank", c.resources.learner_gpus, self._with_engine(parts, count(trained.values()), peak))

    def _pretrainer(self, device: str) -> Role:
        c, p = self.config, self.config.pretrain
        network, parts, dtype = self._start("pretrain", device)
        share = p.batch_size // c.resources.learner_workers
        micro = p.micro_batch_size or share
        trained = trainable(network)
        parts["EMA"] = 4 * count(trained.values())
        parts["batch"] = share * (4 * self._numel() + self._text_bytes())
        schedule, s = c.schedule.build(), c.sampler
        table = TimeTable(schedule, p.candidates, s.name, s.start_time, s.grid)
        with no_memory():
            losses = Matching(p, schedule, table, c.run.seed).losses(network, *inputs(c, network, micro)[1:], 0)
            _, peak = training_peak(losses, trained.values(), dtype, device)
            if self.vae is not None and c.data.source == "faces":  # shards are encoded before
                parts["autoencoder"] = held(self.vae)
                peak = max(peak, encoding_peak(self.vae, self.shape, share, device))
        parts = self._with_engine(parts, count(trained.values()), peak)
        return Role("pretrainer rank", c.resources.learner_gpus, parts)

    def _rollout(self, device: str) -> Role:
        c, g = self.config, self.config.grpo
        network, parts, dtype = self._start("rl", device)
        rows = g.groups_per_micro_batch * g.group_size
        if self.vae is not None:
            parts["autoencoder"] = held(self.vae)
        parts["chain and text"] = rows * (8 * c.sampler.num_inference_steps * self._numel() + self._text_bytes())
        with no_memory():
            network.requires_grad_(False)
            sampling = self._forward(network, rows, dtype, device)
            decoding = decoding_peak(self.vae, self.shape, rows, device)
        parts["sampling" if sampling >= decoding else "decoding"] = max(sampling, decoding)
        return Role("rollout actor", c.resources.rollout_gpus, parts)

    # -- parts ------------------------------------------------------------------------------

    def _start(self, stage: str, device: str) -> tuple[nn.Module, dict[str, int], torch.dtype]:
        precision = self.config.model.precision
        if device == "cuda" and precision == "auto":
            precision = "bfloat16"  # of every GPU that this is likely to run on, asked for on a machine without one
        dtype = compute_dtype(precision, "cpu")
        network = self._network(stage, dtype)
        parts = {"network": held(network),
                 "text encoders": text_encoder_bytes(self.config, self.folder, dtype)}
        return network, parts, dtype

    def _network(self, stage: str, dtype: torch.dtype) -> nn.Module:
        """In the form in which ``stage`` trains it; the rollout takes the learner's, so the learner comes first."""
        key = (stage, dtype)
        if key not in self.networks:
            network = without_data(empty_form(self.config, stage, dtype))
            self.networks = {key: network}
            self.counts = count(network.parameters()), count(trainable(network).values())
        return self.networks[key]

    def _with_engine(self, parts: dict[str, int], trained: int, activations: int) -> dict[str, int]:
        """Adds what DeepSpeed holds (measured on its 0.19: docs/memory.md) and the activations to ``parts``."""
        stage, n = self.config.learner.zero_stage, self.config.resources.learner_workers
        size = 4 * trained
        share = size // n
        if stage == 3:
            whole, parts["network"] = parts["network"], parts["network"] // n
            activations += whole  # layers gathered for their turn stay for the next, up to a billion numbers
        if stage:
            parts["master weights"] = share
        parts["gradients"] = share if stage >= 2 else size
        parts["Adam moments"] = 2 * share if stage else 2 * size
        if stage and self.config.resources.learner_gpus:  # untouched, so free, in host memory
            parts["reduction buffer"] = min(size, 4 * BUCKET)
        # After the last backward, when activations are gone: gradients made flat for the reduction or the optimizer.
        flat = {0: min(size, 4 * BUCKET), 1: share, 2: share, 3: size}[stage]
        parts["activations" if activations >= flat else "flat gradients"] = max(activations, flat)
        return parts

    def _forward(self, network: nn.Module, rows: int, dtype: torch.dtype, device: str) -> int:
        """Peak of one prox of ``rows`` samples without gradient; inside ``no_memory``."""
        key = (rows, dtype, device)
        if key not in self.forward:
            self.forward[key] = forward_peak(self.config, network, rows, dtype, device)
        return self.forward[key]

    def _text_bytes(self) -> int:
        length, width, pooled = self.text_shape
        return 4 * (length * (width + 1) + pooled)

    def _numel(self) -> int:
        channels, height, width = self.shape
        return channels * height * width


def _device(gpus: float) -> str:
    return "cuda" if gpus else "cpu"
