"""The sections of a config: every key with its type, bounds and meaning. ``loading`` combines and checks them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ..proximal.samplers import SAMPLERS, Step, plan
from ..proximal.schedule import GRIDS, VPSchedule
from .algorithms import ALGORITHMS
from .section import Amounts, Section, StepCount

#: How the rewards of a group are scaled before they are weighted (``rewards.combine``).
Normalize = Literal["none", "group"]
NORMALIZE = get_args(Normalize)
Stage = Literal["curate", "encode", "prepare", "pretrain", "before", "rl", "after", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Run(Section):
    """The name, place, seed, stages and algorithm of a run."""

    name: str = Field("quickstart", description="Run directories are <dir>/<name>-<date>-<time>.")
    dir: str = Field("runs", description="Where run directories are made; on a cluster, storage all nodes share.")
    seed: int = Field(0, ge=0, description="Every random number of the run follows from this one.")
    stages: list[Stage] = Field(list(STAGES[1:]), description="Which stages run, always in their fixed order.")
    algorithm: str = Field(
        default_factory=lambda: ALGORITHMS.default,
        description="What the stage rl trains with: a registered algorithm, or your own as package.module:Class "
        "(docs/algorithms.md). `rl` has the settings that all share; the section of its name has its own, `custom` for "
        "yours.",
    )

    @field_validator("algorithm")
    @classmethod
    def _algorithm(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.]+:\w+", value):
            ALGORITHMS.get(value)
        return value


class Data(Section):
    """Images, captions and prompts."""

    source: Literal["faces", "shards"] = Field(
        "faces",
        description="faces: the embedded portraits, drawn anew from a seed; shards: image-text files at `urls`.",
    )
    urls: list[str] = Field(
        [],
        description="WebDataset tars (img2dataset's layout: jpg/png + txt + json) or parquet files: paths, folders, "
        "globs, {00000..00099} ranges, s3:// and gs:// addresses.",
    )
    size: int = Field(32, ge=16, description="Image height and width in pixels.")
    buckets: bool = Field(
        False, description="Aspect-ratio buckets of about size x size pixels in pre-training, instead of square crops."
    )
    crop: Literal["center", "random"] = Field(
        "center", description="Which part of an image is kept; random is named by the seed."
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="Images with more pixels are skipped and counted before they are decoded."
    )
    cache: str | None = Field(
        None,
        description="Folder of the cached latents and text states, one file for each shard; null: the run directory. "
        "Runs that share it encode once.",
    )
    cache_text: bool = Field(
        False, description="Cache text states beside the latents: large, and no text encoder while training."
    )
    prompts: str | None = Field(
        None,
        description="Prompts for RL: a file with one on each line (.txt) or a 'prompt' in each object (.jsonl); null: "
        "the captions of the data.",
    )
    heldout_prompts: str | None = Field(
        None,
        description="Prompts of the evaluations, a file of the same kinds; null: one in sixteen of the prompts, by "
        "hash, never trained on by RL.",
    )
    degraded: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the embedded portraits that pre-training sees dull, tilted, off-centre, blurred or "
        "noisy, as pictures on the web are. Evaluations compare with clean ones.",
    )
    hand_fraction: float = Field(
        0.25, ge=0, le=1, description="Share of the hand-focused subset among the embedded portraits."
    )
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="Captions replaced by '' in pre-training, for guidance."
    )

    @model_validator(mode="after")
    def _sources(self) -> Data:
        if self.source == "shards" and not self.urls:
            raise ValueError(
                "source is 'shards' but urls is empty: name at least one tar or parquet file, folder or glob"
            )
        if self.source == "faces" and self.urls:
            raise ValueError("urls are given but source is 'faces': set data.source=shards to read them")
        return self


class LoRA(Section):
    """Low-rank adapters, which are trained in the place of the weights."""

    rank: int = Field(32, ge=1, description="Rank of the adapters.")
    alpha: float = Field(64.0, gt=0, description="Their scale is alpha / rank.")
    targets: list[str] | None = Field(
        None,
        description="Names of the layers that get one (ends of module names); null: the network's attention layers.",
    )


class Model(Section):
    """The network, its text encoder and its arithmetic."""

    init: str | None = Field(
        None,
        description="What to start from instead of a new network: a model folder or run directory of ours, or any "
        "diffusers folder of an eps-, v- or flow-model (SD1.x, SD2.x, SDXL, SD3, PixArt), which becomes a proximal "
        "one; or builtin:portraits, which comes with rlproxi.",
    )
    encoders: str | None = Field(
        None,
        description="A diffusers folder whose autoencoder and text encoders a new network uses; null: pixels, and the "
        "built-in text encoder.",
    )
    kind: Literal["unet", "transformer"] = Field(
        "unet", description="What a new network is: our U-Net or a PixArt transformer."
    )
    patch: int = Field(4, ge=1, description="Pixel-unshuffle factor of the stem; patch size of the transformer.")
    channels: list[int] = Field([128, 256], description="U-Net: width of each level; multiples of 32 are fast.")
    blocks: list[int] = Field([1, 0], description="U-Net: residual blocks at each level, down and again up.")
    attention: list[bool] = Field([True, False], description="U-Net: text and self-attention at each level.")
    refine: int = Field(
        0,
        ge=0,
        description="U-Net: channels at full resolution behind the patches, which finish the image without the "
        "patches' grid; 0: none.",
    )
    layers: int = Field(12, ge=1, description="Transformer: number of blocks.")
    heads: int = Field(6, ge=1, description="Transformer: attention heads, each 64 wide.")
    data_std: float = Field(0.55, gt=0, description="Standard deviation of the data where no Gaussian is fitted to it.")
    text_dim: int = Field(64, ge=32, description="Width of the built-in text encoder.")
    text_layers: int = Field(2, ge=1, description="Layers of the built-in text encoder.")
    text_length: int = Field(40, ge=8, description="Tokens of a caption; longer ones are cut.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="The network's arithmetic (float32 masters always). auto: bfloat16 where it is fast."
    )
    lora: LoRA | None = Field(
        None,
        description="Train low-rank adapters and leave the rest frozen: {rank: 32, alpha: 64}; null: train everything.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    compile: bool = Field(
        False,
        description="torch.compile for the network, which takes a minute or two. It compiles the network once with "
        "gradients and once without, and the two round differently. So the first ratio is 1 only up to rounding: raise "
        "the algorithm's first_ratio_tolerance.",
    )

    @model_validator(mode="after")
    def _levels(self) -> Model:
        if not len(self.channels) == len(self.blocks) == len(self.attention):
            raise ValueError(
                f"channels {self.channels}, blocks {self.blocks} and attention {self.attention} "
                "must have one entry for each level"
            )
        bad = [c for c in self.channels if c % 32]
        if bad:
            raise ValueError(f"channels {bad} are not multiples of 32, which attention heads and fast kernels need")
        if self.lora and not self.init:
            raise ValueError("lora adapts a trained network: name it with init, or leave lora out")
        if self.init and self.encoders:
            raise ValueError(
                "init and encoders exclude each other: a model folder brings its own autoencoder and text encoders"
            )
        return self


class Schedule(Section):
    """The variance-preserving noise schedule."""

    beta_min: float = Field(0.1, gt=0, description="beta(0) of the VP schedule.")
    beta_max: float = Field(20.0, gt=0, description="beta(1) of the VP schedule.")

    def build(self) -> VPSchedule:
        """The schedule as an object of ``proximal``."""
        return VPSchedule(self.beta_min, self.beta_max)


class Sampler(Section):
    """The sampler of rollouts and evaluations."""

    name: Literal[SAMPLERS] = Field(  # type: ignore[valid-type]  # the names are those of the samplers
        "hybrid",
        description="Proximal samplers: hybrid, backward or ode; matched: the DDIM step at the (t, lam) of matching; "
        "ddim and euler (of the reverse SDE or the probability flow): those of score and flow models, with the same "
        "network.",
    )
    num_inference_steps: StepCount = Field(6, description="N, the number of proximal steps.")
    start_time: float = Field(0.8, gt=0, le=1, description="T: sampling starts from N(0, I) at this time.")
    grid: Literal[GRIDS] = Field("uniform", description="Spacing of the times.")  # type: ignore[valid-type]  # as above
    guidance_scale: float = Field(1.0, ge=0, description="Proximal classifier-free guidance; 1 is none.")
    eta: float = Field(
        0.0,
        ge=0,
        le=1,
        description="ddim, euler and matched only: share of the predicted noise that is replaced by fresh noise "
        "(R0's eta, not that of the DDIM paper).",
    )

    def plan(
        self, schedule: VPSchedule, num_inference_steps: int | None = None, eta: Sequence[float] | None = None
    ) -> list[Step]:
        """The sampler's steps. None: the section's own count and eta. Raises ValueError for an impossible count."""
        count = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        return plan(schedule, self.name, count, self.start_time, self.grid, self.eta if eta is None else eta)


class Reward(Section):
    """One scorer, with its weight and its replicas."""

    name: str = Field(
        description="What logs call it: a registered scorer (docs/rewards/), or any word with `scorer` beside it."
    )
    scorer: str | None = Field(
        None,
        description="A registered scorer, or a class of one's own as package.module:Class; null: `name` is the scorer.",
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="Its weight in the sum; ignored for held-out rewards.")
    params: dict[str, Any] = Field({}, description="What the scorer's constructor takes (docs/rewards/).")
    replicas: int | None = Field(None, ge=1, description="Serve replicas of this scorer; null: rewards.replicas.")
    max_replicas: int | None = Field(
        None, ge=1, description="Serve adds replicas up to this many under load; null: none."
    )
    num_cpus: float | None = Field(None, ge=0, description="CPUs of a replica; null: rewards.num_cpus.")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of a replica; null: rewards.num_gpus.")
    resources: Amounts | None = Field(
        None, description="Custom Ray resources of a replica, to place it; null: rewards.resources."
    )
    runtime_env: dict[str, Any] = Field(
        {}, description="Ray runtime environment of the replicas, for a scorer whose packages conflict."
    )
    tune_micro_batch: bool = Field(
        False,
        description="Measure on the first group which params.micro_batch is fastest; scores may then differ in "
        "rounding from run to run.",
    )

    @property
    def kind(self) -> str:
        """The scorer: a registered name, or package.module:Class."""
        return self.scorer or self.name


@dataclass(frozen=True)
class Replicas:
    """The Serve replicas of one scorer: how many, from ``least`` to ``most``, and what each takes of its node."""

    least: int
    most: int
    cpus: float
    gpus: float
    resources: dict[str, float] | None


class Rewards(Section):
    """All scorers, and how their scores are combined."""

    train: list[Reward] = Field([Reward(name="attributes")], min_length=1, description="What is optimised.")
    heldout: list[Reward] = Field([Reward(name="judge")], description="Logged and never optimised.")
    replicas: int = Field(1, ge=1, description="Serve replicas of each scorer.")
    num_cpus: float = Field(0.25, ge=0, description="CPUs of a replica.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of a replica; may be a fraction.")
    resources: Amounts | None = Field(
        None, description="Custom Ray resources of a replica; null: those of resources.placement."
    )
    timeout_s: float = Field(120.0, gt=0, description="How long one group may take to score.")
    retries: int = Field(2, ge=0, description="How often a failed request is tried again.")
    normalize: Normalize = Field(
        "none",
        description="group: each reward divided by its spread in the group before weighting, so that none outweighs "
        "the others.",
    )
    on_failure: Literal["drop_group", "mask_sample", "stop"] = Field(
        "drop_group",
        description="Where a score is missing: the whole group is not trained on (drop_group), only that sample is not "
        "(mask_sample), or the run ends (stop).",
    )
    max_masked_fraction: float = Field(
        0.5, ge=0, le=1, description="The run stops when more than this share of a step's groups is masked."
    )

    @property
    def all(self) -> list[Reward]:
        """The training rewards, then the held-out ones."""
        return [*self.train, *self.heldout]

    def replicas_of(self, reward: Reward) -> Replicas:
        """The replicas of one of the rewards, with this section's values where it has none of its own."""
        least = self.replicas if reward.replicas is None else reward.replicas
        return Replicas(
            least,
            least if reward.max_replicas is None else reward.max_replicas,
            self.num_cpus if reward.num_cpus is None else reward.num_cpus,
            self.num_gpus if reward.num_gpus is None else reward.num_gpus,
            self.resources if reward.resources is None else reward.resources,
        )


class Prepare(Section):
    """Builds the parts that published checkpoints would bring: text encoder, classifier, judge."""

    text_steps: int = Field(200, ge=1, description="Training steps of the built-in text encoder.")
    classifier_steps: int = Field(300, ge=1, description="Training steps of each attribute classifier.")
    samples: int = Field(8192, ge=64, description="Portraits drawn for each classifier.")
    batch_size: int = Field(128, ge=1, description="Batch size of these trainings.")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate of these trainings.")


class Pretrain(Section):
    """The stage pretrain."""

    loss: Literal["matching", "square"] = Field(
        "square",
        description="square: the mean square error; weighted by level it is better than the L1 phase "
        "(docs/few-steps.md). With sampler.name ddim or euler it is denoising score matching, and the network a score "
        "model. matching: ProxDM's, the L1 phase and then the zetas.",
    )
    target: Literal["noise", "expected", "clean"] = Field(
        "expected",
        description="What the network predicts. noise: n2 as it was drawn, ProxDM's. expected: the mean of n2 given y "
        "and x_0, which is the same on average without the part that n1 hides; it learns captions in two fifths of the "
        "steps (docs/few-steps.md). clean: as expected, and a new network predicts x_0 itself, which leaves flat areas "
        "clean. The zetas always take n2, which alone has the mode that they look for. It also "
        "scales a new network, and fake scores are trained on it.",
    )
    steps: int = Field(1500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(64, ge=1, description="Global batch, over all learner ranks and micro-batches.")
    micro_batch_size: int | None = Field(None, ge=1, description="Per rank and forward; None: the rank's whole share.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate; warm-up, constant, then cosine to 3 %.")
    warmup_steps: int = Field(50, ge=0, description="Linear warm-up.")
    decay_from: float = Field(0.3, ge=0, le=1, description="Share of the steps after which the cosine begins.")
    candidates: list[StepCount] = Field(
        [4, 6, 8, 16], min_length=1, description="Step counts N that matching draws from."
    )
    l1_fraction: float = Field(1.0, ge=0, le=1, description="Share of the steps in the L1 phase.")
    zetas: list[float] = Field([2.0, 1.0], description="zeta of the equally long phases after it.")
    weight: Literal["lam", "level"] = Field(
        "level",
        description="Weight of the loss, scaled to mean 1. lam: lam^lam_power. level: with target expected, as a score "
        "model's loss at the noise level of all that is in y, (1 - alpha_bar + lam)/alpha_bar, to the lam_power "
        "(docs/few-steps.md); equal to lam at t = 0.",
    )
    lam_power: float = Field(
        0.5,
        ge=0,
        description="Power of weight. With lam, 0: ProxDM's; 0.5: the error of the prox itself, "
        "which learns captions sooner, since large lam is where they decide.",
    )
    ema: float = Field(0.995, ge=0, lt=1, description="Decay of the averaged weights that are handed on.")
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm.")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(10, ge=1, description="Steps between metric records.")

    @model_validator(mode="after")
    def _phases(self) -> Pretrain:
        if self.loss == "square" and self.l1_fraction < 1:
            raise ValueError(
                f"l1_fraction is {self.l1_fraction:g}, and the phases of the zetas would follow, but loss is 'square', "
                "which has none: set pretrain.loss=matching, or leave l1_fraction out"
            )
        return self


class Learner(Section):
    """DeepSpeed and the checkpoints of the learner and of pre-training."""

    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage.")
    max_failures: int = Field(
        2,
        ge=0,
        description="How often Ray Train restarts the learner's ranks from the last checkpoint before the run fails. "
        "The count begins anew when a new step was reached.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints of a stage that are kept, the newest ones.")
    max_checkpoint_failures: int = Field(
        3,
        ge=1,
        description="How many checkpoints in a row may fail to be written, mostly for lack of disk space, before the "
        "run stops.",
    )


class Resources(Section):
    """Actors, ranks, and the CPUs and GPUs of each."""

    rollout_actors: int = Field(1, ge=1, description="Rollout actors.")
    rollout_cpus: float = Field(0.5, ge=0, description="CPUs that Ray counts for each.")
    rollout_gpus: float = Field(0.0, ge=0, description="GPUs of each; may be a fraction.")
    learner_workers: int = Field(1, ge=1, description="Ranks of the learner and of pre-training.")
    learner_cpus: float = Field(0.5, ge=0, description="CPUs that Ray counts for each.")
    learner_gpus: float = Field(0.0, ge=0, description="GPUs of each; may be a fraction.")
    placement: Literal["any", "roles"] = Field(
        "any",
        description="any: each role wherever its CPUs and GPUs fit; roles: only on nodes that offer the custom Ray "
        "resource of its name, `rollout`, `learner` or `reward`, as those of the files in cluster/ do.",
    )
    rollout_resources: Amounts | None = Field(
        None,
        description="Custom Ray resources of each rollout actor, {name: amount}, to place it; null: those of "
        "placement.",
    )
    learner_resources: Amounts | None = Field(
        None, description="Custom Ray resources of each learner rank; null: those of placement."
    )
    autoscaling: bool = Field(
        False,
        description="The cluster can grow: ask for the nodes that each stage needs and wait for them, instead of "
        "refusing a run that is larger than the cluster is now.",
    )
    autoscaling_timeout_s: float = Field(
        1800.0, gt=0, description="How long a stage waits for those nodes, in seconds."
    )
    threads: int = Field(
        2, ge=1, description="torch threads of rollout actors and learner ranks; results depend on it."
    )


class Faults(Section):
    """What a run does when a part of it is lost (docs/reliability.md)."""

    hang_timeout_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without an answer after which a rollout actor, learner rank, conductor or weight "
        "store is killed and restarted. Must exceed an iteration's longest call, and the loading of a model. A reward "
        "replica is restarted after 90 s at most.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="How often in a row, without a new step in between, a lost conductor or weight store is replaced "
        "and training goes on from the last checkpoint.",
    )
    grace_s: float = Field(
        120.0,
        ge=0,
        description="Seconds that the current iteration and its checkpoint may take after SIGTERM or Ctrl-C.",
    )


class Evaluate(Section):
    """Held-out evaluations, and the alarms that follow from them."""

    prompts: int = Field(64, ge=1, le=512, description="Held-out prompts, the same in every evaluation.")
    samples: int = Field(4, ge=2, description="Samples of each prompt.")
    steps: list[StepCount] = Field([2, 4, 6, 8, 16], description="Step counts of the reward-against-steps curve.")
    every: int = Field(25, ge=0, description="RL iterations between held-out evaluations; 0: only before and after.")
    alarm_sigmas: float = Field(
        2.0,
        gt=0,
        description="Over-optimisation alarm: the first held-out reward is this many standard errors below its best.",
    )
    alarm_drift: float | None = Field(
        1.4,
        gt=1,
        description="Alarm as well where the distance to the data has grown to this multiple of its smallest value, "
        "because a held-out reward does not see textures and shifted colours. null: never.",
    )
    alarm_sameness: float | None = Field(
        0.65,
        gt=0,
        lt=1,
        description="Alarm as well where the diversity of a prompt's samples has fallen to this share of its largest "
        "value, or of real images' where that is known and smaller. null: never.",
    )
    alarm_grid: float | None = Field(
        2.0,
        gt=1,
        description="Alarm as well where a grid lies over the images: at a period of 2 to 8 pixels they have this "
        "multiple of the data's power, and of their own before; or all images have something in common there that the "
        "data do not (docs/guards.md). null: never.",
    )
    patience: int | None = Field(
        None, ge=1, description="RL ends after this many evaluations in a row that far below the best; null: never."
    )


class Telemetry(Section):
    """What a running run shows, beside its log."""

    dashboard: bool = Field(True, description="Serve the live page while the run goes on (docs/dashboard.md).")
    dashboard_host: str = Field("127.0.0.1", description="The address it listens on; the default is this machine only.")
    dashboard_port: int = Field(8270, ge=0, le=65535, description="Its port, or the next free one; 0: any.")
    samples_every: int = Field(10, ge=0, description="Iterations between saved galleries of training samples; 0: none.")
    samples_groups: int = Field(
        4, ge=1, le=64, description="Groups in a gallery, each with its best and its worst sample."
    )
    timeline: bool = Field(True, description="Write the times of each role's work to timeline.jsonl.")
    prometheus: bool = Field(True, description="Export the catalogue's metrics through Ray (docs/monitoring.md).")
    tensorboard: bool = Field(False, description="Write TensorBoard event files to <run>/tensorboard.")
    wandb: str | None = Field(
        None, description="Weights & Biases project to log to; needs the package wandb. null: none."
    )
