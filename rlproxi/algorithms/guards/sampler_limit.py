"""A check before the first update: a noise-free step of the trained network equals the deterministic sampler's step.

Without its noise a sampler is the deterministic one of its kind. ``hybrid`` becomes ``ode``; ``ddim``, ``euler`` or
``matched`` with eta > 0 become themselves with eta 0. ``backward`` has its own limit, which is ``ode`` to first order
in gamma. The coefficients are compared for every step. The network is called twice: as in training, and as in sampling.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import cast

import torch
from torch import Tensor, nn

from ...config.loading import Config
from ...models.text import operator
from ...proximal.samplers import KINDS, Step
from ...seeds import NamedNoise, Purpose
from ..base import AlgorithmStopped, Parts

#: prox(z, t, lam), [B, ...] -> [B, ...]
Ask = Callable[[Tensor, float, float], Tensor]
METRIC = "sampler/limit_deviation"


def check(config: Config, parts: Parts, prompt: str) -> float:
    """``deviation`` of the first network as it stands, on two samples of a prompt: two forwards, without gradients."""
    network = cast(nn.Module, next(iter(parts.networks.values())))  # a denoiser under its engine
    text = parts.encoder.groups((prompt,), 2)
    names: list[tuple[int, ...]] = [(config.run.seed, Purpose.SAMPLER_CHECK, i) for i in range(2)]
    x = NamedNoise(names).start(parts.sample_shape, parts.device)
    prox = operator(network, parts.encoder, config.sampler.guidance_scale)

    def sampled(z: Tensor, t: float, lam: float) -> Tensor:
        with _evaluating(network):
            return prox(z, t, lam, text)

    with torch.no_grad():
        return deviation(config, x, lambda z, t, lam: prox(z, t, lam, text), sampled)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The network as a pipeline has it; each of its modules is as before afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def deviation(config: Config, x: Tensor, trained: Ask, sampled: Ask) -> float:
    """Largest difference of the two x_{k-1}, over the deterministic one's RMS; Inf where the coefficients differ.

    The step compared is the middle one. It begins at x [B, ...].
    """
    s, schedule = config.sampler, config.schedule.build()
    kind = KINDS[s.name]
    limit = [kind.without_noise(step) for step in s.plan(schedule)]
    plan = s.model_copy(update={"name": kind.limit, "eta": 0.0}).plan(schedule) if kind.limit else limit
    if any(
        abs(a - b) > 1e-6 * max(1.0, abs(b))
        for one, two in zip(limit, plan, strict=True)
        for a, b in zip(astuple(one), astuple(two), strict=True)
    ):
        return math.inf
    ours, theirs = (_taken(steps[len(steps) // 2], x, ask) for steps, ask in ((limit, trained), (plan, sampled)))
    found = float((ours - theirs).abs().max() / theirs.square().mean().sqrt().clamp_min(1e-12))
    return found if math.isfinite(found) else math.inf


def _taken(step: Step, x: Tensor, ask: Ask) -> Tensor:
    none = lambda k, like: torch.zeros_like(like)  # noqa: E731
    return step.after(ask(step.before(x, none), step.t, step.lam).float(), x, none)


def accept(found: float, config: Config) -> None:
    """Raises AlgorithmStopped where ``deviation`` found more than guards.sampler_tolerance."""
    if not found <= config.guards.sampler_tolerance:
        raise AlgorithmStopped(
            f"before the first update a noise-free step of sampler {config.sampler.name!r} is off the deterministic "
            f"sampler's by {found:.2e} of its size (guards.sampler_tolerance = {config.guards.sampler_tolerance:g}): "
            "the network computes something else in training than in sampling. Take dropout out of it (model.init), "
            "check that its weights are finite, and set model.compile=false and model.precision=float32"
        )
