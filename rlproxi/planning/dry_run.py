"""The plan that ``--dry-run`` prints: stages, who gets what, shapes, bytes and bounds."""

from __future__ import annotations

from collections.abc import Iterator

from ..algorithms.base import Algorithm, build_algorithm
from ..config.loading import Config
from ..config.sections import Reward, Rewards
from .memory import Estimate, Role, estimate

_MB, _GIB = 1024**2, 1024**3


def describe(config: Config) -> Iterator[str]:
    """The lines of a page about the run, from the config and its model folders' config.json files, without weights.

    The first line comes at once, the others when the memory is counted, which takes seconds.

    Raises ConfigError where ``model.init`` or ``model.encoders`` is no usable folder or does not fit the config.
    """
    yield f"run        {config.run.name}, seed {config.run.seed}; stages: {', '.join(config.run.stages)}"
    if not set(config.run.stages) - {"curate", "report"}:
        yield from _curation(config)
        return
    memory = estimate(config)
    yield from [*plan(config, memory), *map(_memory, memory.roles)]
    yield from (f"memory     not counted: {note}" for note in memory.notes)


def _curation(config: Config) -> list[str]:
    c = config.curate
    wanted = {"faces": c.faces, "duplicates": c.duplicates, "captions": c.caption, "hands": c.hands}
    steps = ", ".join([*(f"filter {x.name}" for x in c.filters), *(name for name, asked in wanted.items() if asked)])
    return [
        f"curate     {', '.join(c.urls) or 'nothing yet'} -> {c.out or '<run directory>/curated'}",
        f"steps      at least {c.min_size} px, aspect up to {c.max_aspect:g}; {steps}",
        f"workers    {c.workers}, {c.num_cpus:g} CPU and {c.num_gpus:g} GPU each",
    ]


def plan(config: Config, memory: Estimate) -> list[str]:
    """The lines of the plan ahead of those of the memory, each with its topic in the first ten columns."""
    p, r, s, stages = config.pretrain, config.resources, config.sampler, config.run.stages
    algorithm = build_algorithm(config) if "rl" in stages else None
    sampled = algorithm is None or algorithm.needs_rollouts
    trained = "all" if memory.trained == memory.parameters else f"{memory.trained / 1e6:.2f} M"
    pretrain = (
        f"pretrain   {p.steps} steps of {p.batch_size} images on {r.learner_workers} rank(s), candidates {p.candidates}"
    )
    return [
        f"model      {memory.parameters / 1e6:.2f} M parameters, {trained} "
        f"trained, {config.data.size}x{config.data.size}, precision {config.model.precision}",
        f"sampler    {s.name}, {_several(s.num_inference_steps, 'step')} from T = {s.start_time} on the {s.grid} grid, "
        f"guidance {s.guidance_scale}",
        *([pretrain] if "pretrain" in stages else []),
        f"rollout    {r.rollout_actors} actor(s), {_unit(r.rollout_gpus)} each"
        + ("" if sampled else "; evaluations only"),
        _rewards(config.rewards),
        f"learner    {r.learner_workers} rank(s), {_unit(r.learner_gpus)} each, ZeRO {config.learner.zero_stage}",
        *(_training(config, algorithm, memory) if algorithm is not None else []),
    ]


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _unit(gpus: float) -> str:
    return f"{gpus:g} GPU" if gpus else "CPU"


def _rewards(w: Rewards) -> str:
    """The rewards' actors; in brackets each reward's own settings."""

    def line(x: Reward) -> str:
        r, own = w.replicas_of(x), []
        if x.replicas is not None or x.max_replicas is not None:
            own.append(f"{r.least} replica(s)" if r.most == r.least else f"{r.least} to {r.most} replicas")
        if x.num_gpus is not None:
            own.append(f"{_unit(r.gpus)} each")
        return f"{x.name} ({', '.join(own)})" if own else x.name

    return (
        f"rewards    {', '.join(map(line, w.train))}; held out: {', '.join(map(line, w.heldout)) or 'none'}; "
        f"{w.replicas} replica(s), {_unit(w.num_gpus)} each"
    )


def _training(config: Config, algorithm: Algorithm, memory: Estimate) -> list[str]:
    """The algorithm, its iteration, and the data in flight between actors."""
    g = config.rl
    weights = f"weights {memory.update_bytes / _MB:.1f} MB a version"
    places = ["rewards with gradients on the learner"] if algorithm.needs_gradients else []
    anchor = [f"anchor {g.anchor:g}"] if g.anchor else []
    ema = [f"evaluated and saved as an average of decay {g.ema:g}"] if g.ema else []
    lines = [
        f"algorithm  {config.run.algorithm}: " + ", ".join([*algorithm.describe(), *anchor, *ema, *places]),
        f"iteration  {g.prompts_per_step} prompts x {_several(g.group_size, 'sample')} = "
        f"{g.prompts_per_step * g.group_size} images in {g.micro_batches} micro-batches of {g.groups_per_micro_batch} "
        f"groups; {g.updates_per_step} update(s); {g.steps} iterations",
    ]
    if not algorithm.needs_rollouts:
        return [*lines, f"in flight  nothing but evaluations; {weights}"]
    micro = algorithm.bytes_per_micro_batch()
    whole = g.micro_batches * micro
    return [
        *lines,
        f"in flight  {micro / _MB:.1f} MB a micro-batch, {whole / _MB:.1f} MB an iteration; "
        f"bound {g.max_bytes_in_flight / _MB:.0f} MB; {weights}",
        f"staleness  at most {g.max_staleness} version(s)" + (" (synchronous)" if g.max_staleness == 0 else ""),
    ]


def _memory(role: Role) -> str:
    """One role's peak, the largest part first."""
    parts = sorted(role.parts.items(), key=lambda item: -item[1])
    return (
        f"memory     {role.name}: {role.total / _GIB:.2f} GiB of {'its GPU' if role.gpus else 'host memory'}: "
        + ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts if size)
    )
