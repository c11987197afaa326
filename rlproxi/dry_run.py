"""The plan that ``--dry-run`` prints: stages, who gets what, shapes, bytes and bounds."""

from __future__ import annotations

from .algorithms import grpo
from .config import Config
from .memory import Estimate, Role, estimate

_MB, _GIB = 1024**2, 1024**3


def describe(config: Config) -> str:
    """A page of text about the run, from the config and its model folders' config.json files; no weights are read.

    Raises ConfigError where ``model.init`` or ``model.encoders`` is no usable folder or does not fit the config.
    """
    if not set(config.run.stages) - {"curate", "report"}:
        return "\n".join(_curation(config))
    return "\n".join([*_plan(config, memory := estimate(config)), *map(_memory, memory.roles)])


def _curation(config: Config) -> list[str]:
    c = config.curate
    asked = [name for name, wanted in (("faces", c.faces), ("duplicates", c.duplicates), ("captions", c.caption),
                                       ("hands", c.hands)) if wanted]
    return [f"run        {config.run.name}; stages: {', '.join(config.run.stages)}",
            f"curate     {', '.join(c.urls) or 'nothing yet'} -> {c.out or '<run directory>/curated'}",
            f"steps      at least {c.min_size} px, aspect up to {c.max_aspect:g}; "
            + ", ".join([*(f"filter {x.name}" for x in c.filters), *asked]),
            f"workers    {c.workers}, {c.num_cpus:g} CPU and {c.num_gpus:g} GPU each"]


def _plan(config: Config, memory: Estimate) -> list[str]:
    g, p, r, w, s = config.grpo, config.pretrain, config.resources, config.rewards, config.sampler
    micro_bytes = grpo.bytes_per_micro_batch(config)
    images = g.prompts_per_step * g.group_size
    actions = s.num_inference_steps - 1
    trained = g.trained_steps or actions
    unit = lambda gpus: f"{gpus:g} GPU" if gpus else "CPU"  # noqa: E731
    whole = memory.trained == memory.parameters
    return [
        f"run        {config.run.name}, seed {config.run.seed}; stages: {', '.join(config.run.stages)}",
        f"model      {memory.parameters / 1e6:.2f} M parameters, {'all' if whole else f'{memory.trained / 1e6:.2f} M'} "
        f"trained, {config.data.size}x{config.data.size}, precision {config.model.precision}",
        f"sampler    {s.name}, {s.num_inference_steps} steps from T = {s.start_time} on the {s.grid} grid, "
        f"guidance {s.guidance_scale}: {actions} actions",
        f"pretrain   {p.steps} steps of {p.batch_size} images on {r.learner_workers} rank(s), candidates "
        f"{p.candidates}",
        f"rollout    {r.rollout_actors} actor(s), {unit(r.rollout_gpus)} each",
        f"rewards    {', '.join(x.name for x in w.train)}; held out: {', '.join(x.name for x in w.heldout) or 'none'}; "
        f"{w.replicas} replica(s), {unit(w.num_gpus)} each",
        f"learner    {r.learner_workers} rank(s), {unit(r.learner_gpus)} each, ZeRO {config.learner.zero_stage}",
        f"iteration  {g.prompts_per_step} prompts x {g.group_size} samples = {images} images in {g.micro_batches} "
        f"micro-batches of {g.groups_per_micro_batch} groups; {trained} of {actions} actions trained; "
        f"{g.updates_per_step} update(s); {g.steps} iterations",
        f"in flight  {micro_bytes / _MB:.1f} MB a micro-batch, {g.micro_batches * micro_bytes / _MB:.1f} MB an "
        f"iteration; bound {g.max_bytes_in_flight / _MB:.0f} MB; weights {memory.update_bytes / _MB:.1f} MB a version",
        f"staleness  at most {g.max_staleness} version(s)" + (" (synchronous)" if g.max_staleness == 0 else ""),
    ]


def _memory(role: Role) -> str:
    """One role's peak, the largest part first."""
    parts = sorted(role.parts.items(), key=lambda item: -item[1])
    return (f"memory     {role.name}: {role.total / _GIB:.2f} GiB of {'its GPU' if role.gpus else 'host memory'}: "
            + ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts if size))
