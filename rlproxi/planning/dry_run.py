"""The plan that ``--dry-run`` prints: stages, who gets what, shapes, bytes and bounds."""

from __future__ import annotations

from collections.abc import Iterator

from ..algorithms import registry
from ..algorithms.base import Algorithm
from ..algorithms.grpo import bytes_per_micro_batch
from ..config.algorithms import Fake
from ..config.loading import Config
from ..config.sections import Reward, Rewards
from ..proximal.samplers import AFTER
from .memory import Estimate, Role, estimate

_MB, _GIB = 1024**2, 1024**3


def describe(config: Config) -> Iterator[str]:
    """The lines of a page about the run, from the config and its model folders' config.json files; no weights are read. The first
    comes at once, the others once the memory is counted, which takes seconds.

    Raises ConfigError where ``model.init`` or ``model.encoders`` is no usable folder or does not fit the config.
    """
    yield f"run        {config.run.name}, seed {config.run.seed}; stages: {', '.join(config.run.stages)}"
    if not set(config.run.stages) - {"curate", "report"}:
        yield from _curation(config)
        return
    memory = estimate(config)
    yield from [*_plan(config, memory), *map(_memory, memory.roles)]
    yield from (f"memory     not counted: {note}" for note in memory.notes)


def _curation(config: Config) -> list[str]:
    c = config.curate
    asked = [
        name
        for name, wanted in (
            ("faces", c.faces),
            ("duplicates", c.duplicates),
            ("captions", c.caption),
            ("hands", c.hands),
        )
        if wanted
    ]
    return [
        f"curate     {', '.join(c.urls) or 'nothing yet'} -> {c.out or '<run directory>/curated'}",
        f"steps      at least {c.min_size} px, aspect up to {c.max_aspect:g}; "
        + ", ".join([*(f"filter {x.name}" for x in c.filters), *asked]),
        f"workers    {c.workers}, {c.num_cpus:g} CPU and {c.num_gpus:g} GPU each",
    ]


def _plan(config: Config, memory: Estimate) -> list[str]:
    p, r, s, stages = config.pretrain, config.resources, config.sampler, config.run.stages
    algorithm = registry.build(config) if "rl" in stages else None
    sampled = algorithm is None or algorithm.needs_rollouts
    whole = memory.trained == memory.parameters
    actions = f": {s.num_inference_steps - 1} actions" if algorithm is not None and config.section == "grpo" else ""
    return [
        f"model      {memory.parameters / 1e6:.2f} M parameters, {'all' if whole else f'{memory.trained / 1e6:.2f} M'} "
        f"trained, {config.data.size}x{config.data.size}, precision {config.model.precision}",
        f"sampler    {s.name}, {_several(s.num_inference_steps, 'step')} from T = {s.start_time} on the {s.grid} grid, "
        f"guidance {s.guidance_scale}{actions}",
        *(
            [
                f"pretrain   {p.steps} steps of {p.batch_size} images on {r.learner_workers} rank(s), candidates "
                f"{p.candidates}"
            ]
            if "pretrain" in stages
            else []
        ),
        f"rollout    {r.rollout_actors} actor(s), {_unit(r.rollout_gpus)} each{'' if sampled else '; evaluations only'}",
        _rewards(config.rewards),
        f"learner    {r.learner_workers} rank(s), {_unit(r.learner_gpus)} each, ZeRO {config.learner.zero_stage}",
        *(_training(config, algorithm, memory) if algorithm is not None else []),
    ]


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _unit(gpus: float) -> str:
    return f"{gpus:g} GPU" if gpus else "CPU"


def _rewards(w: Rewards) -> str:
    """The rewards' actors; in brackets what a reward has of its own."""

    def told(x: Reward) -> str:
        r, own = w.replicas_of(x), []
        if x.replicas is not None or x.max_replicas is not None:
            own.append(f"{r.least} replica(s)" if r.most == r.least else f"{r.least} to {r.most} replicas")
        if x.num_gpus is not None:
            own.append(f"{_unit(r.gpus)} each")
        return f"{x.name} ({', '.join(own)})" if own else x.name

    return (
        f"rewards    {', '.join(map(told, w.train))}; held out: {', '.join(map(told, w.heldout)) or 'none'}; "
        f"{w.replicas} replica(s), {_unit(w.num_gpus)} each"
    )


def _training(config: Config, algorithm: Algorithm, memory: Estimate) -> list[str]:
    """What the stage rl does, and what is on its way between the actors."""
    g, name = config.rl, config.section
    weights = f"weights {memory.update_bytes / _MB:.1f} MB a version"
    places = ["rewards with gradients on the learner"] if algorithm.needs_gradients else []
    anchor = [f"anchor {g.anchor:g}"] if g.anchor else []
    ema = [f"evaluated and saved as an average of decay {g.ema:g}"] if g.ema else []
    lines = [
        f"algorithm  {config.run.algorithm}: " + ", ".join([*_ABOUT[name](config), *anchor, *ema, *places]),
        f"iteration  {g.prompts_per_step} prompts x {_several(g.group_size, 'sample')} = "
        f"{g.prompts_per_step * g.group_size} images in {g.micro_batches} micro-batches of {g.groups_per_micro_batch} "
        f"groups; {g.updates_per_step} update(s); {g.steps} iterations",
    ]
    if not algorithm.needs_rollouts:
        return [*lines, f"in flight  nothing but evaluations; {weights}"]
    micro = bytes_per_micro_batch(config)
    whole = g.micro_batches * micro
    known = [f"{micro / _MB:.1f} MB a micro-batch, {whole / _MB:.1f} MB an iteration"] if micro else []
    return [
        *lines,
        "in flight  " + "; ".join([*known, f"bound {g.max_bytes_in_flight / _MB:.0f} MB", weights]),
        f"staleness  at most {g.max_staleness} version(s)" + (" (synchronous)" if g.max_staleness == 0 else ""),
    ]


def _grpo(config: Config) -> list[str]:
    g, actions = config.grpo, config.sampler.num_inference_steps - 1
    return [
        f"{g.trained_steps or actions} of {actions} actions trained",
        f"clip {g.clip_range:g}",
        f"KL {g.kl_coef:g}",
        *([f"the reward's gradient through the last step x {g.last_step_weight:g}"] if g.last_step_weight else []),
    ]


def _r0(config: Config) -> list[str]:
    g, n = config.r0, config.sampler.num_inference_steps
    how = "gradient step by step" if g.checkpoint_steps else "gradient through all of them at once"
    return [
        f"one random step of {n} (R0+)" if g.plus else f"{_several(n, 'step')}, {how}",
        *(["eta drawn anew for each step"] if g.random_eta and config.sampler.name in AFTER else []),
        *([] if g.normalize_gradients else ["gradients as large as they are"]),
        *([f"guidance as a reward x {g.guidance_weight:g}"] if g.guidance_weight else []),
        *(
            [f"a step towards the reference's distribution x {g.distribution_weight:g}, {_fake(g)}"]
            if g.distribution_weight
            else []
        ),
    ]


def _fake(g: Fake) -> str:
    return f"{g.fake_updates} fake update(s) of rate {g.fake_lr:g}"


def _didr(config: Config) -> list[str]:
    g = config.didr
    shape = f"m={g.reward_steps}, " + ("damped" if g.damped else _several(g.particles, "particle"))
    reward = {
        "diffused": f"diffused reward, beta {g.beta:g}, {shape}",
        "none": "no reward",
        "terminal": f"terminal reward x {g.reward_weight:g}",
    }[g.reward]
    return [
        f"{g.divergence} divergence",
        reward,
        _fake(g),
        f"levels of candidates {g.candidates or config.pretrain.candidates}",
        *([f"reference's guidance {g.guidance_scale:g}"] if g.guidance_scale != 1 else []),
    ]


def _custom(config: Config) -> list[str]:
    return [f"{key} {value}" for key, value in config.custom.params.items()] or ["no params"]


_ABOUT = {"grpo": _grpo, "r0": _r0, "didr": _didr, "custom": _custom}


def _memory(role: Role) -> str:
    """One role's peak, the largest part first."""
    parts = sorted(role.parts.items(), key=lambda item: -item[1])
    return (
        f"memory     {role.name}: {role.total / _GIB:.2f} GiB of {'its GPU' if role.gpus else 'host memory'}: "
        + ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts if size)
    )
