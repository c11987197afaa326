"""Peak memory of a run, role by role, from its config and its folders' config.json files, without weights.

Weights, optimizer and averages are counted from the shapes of the networks that would run. Activations are counted by
running the real losses and samplers on tensors without data (``memory_trace``).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..algorithms.base import Algorithm, build_algorithm
from ..algorithms.pretrain import Matching
from ..config.loading import Config
from ..errors import ConfigError
from ..models.folders import ModelFolder, latent_space
from ..models.loading import empty_form, trainable
from ..models.lora import adapters_off, without_adapters
from ..models.precision import compute_dtype
from ..proximal.operator import Denoiser
from ..rewards.gradients import RewardGradients
from .memory_parts import count, empty_vae, held, text_encoder_bytes, text_shape, with_engines
from .memory_scorers import empty_gradients, scorer_bytes, scorer_held
from .memory_steps import decoding_peak, encoding_peak, first_updates, forward_peak, inputs, one_loss, training_peak
from .memory_trace import no_memory, without_data


@dataclass(frozen=True)
class Role:
    """One process: ``parts`` are bytes by name, all of them held at its peak."""

    name: str
    gpus: float
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """parameters and trained: counts of the network's. notes: what could not be counted."""

    parameters: int
    trained: int
    roles: list[Role]
    notes: list[str]

    @property
    def update_bytes(self) -> int:
        """Bytes of one version of the weights in transit."""
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
    try:
        folder = ModelFolder.of(config)
        if folder is not None:
            folder.check(network=bool(config.model.init))
            latent_space(config)
    except (OSError, ValueError) as error:
        key, named = ("init", config.model.init) if config.model.init else ("encoders", config.model.encoders)
        raise ConfigError(
            f"model.{key} = {named!r}: {error}; give a complete model folder, such as `hf download` of a "
            "diffusers repository or a run of ours leaves it"
        ) from None


class _Estimator:
    """Computes the roles, and the parts that they share once."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = ModelFolder.of(config)
        self.shape = (latent_space(config)[0], *(latent_space(config)[1],) * 2)
        self.text_shape = text_shape(config)
        self.networks: dict[tuple, nn.Module] = {}
        self.counts: tuple[int, int] | None = None
        self.vae = empty_vae(self.folder)
        self.notes: list[str] = []

    def estimate(self) -> Estimate:
        c, r, stages = self.config, self.config.resources, set(self.config.run.stages)
        roles = []
        if "pretrain" in stages:
            roles.append(self._pretrainer(_device(r.learner_gpus)))
        if "rl" in stages:
            roles.append(self._learner(_device(r.learner_gpus)))
        if stages & {"before", "rl", "after"}:
            roles.append(self._rollout(_device(r.rollout_gpus)))
            for x in c.rewards.all:
                size = scorer_bytes(x)
                if size is not None:
                    roles.append(Role(f"reward {x.name}", c.rewards.replicas_of(x).gpus, {"weights": size}))
        if self.counts is None:
            self._network("rl", torch.float32)
        assert self.counts is not None
        return Estimate(*self.counts, roles, self.notes)

    def _learner(self, device: str) -> Role:
        c, g = self.config, self.config.rl
        whole = build_algorithm(c)
        short, left_out = whole.shortened()
        algorithm = build_algorithm(short)
        dtype = self._dtype(device)
        networks, copied = self._learner_networks(algorithm, dtype)
        parts = {"network" if i == 0 else f"{name} network": held(x) for i, (name, x) in enumerate(networks.items())}
        parts |= self._text(dtype) | {"batch": self._batch_bytes(whole)}
        if copied is not None:
            parts["reference copy"] = held(copied)
        first = next(iter(networks.values()))
        if g.ema:
            parts["EMA"] = 4 * count(trainable(first).values())
        gradients = self._gradients(algorithm, parts, device) if algorithm.needs_gradients else None
        reference: Denoiser | None = None
        if algorithm.needs_reference:
            reference = copied or without_adapters(first, first)  # type: ignore[assignment]  # it wraps either form
        with no_memory():
            if not algorithm.traceable:
                self.notes.append(
                    f"what {c.run.algorithm} does beyond one forward and backward of each of its networks"
                )
                losses = {name: one_loss(c, network) for name, network in networks.items()}
            else:
                scope = partial(adapters_off, first) if c.model.lora else nullcontext
                found = first_updates(short, algorithm, networks, reference, gradients, scope)
                losses = {name: update.losses for name, update in found.items()}
            peaks = {
                name: left_out + training_peak(losses[name], trainable(x).values(), dtype, device)
                for name, x in networks.items()
            }
        trained = {name: count(trainable(x).values()) for name, x in networks.items()}
        return Role("learner rank", c.resources.learner_gpus, with_engines(parts, c, trained, peaks, g.anchor))

    def _learner_networks(
        self, algorithm: Algorithm, dtype: torch.dtype
    ) -> tuple[dict[str, nn.Module], nn.Module | None]:
        """The networks that the algorithm trains, and the reference where it is a copy."""
        denoiser = empty_form(self.config, "rl", dtype)
        networks = algorithm.networks(denoiser)
        copied = None
        if algorithm.needs_reference and not self.config.model.lora:
            copied = without_data(copy.deepcopy(denoiser).requires_grad_(False))
        for network in networks.values():
            without_data(network)
        self._keep("rl", dtype, denoiser)
        return networks, copied

    def _gradients(self, algorithm: Algorithm, parts: dict[str, int], device: str) -> RewardGradients:
        """The training rewards on this rank; adds the bytes they hold to ``parts``."""
        gradients, unknown = empty_gradients(self.config, self.vae, algorithm.normalize_gradients, device)
        if self.vae is not None:
            parts["autoencoder"] = held(self.vae)
        known = {name: scorer for name, (scorer, _) in gradients.scorers.items() if name not in unknown}
        parts |= {f"reward {name}": scorer_held(scorer) for name, scorer in known.items()}
        if unknown:
            self.notes.append(f"the network of {', '.join(unknown)} on the learner, not known before it is loaded")
        return gradients

    def _pretrainer(self, device: str) -> Role:
        c, p = self.config, self.config.pretrain
        network, parts, dtype = self._start("pretrain", device)
        share = p.batch_size // c.resources.learner_workers
        micro = p.micro_batch_size or share
        trained = trainable(network)
        parts["EMA"] = 4 * count(trained.values())
        parts["batch"] = share * (4 * self._numel() + self._text_bytes())
        with no_memory():
            losses = Matching(c).losses(network, *inputs(c, network, micro)[1:], 0)
            peak = training_peak(losses, trained.values(), dtype, device)
            if self.vae is not None and c.data.source == "faces":  # shards are encoded before
                parts["autoencoder"] = held(self.vae)
                peak = max(peak, encoding_peak(self.vae, self.shape, share, device))
        parts = with_engines(parts, c, {"policy": count(trained.values())}, {"policy": peak})
        return Role("pretrainer rank", c.resources.learner_gpus, parts)

    def _rollout(self, device: str) -> Role:
        c, g = self.config, self.config.rl
        network, parts, dtype = self._start("rl", device)
        rows = g.rows
        if self.vae is not None:
            parts["autoencoder"] = held(self.vae)
        parts["chain and text"] = rows * (8 * c.sampler.num_inference_steps * self._numel() + self._text_bytes())
        with no_memory():
            network.requires_grad_(False)
            sampling = forward_peak(c, network, rows, dtype, device)
            decoding = decoding_peak(self.vae, self.shape, rows, device)
        parts["sampling" if sampling >= decoding else "decoding"] = max(sampling, decoding)
        return Role("rollout actor", c.resources.rollout_gpus, parts)

    def _dtype(self, device: str) -> torch.dtype:
        precision = self.config.model.precision
        if device == "cuda" and precision == "auto":
            precision = "bfloat16"  # of every GPU that this is likely to run on, asked for on a machine without one
        return compute_dtype(precision, "cpu")

    def _start(self, stage: str, device: str) -> tuple[nn.Module, dict[str, int], torch.dtype]:
        dtype = self._dtype(device)
        network = self._network(stage, dtype)
        return network, {"network": held(network), **self._text(dtype)}, dtype

    def _text(self, dtype: torch.dtype) -> dict[str, int]:
        return {"text encoders": text_encoder_bytes(self.config, self.folder, dtype)}

    def _network(self, stage: str, dtype: torch.dtype) -> nn.Module:
        """In the form in which ``stage`` trains it; the rollout takes the learner's, so the learner comes first."""
        if (stage, dtype) not in self.networks:
            self._keep(stage, dtype, without_data(empty_form(self.config, stage, dtype)))
        return self.networks[stage, dtype]

    def _keep(self, stage: str, dtype: torch.dtype, network: nn.Module) -> None:
        self.networks = {(stage, dtype): network}
        self.counts = count(network.parameters()), count(trainable(network).values())

    def _batch_bytes(self, algorithm: Algorithm) -> int:
        """Bytes of an iteration on a rank: text states, and where rollouts sample, the chain and its weights."""
        each = self._text_bytes()
        if algorithm.needs_rollouts:
            each += 4 * algorithm.chain_tensors * self._numel() + 8
        return algorithm.micro_batches(self.config.resources.learner_workers) * self.config.rl.rows * each

    def _text_bytes(self) -> int:
        length, width, pooled = self.text_shape
        return 4 * (length * (width + 1) + pooled)

    def _numel(self) -> int:
        channels, height, width = self.shape
        return channels * height * width


def _device(gpus: float) -> str:
    return "cuda" if gpus else "cpu"
