"""The catalogue of metrics: what each is, its unit and how to read it, for dashboards, exporters and reports."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: The rows of the generated dashboards, in their order.
SECTIONS = ("Rewards", "Policy", "Optimisation", "Variety and distance to data", "Speed", "Faults", "Data")
KINDS = ("gauge", "counter", "histogram")
_PART = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue.

    Attributes:
        name: may hold one <part> that stands for any word, as in reward/<name>. unit: '1' is a plain number.
        kind: gauge, the newest value; counter, a sum over the run; histogram, the distribution of values.
        total: each record of a counter holds the sum so far, not the increase. section: its row in a dashboard.
    """

    name: str
    unit: str
    help: str
    reading: str
    kind: str = "gauge"
    section: str = "Rewards"
    total: bool = False

    @property
    def part(self) -> str | None:
        """The name of its <part>, which is a label of its series; None without one."""
        found = _PART.search(self.name)
        return found[1] if found else None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its series in Prometheus."""
        return ("run", "stage", *([self.part] if self.part else []))

    def part_of(self, name: str) -> str | None:
        """Return the word in place of <part> in a logged name; "" for a metric without one; None for another's name."""
        found = re.fullmatch(_PART.sub("([^/]+)", self.name), name)
        return None if found is None else "".join(found.groups())

    def matches(self, name: str) -> bool:
        """Return whether a logged name is of this metric."""
        return self.part_of(name) is not None


def prometheus_name(metric: Metric) -> str:
    """Return the metric's name for Ray, which adds ``ray_`` in front.

    A <part> at the end becomes a label only. Elsewhere its word stays in the name too, because "<network>/loss" is not
    "loss". A counter ends in _total, by Prometheus's convention.
    """
    words = _PART.sub(lambda found: "" if found.end() == len(metric.name) else found[1], metric.name)
    name = "rlproxi_" + re.sub(r"\W+", "_", words.rstrip("/"))
    return f"{name}_total" if metric.kind == "counter" else name


def series(name: str) -> str:
    """Return a catalogue entry's name in PromQL, without labels. Raises KeyError for a name that is no entry."""
    return f"ray_{prometheus_name(entry(name))}"


CATALOGUE: tuple[Metric, ...] = (
    Metric(
        "loss",
        "1",
        "The stage's objective, before the optimizer step.",
        "Pre-training: falls fast, then slowly. RL: hovers near 0 and says little; watch the rewards.",
        section="Optimisation",
    ),
    Metric(
        "grad_norm",
        "1",
        "Global gradient norm before clipping.",
        "Steady is good. Always above the clip value: clipping sets the size of updates, not the learning rate.",
        section="Optimisation",
    ),
    Metric(
        "lr",
        "1",
        "Learning rate of this step.",
        "Follows warm-up and decay; 0 or flat where it should not be is a bug.",
        section="Optimisation",
    ),
    Metric(
        "step",
        "steps",
        "The newest step of the stage that was logged.",
        "A straight line. Flat: the stage waits, see the idle shares and the warnings.",
        section="Speed",
    ),
    Metric(
        "images_per_second",
        "images/s",
        "Images trained on (pretrain) or sampled, scored and trained on (rl).",
        "A drop at constant config: spilling objects, a slow reward replica, or a busy machine.",
        section="Speed",
    ),
    Metric(
        "images_per_second/gpu",
        "images/s",
        "images_per_second of the stage rl for each GPU that the run holds.",
        "Falls when GPUs are added to a role that is idle already.",
        section="Speed",
    ),
    Metric(
        "idle/<role>",
        "share",
        "Share of an iteration that rollout, reward or learner was idle; its actors' mean.",
        "The role with the lowest share limits the speed. Near 1 for long: its hardware is of more use elsewhere.",
        section="Speed",
    ),
    Metric(
        "reward/mean",
        "reward",
        "Mean weighted training reward of the step's samples.",
        "Should rise. If heldout/<name> rises too, the policy is improving.",
    ),
    Metric(
        "reward/std",
        "reward",
        "Mean standard deviation of the reward inside a group.",
        "Advantages come from it. Towards 0: a prompt's samples have become alike, and training has no signal.",
    ),
    Metric(
        "reward/<name>",
        "reward",
        "Mean of one training reward, before its weight.",
        "Shows which term of a weighted sum changes.",
    ),
    Metric(
        "last_step/reward",
        "reward",
        "Mean reward of the samples in the last step's gradient (grpo.last_step_weight).",
        "Should rise with reward/mean. Alone: the last step is trained, and the policy is not.",
    ),
    Metric(
        "heldout/<name>",
        "reward",
        "Mean of a reward that is never optimised, on fixed prompts and seeds.",
        "The figure to decide by. Falling while reward/mean rises is reward hacking: stop, or raise grpo.kl_coef.",
    ),
    Metric(
        "heldout_sem/<name>",
        "reward",
        "Standard error of heldout/<name> over its prompts.",
        "A change of less than two of these is no change. Too large: raise evaluate.prompts.",
    ),
    Metric(
        "evaluation/<name>",
        "reward",
        "Mean of a training reward on the held-out prompts; in evaluations.",
        "Far below reward/<name>: the policy is better on its training prompts only.",
    ),
    Metric(
        "diversity",
        "1",
        "Mean RMS difference between two samples of a prompt, 16 x 16 cells each; in evaluations.",
        "Falls when samples of a prompt become alike. Compare with real images', where the evaluation has them.",
        section="Variety and distance to data",
    ),
    Metric(
        "distance/total",
        "1",
        "Distance of an evaluation's images to data: distance/layout + distance/texture.",
        "Should fall or stay. Rising with the rewards: images gain reward by what real images do not have.",
        section="Variety and distance to data",
    ),
    Metric(
        "distance/layout",
        "1",
        "Frechet distance of 8 x 8 cell means to the data's, over their total variance.",
        "Colours and composition, and missing variety. Its floor is the distance of as many real images.",
        section="Variety and distance to data",
    ),
    Metric(
        "distance/texture",
        "1",
        "Frechet distance of 4 x 4 patches to the data's, over their total variance.",
        "Grids, noise and blur, which judges overlook. Several times that of real images is visible.",
        section="Variety and distance to data",
    ),
    Metric(
        "kl",
        "nats",
        "KL(pi || pi_ref) of a trained step, exact; mean over dimensions unless grpo.reduction=sum.",
        "Grows slowly from 0. Jumps: lower the learning rate or raise grpo.kl_coef.",
        section="Policy",
    ),
    Metric(
        "clip_fraction",
        "share",
        "Share of samples whose ratio left the clip range.",
        "0 in the first of several updates. Near 0 always: clipping is idle; above 0.5: steps are too big.",
        section="Policy",
    ),
    Metric(
        "ratio/first_max_deviation",
        "1",
        "Largest |ratio - 1| before the first update on fresh samples.",
        "0 when learner and rollout compute the same thing; the run stops above grpo.first_ratio_tolerance.",
        section="Policy",
    ),
    Metric(
        "ratio/max_deviation",
        "1",
        "Largest |ratio - 1| over the step's updates.",
        "Of the order of the clip range once there are several updates on one batch, or stale groups.",
        section="Policy",
    ),
    Metric(
        "ratio/mean",
        "1",
        "Mean probability ratio of new to old policy.",
        "Stays at 1 within the clip range.",
        section="Policy",
    ),
    Metric(
        "ratio/max_log",
        "1",
        "Largest |log-ratio| over the step's updates.",
        "Small against 1. An update above guards.max_log_ratio is not made.",
        section="Policy",
    ),
    Metric(
        "ratio/first_max/<index>",
        "1",
        "Largest |log-ratio| at a trained sampling step, before the first update on the samples.",
        "0 for samples of the learner's own weights. With staleness or averaged weights it shows the difference.",
        section="Policy",
    ),
    Metric(
        "sampler/limit_deviation",
        "share",
        "Difference of a noise-free step of the trained network from the deterministic sampler's, once at the start.",
        "0, or rounding; the run stops above guards.sampler_tolerance.",
        section="Policy",
    ),
    Metric(
        "skipped_updates",
        "updates",
        "Updates that were not made: NaN, Inf, or a ratio out of bounds.",
        "0 is normal. Each is a warning that says why; guards.skips_in_a_row of them go back to a checkpoint.",
        kind="counter",
        section="Faults",
    ),
    Metric(
        "rollbacks",
        "rollbacks",
        "Times that the stage went back to a checkpoint with a lower learning rate, so far.",
        "0 is normal. More: start the next run with the lower rate.",
        kind="counter",
        total=True,
        section="Faults",
    ),
    Metric(
        "advantages/zero_variance_groups",
        "groups",
        "Groups of the step whose rewards were all equal.",
        "They have no advantage. Most of the step: the reward is saturated or too coarse, or the group too small.",
        section="Faults",
    ),
    Metric("groups", "groups", "Groups of the step.", "Constant: prompts of an iteration.", section="Faults"),
    Metric(
        "groups/masked",
        "groups",
        "Groups of the step that had no usable scores.",
        "0 is normal. The run stops above rewards.max_masked_fraction; see the reward service's warnings.",
        kind="counter",
        section="Faults",
    ),
    Metric(
        "samples/masked",
        "samples",
        "Samples of the step without a score, those of masked groups included.",
        "Above 0 with whole groups scored: a scorer returns NaN for single images (rewards.on_failure=mask_sample).",
        kind="counter",
        section="Faults",
    ),
    Metric(
        "restarts",
        "restarts",
        "Rollout actors and reward replicas that died, and learner restarts, so far.",
        "0, or a few where machines are preemptible. Steady growth: the first warning names what dies.",
        kind="counter",
        total=True,
        section="Faults",
    ),
    Metric(
        "warnings",
        "warnings",
        "Warnings in the run log.",
        "Read them: they name the group, the scorer or the actor.",
        kind="counter",
        section="Faults",
    ),
    Metric(
        "alarms",
        "alarms",
        "Alarms of the over-optimisation guard.",
        "1 is enough to look: held-out rewards fell or the distance to data grew; models/best is from before.",
        kind="counter",
        section="Faults",
    ),
    Metric(
        "staleness/mean",
        "versions",
        "Weight versions between sampling a group and training on it.",
        "0 when synchronous, at most rl.max_staleness.",
        section="Speed",
    ),
    Metric(
        "seconds/rollout",
        "s",
        "Time spent on sampling the step's groups, actors added up.",
        "The largest of the roles limits the speed; more rollout actors share it.",
        section="Speed",
    ),
    Metric(
        "seconds/reward",
        "s",
        "Time spent on scoring the step's groups, micro-batches added up.",
        "Grows: add rewards.replicas.",
        section="Speed",
    ),
    Metric(
        "seconds/train",
        "s",
        "Time of replay, backward and optimizer steps.",
        "Scales with grpo.trained_steps and rl.updates_per_step.",
        section="Speed",
    ),
    Metric(
        "seconds/sync",
        "s",
        "Time to publish new weights and load them on the rollout actors.",
        "Small against the others; if not, the object store is spilling.",
        section="Speed",
    ),
    Metric(
        "seconds/step",
        "s",
        "Wall-clock time of the whole iteration.",
        "Below the sum of the roles when they overlap, above it when something waits.",
        kind="histogram",
        section="Speed",
    ),
    Metric(
        "shards",
        "shards",
        "Shards encoded or curated so far.",
        "Grows evenly; a pause is a slow storage or a large shard.",
        kind="counter",
        total=True,
        section="Data",
    ),
    Metric(
        "samples",
        "samples",
        "Samples read so far in encode or curate.",
        "With `shards` it shows how full shards are.",
        kind="counter",
        total=True,
        section="Data",
    ),
    Metric(
        "skipped",
        "samples",
        "Samples that could not be read so far.",
        "The manifest names each and says why.",
        kind="counter",
        total=True,
        section="Data",
    ),
    Metric(
        "passed",
        "samples",
        "Samples that passed the filters so far.",
        "Far below `samples`: see the funnel in curation.html.",
        kind="counter",
        total=True,
        section="Data",
    ),
    Metric(
        "bytes/weights",
        "bytes",
        "Size of one weight update to the rollout actors: what is trained, in float32.",
        "With model.lora the adapters alone: often a hundredth of the network.",
        section="Speed",
    ),
    Metric(
        "bytes_in_flight",
        "bytes",
        "Sampled data that is not trained on yet.",
        "Bounded by rl.max_bytes_in_flight; at the bound, sampling waits for the learner.",
        section="Speed",
    ),
    # Patterns with an open beginning come last: a reward may be called loss.
    Metric(
        "<network>/loss",
        "1",
        "The objective of a network that is trained beside the policy, as DIDR's fake score.",
        "Low and steady: it follows the generator. Rising: give it more updates (fake.updates).",
        section="Optimisation",
    ),
    Metric(
        "<network>/grad_norm", "1", "Its global gradient norm before clipping.", "As grad_norm.", section="Optimisation"
    ),
    Metric("<network>/lr", "1", "Its learning rate of this step.", "As lr.", section="Optimisation"),
    Metric(
        "other/<name>",
        "1",
        "A value that a custom algorithm logs under a name outside this list.",
        "See the algorithm's own documentation.",
        section="Optimisation",
    ),
)


def entry(name: str) -> Metric:
    """Return the entry of exactly this name, with its <part>. Raises KeyError."""
    return _ENTRIES[name]


_ENTRIES = {metric.name: metric for metric in CATALOGUE}


def lookup(name: str) -> Metric | None:
    """Return the entry for a logged name, an exact one before a pattern; None for an unknown name."""
    if name in _ENTRIES:
        return _ENTRIES[name]
    return next((metric for metric in CATALOGUE if metric.matches(name)), None)
