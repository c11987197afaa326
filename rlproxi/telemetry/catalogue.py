"""What each metric is, in which unit, and how to read it. Dashboards and reports take their words from here."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """``name`` may hold one <part> that stands for any word, as in reward/<name>. ``unit`` '1' is a plain number."""

    name: str
    unit: str
    help: str
    reading: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.sub(r"<\w+>", "[^/]+", self.name), name) is not None


CATALOGUE: tuple[Metric, ...] = (
    Metric("loss", "1", "The stage's objective, before the optimizer step.",
           "Pre-training: falls fast, then slowly. RL: hovers near 0 and says little; watch the rewards."),
    Metric("grad_norm", "1", "Global gradient norm before clipping.",
           "Steady is good. Always above the clip value: the learning rate decides nothing, clipping does."),
    Metric("lr", "1", "Learning rate of this step.",
           "Follows warm-up and decay; 0 or flat where it should not be is a bug."),
    Metric("images_per_second", "images/s", "Images trained on (pretrain) or sampled, scored and trained on (rl).",
           "A drop at constant config: spilling objects, a slow reward replica, or a busy machine."),
    Metric("reward/mean", "reward", "Mean weighted training reward of the step's samples.",
           "Should climb. Compare with heldout/<name>: only what both show is progress."),
    Metric("reward/std", "reward", "Mean standard deviation of the reward inside a group.",
           "What advantages are made of. Towards 0: a prompt's samples have become alike, nothing is left to learn."),
    Metric("reward/<name>", "reward", "Mean of one training reward, before its weight.",
           "Tells which term of a weighted sum moves."),
    Metric("heldout/<name>", "reward", "Mean of a reward that is never optimised, on fixed prompts and seeds.",
           "The number to trust. Falling while reward/mean climbs is reward hacking: stop, or raise grpo.kl_coef."),
    Metric("diversity", "1", "Mean RMS difference between two samples of a prompt, 16 x 16 cells each; in evaluations.",
           "Falls when samples of a prompt become alike. Compare with real images', where the evaluation has them."),
    Metric("distance/total", "1", "Distance of an evaluation's images to data: distance/layout + distance/texture.",
           "Should fall or hold. Climbing with the rewards: they are won by what no data look like."),
    Metric("distance/layout", "1", "Frechet distance of 8 x 8 cell means to the data's, over their total variance.",
           "Colours and composition; missing variety too. Its floor is that of real images, at as many of them."),
    Metric("distance/texture", "1", "Frechet distance of 4 x 4 patches to the data's, over their total variance.",
           "Grids, noise and blur, which judges overlook. Several times that of real images is visible."),
    Metric("kl", "nats", "KL(pi || pi_ref) of a trained step, exact; mean over dimensions unless grpo.reduction=sum.",
           "Grows slowly from 0. Jumps: lower the learning rate or raise grpo.kl_coef."),
    Metric("clip_fraction", "share", "Share of samples whose ratio left the clip range.",
           "0 in the first of several updates. Near 0 always: clipping is idle; above 0.5: steps are too big."),
    Metric("ratio/first_max_deviation", "1", "Largest |ratio - 1| before the first update on fresh samples.",
           "0 when learner and rollout compute the same thing; the run stops above grpo.first_ratio_tolerance."),
    Metric("ratio/max_deviation", "1", "Largest |ratio - 1| over the step's updates.",
           "Of the order of the clip range once there are several updates on one batch, or stale groups."),
    Metric("ratio/mean", "1", "Mean probability ratio of new to old policy.", "Stays at 1 within the clip range."),
    Metric("advantages/zero_variance_groups", "groups", "Groups of the step whose rewards were all equal.",
           "They teach nothing. Most of the step: the reward is saturated, or too coarse, or the group too small."),
    Metric("groups/masked", "groups", "Groups of the step that had no usable scores.",
           "0 is normal. The run stops above rewards.max_masked_fraction; see the reward service's warnings."),
    Metric("samples/masked", "samples", "Samples of the step without a score, those of masked groups included.",
           "Above 0 with whole groups scored: a scorer returns NaN for single images (rewards.on_failure=mask_sample)."),
    Metric("staleness/mean", "versions", "Weight versions between sampling a group and training on it.",
           "0 when synchronous, at most grpo.max_staleness."),
    Metric("seconds/rollout", "s", "Time spent on sampling the step's groups, actors added up.",
           "The largest of the roles sets the pace; more rollout actors share it."),
    Metric("seconds/reward", "s", "Time spent on scoring the step's groups, micro-batches added up.",
           "Grows: add rewards.replicas."),
    Metric("seconds/train", "s", "Time of replay, backward and optimizer steps.",
           "Scales with grpo.trained_steps and grpo.updates_per_step."),
    Metric("seconds/sync", "s", "Time to publish new weights and load them on the rollout actors.",
           "Small against the others; if not, the object store is spilling."),
    Metric("seconds/step", "s", "Wall-clock time of the whole iteration.",
           "Below the sum of the roles when they overlap, above it when something waits."),
    Metric("shards", "shards", "Shards encoded or curated so far.", "Grows evenly; a pause is a slow storage or a large shard."),
    Metric("samples", "samples", "Samples read so far in encode or curate.", "With `shards` it tells how full shards are."),
    Metric("skipped", "samples", "Samples that could not be read so far.", "The manifest names each and says why."),
    Metric("passed", "samples", "Samples that passed the filters so far.", "Far below `samples`: see the funnel in curation.html."),
    Metric("bytes/weights", "bytes", "Size of one weight update to the rollout actors: what is trained, in float32.",
           "With model.lora the adapters alone: often a hundredth of the network."),
    Metric("bytes_in_flight", "bytes", "Sampled data that is not trained on yet.",
           "Bounded by grpo.max_bytes_in_flight; at the bound, sampling waits for the learner."),
)


def lookup(name: str) -> Metric | None:
    """The entry for a logged name; an exact one before a pattern. None for a name the catalogue does not know."""
    for metric in CATALOGUE:
        if metric.name == name:
            return metric
    return next((metric for metric in CATALOGUE if metric.matches(name)), None)
