"""The plan that ``--dry-run`` prints: stages, who gets what, shapes, bytes and bounds."""

from __future__ import annotations

from .algorithms import grpo
from .config import Config
from .models.loading import build_denoiser

_MB = 1024**2


def describe(config: Config) -> str:
    """A page of text about the run, from the config alone."""
    g, p, r, w, s = config.grpo, config.pretrain, config.resources, config.rewards, config.sampler
    parameters = sum(x.numel() for x in build_denoiser(config).parameters())
    micro_bytes = grpo.bytes_per_micro_batch(config)
    images = g.prompts_per_step * g.group_size
    actions = s.num_inference_steps - 1
    trained = g.trained_steps or actions
    weights = parameters * 4 / _MB
    # float32 weights, gradients and two Adam moments; the moments are shared from ZeRO 1, the rest later.
    z, n = config.learner.zero_stage, r.learner_workers
    state = weights * (1 / (n if z == 3 else 1) + 1 / (n if z >= 2 else 1) + 2 / (n if z >= 1 else 1))
    reference = weights if g.kl_coef else 0.0
    unit = lambda gpus: f"{gpus:g} GPU" if gpus else "CPU"  # noqa: E731
    lines = [
        f"run        {config.run.name}, seed {config.run.seed}; stages: {', '.join(config.run.stages)}",
        f"model      {parameters / 1e6:.2f} M parameters, {config.data.size}x{config.data.size}, "
        f"precision {config.model.precision}",
        f"sampler    {s.name}, {s.num_inference_steps} steps from T = {s.start_time} on the {s.grid} grid, "
        f"guidance {s.guidance_scale}: {actions} actions",
        f"pretrain   {p.steps} steps of {p.batch_size} images on {n} rank(s), candidates {p.candidates}",
        f"rollout    {r.rollout_actors} actor(s), {unit(r.rollout_gpus)} each",
        f"rewards    {', '.join(x.name for x in w.train)}; held out: {', '.join(x.name for x in w.heldout) or 'none'}; "
        f"{w.replicas} replica(s), {unit(w.num_gpus)} each",
        f"learner    {n} rank(s), {unit(r.learner_gpus)} each, ZeRO {z}; about {state + reference:.0f} MB a rank for "
        "weights, gradients, Adam and the reference, without activations",
        f"iteration  {g.prompts_per_step} prompts x {g.group_size} samples = {images} images in {g.micro_batches} "
        f"micro-batches of {g.groups_per_micro_batch} groups; {trained} of {actions} actions trained; "
        f"{g.updates_per_step} update(s); {g.steps} iterations",
        f"in flight  {micro_bytes / _MB:.1f} MB a micro-batch, {g.micro_batches * micro_bytes / _MB:.1f} MB an iteration; "
        f"bound {g.max_bytes_in_flight / _MB:.0f} MB; weights {weights:.1f} MB a version",
        f"staleness  at most {g.max_staleness} version(s)" + (" (synchronous)" if g.max_staleness == 0 else ""),
    ]
    return "\n".join(lines)
