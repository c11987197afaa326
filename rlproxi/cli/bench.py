"""``rlproxi bench``: speed as ratios measured in one run, each against a bar.

Every figure compares what the system does with the bare network calls that the work cannot do
without, on the same machine: calls in turn, whole iterations minutes apart. Medians keep a busy machine
from deciding the outcome, unless it stays busy for minutes: then bare work before and after differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from ..algorithms.base import Work, build_algorithm
from ..config.algorithms import ALGORITHMS
from ..config.loading import Config, build_config, config_folder, dump_config, load_config
from ..data import faces
from ..models.backbone import ProximalNetwork
from ..models.folders import ModelFolder
from ..models.loading import build_denoiser, training_form
from ..models.precision import autocast, compute_dtype, has_fast_bfloat16
from ..models.text import TextEncoder, build_text_encoder, operator
from ..models.unet import ProximalUNet
from ..proximal.samplers import sample
from ..run_directory import RunDirectory


def median_ratio(ours: Callable[[], None], bare: Callable[[], None], repeats: int) -> float:
    """Median of the ratios of rounds in which both are called, so that each ratio's two halves see the same machine."""

    def seconds(function: Callable[[], None]) -> float:
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    for function in (ours, bare):
        function()
    return statistics.median([seconds(ours) / seconds(bare) for _ in range(repeats)])


def _encoder(config: Config) -> TextEncoder:
    source = faces.collection(config.run.seed, "text")
    captions = [faces.portrait(source, i, 0.5).caption for i in range(512)]
    return build_text_encoder(captions, config.model.text_dim, config.model.text_layers, config.model.text_length)


def _network(config: Config) -> ProximalNetwork:
    """The network that the config trains: that of ``model.init``, or a new one."""
    if config.model.init:
        return training_form(ModelFolder.find(config.model.init).path, config, "rl")
    return build_denoiser(config)


class _Shapes:
    """The config's network on one micro-batch of its shape."""

    def __init__(self, config: Config):
        self.config = config
        source, rows = faces.collection(config.run.seed, "train_prompts"), config.rl.rows
        self.prompts = tuple(faces.portrait(source, i).caption for i in range(config.rl.groups))
        self.unet = _network(config).eval()
        self.encoder = _encoder(config)
        self.text = self.encoder.groups(self.prompts, config.rl.group_size)
        self.y = torch.randn(rows, 3, config.data.size, config.data.size)
        self.t, self.lam = torch.full((rows,), 0.4), torch.full((rows,), 0.7)
        self.dtype = compute_dtype(config.model.precision, "cpu")

    @torch.inference_mode()
    def forward(self, times: int = 1) -> None:
        with autocast(self.dtype, "cpu"):
            for _ in range(times):
                self.unet(self.y, self.t, self.lam, self.text)

    def forward_backward(self) -> None:
        with autocast(self.dtype, "cpu"):
            loss = self.unet(self.y, self.t, self.lam, self.text).square().mean()
        loss.backward()

    def to_the_input(self) -> None:
        """A forward, and a backward that ends at the sample: the weights are frozen."""
        self.unet.requires_grad_(False)
        y = self.y.clone().requires_grad_(True)
        with autocast(self.dtype, "cpu"):
            loss = self.unet(y, self.t, self.lam, self.text).square().mean()
        torch.autograd.grad(loss, y)
        self.unet.requires_grad_(True)

    @torch.inference_mode()
    def sample(self) -> None:
        steps = self.config.sampler.plan(self.config.schedule.build())
        with autocast(self.dtype, "cpu"):
            sample(operator(self.unet, self.encoder, 1.0), steps, self.y, self.text)


def sampler_ratio(config: Config, repeats: int = 25) -> float:
    """An N-step sampler call over N bare forwards of the network."""
    shapes = _Shapes(config)
    n = config.sampler.num_inference_steps
    return median_ratio(shapes.sample, lambda: shapes.forward(n), repeats)


def bfloat16_speedup(config: Config, repeats: int = 15) -> float:
    """float32 contiguous time over bfloat16 channels_last time of one forward and backward."""
    shapes = _Shapes(config)
    low = ProximalUNet.from_config(shapes.unet.config)

    def run(unet: torch.nn.Module, dtype: torch.dtype) -> None:
        with autocast(dtype, "cpu"):
            loss = unet(shapes.y, shapes.t, shapes.lam, shapes.text).square().mean()
        loss.backward()

    return median_ratio(lambda: run(shapes.unet, torch.float32), lambda: run(low, torch.bfloat16), repeats)


def iteration_ratio(config: Config, iterations: int = 8) -> tuple[float, str]:
    """(seconds of a real iteration of the config's algorithm over those of its bare work, the parts in words).

    The real one runs on Ray, synchronously: rollout actors and a Serve reward where the algorithm has them, and a
    DeepSpeed learner. The bare work is the same number of network forwards and backwards and of reward calls with
    nothing around them (``_bare_micro_batch``). It is split over as many processes as the learner has ranks; they
    exchange nothing and have the machine to themselves. It is measured before the real iteration and after it, and
    both are printed: a shared machine drifts by more than the bar, and where the two differ by so much the ratio means
    nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        reward_file = random_classifier(config, Path(folder))
        before = _bare_seconds(config, reward_file)
        real = _real_iterations(config, Path(folder), reward_file, iterations)
        after = _bare_seconds(config, reward_file)
    bare = f"bare work {statistics.median(before):.2f} s before, {statistics.median(after):.2f} s after"
    return real / statistics.median([*before, *after]), f"real iteration {real:.2f} s / {bare}"


def _bare_seconds(config: Config, reward_file: Path) -> list[float]:
    """Seconds of each repetition of the bare work, by as many processes as the learner has ranks."""
    workers = config.resources.learner_workers
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(workers)
    with ProcessPoolExecutor(workers, spawn, initializer=_keep_barrier, initargs=(barrier,)) as pool:
        jobs = [pool.submit(bare_iterations, config, reward_file) for _ in range(workers)]
        # An iteration is done when its slowest process is.
        return [max(times) for times in zip(*(job.result() for job in jobs), strict=True)]


_barrier: Barrier  # of the processes that run bare_iterations


def _keep_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def bare_iterations(config: Config, reward_file: Path, repeats: int = 7) -> list[float]:
    """Seconds of each repetition of one process's share of an iteration, all processes beginning together."""
    from ..rewards import build

    torch.set_num_threads(config.resources.threads)
    scorer = build("attributes", {"path": str(reward_file)})
    shapes, micro_batches = _Shapes(config), config.rl.micro_batches // config.resources.learner_workers
    seconds, work = [], build_algorithm(config).least_work()
    for _ in range(repeats + 1):
        _barrier.wait()
        begun = time.perf_counter()
        for _ in range(micro_batches):
            _bare_micro_batch(config, shapes, scorer, work)
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def _bare_micro_batch(config: Config, shapes: _Shapes, scorer, work: Work) -> None:
    """The calls that a micro-batch of the config's algorithm cannot do without."""
    size = config.rl.group_size
    rows = [prompt for prompt in shapes.prompts for _ in range(size)]
    pixels = torch.rand(shapes.y.shape)
    shapes.forward(work.forwards)
    if work.scored:
        images = (pixels[:size] * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
        for prompt in shapes.prompts:
            scorer.score(images, [prompt] * size)
    for _ in range(work.backwards):
        shapes.forward_backward()
    for _ in range(work.input_gradients):
        shapes.to_the_input()
    for _ in range(work.reward_gradients):
        x = pixels.clone().requires_grad_(True)
        torch.autograd.grad(scorer.rewards(x, rows).sum(), x)
    for _ in range(work.rewards):
        with torch.no_grad():
            scorer.rewards(pixels, rows)


def random_classifier(config: Config, folder: Path) -> Path:
    """The file of an untrained attribute classifier, written into ``folder``."""
    from ..rewards.attributes import AttributeClassifier

    file = folder / "reward.safetensors"
    AttributeClassifier(config.data.size, 32).save(file)
    return file


def _real_iterations(config: Config, folder: Path, reward_file: Path, iterations: int) -> float:
    """Median ``seconds/step`` of a real run, the first two iterations left out."""
    from ..models.pipeline import TextToImage
    from ..telemetry.runlog import read, series
    from .main import run_command

    model = folder / "model"
    TextToImage(_network(config), _encoder(config), config.schedule, config.sampler).save_pretrained(model)
    values = config.model_dump(mode="json")
    values["run"].update(stages=["rl"], dir=str(folder), name="bench")
    values["model"]["init"] = str(model)
    values["rewards"].update(train=[{"name": "attributes", "params": {"path": str(reward_file)}}], heldout=[])
    values["rl"].update(steps=iterations, checkpoint_every=10**6)
    values["evaluate"]["every"] = 0
    real = build_config(values)
    run_dir = folder / "run"
    run_dir.mkdir()
    dump_config(real, RunDirectory(run_dir).config)
    if run_command("run", ["--resume", str(run_dir)]):
        raise SystemExit("the run that was to be timed ended with the error above")
    _, seconds = series(read(run_dir), "rl", "seconds/step")
    return statistics.median(seconds[2:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", metavar="FILE", help="also write {name: {value, bar, ok, unit}} here")
    parser.add_argument("--config", metavar="FILE", help="measure this config alone (default: quickstart and quick-*)")


def command(options: argparse.Namespace) -> int:
    """Print a table and, with ``--json``, write it. Returns 1 where a bar is missed, else 0."""
    config = load_config(options.config or config_folder() / "quickstart.yaml")
    torch.set_num_threads(config.resources.threads)
    results: dict[str, dict] = {}

    def add(name: str, value: float, bar: float, unit: str, at_most: bool = True) -> None:
        ok = value <= bar if at_most else value >= bar
        results[name] = {"value": round(value, 4), "bar": bar, "ok": bool(ok), "unit": unit}
        verdict = f"bar {'<=' if at_most else '>='} {bar:<6} {'ok' if ok else 'MISSED'}"
        print(f"{name:<28} {value:8.3f}  {verdict}  {unit}", flush=True)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    add("sampler_vs_forwards", sampler_ratio(config), 1.05, "time of a sampler call / N bare forwards")
    low, unit = has_fast_bfloat16("cpu"), "float32 time / bfloat16 time"
    if not low:
        unit += "; no bfloat16 in this CPU, so auto picks float32 and this must stay below 1"
    add("bfloat16_vs_float32", bfloat16_speedup(config), 1.5 if low else 1.0, unit, at_most=not low)
    files = () if options.config else [config_folder() / f"quick-{name}.yaml" for name in ALGORITHMS.names()]
    for one in [config, *(load_config(file) for file in files if file.is_file())]:
        ratio, parts = iteration_ratio(one)
        if one is config:
            add(f"{one.run.algorithm}_iteration_vs_bare", ratio, 1.20, parts)
            continue
        # Its ranks compute all the time. Where there are as many as cores, they share the cores with Ray's processes,
        # which a rank with a device of its own does not. So the bar is for one rank, which has a core to itself.
        name = f"{one.run.algorithm}_{one.resources.learner_workers}_ranks_vs_bare"
        print(f"{name:<28} {ratio:8.3f}  {parts}", flush=True)
        values = one.model_dump(mode="json")
        values["resources"]["learner_workers"] = 1
        ratio, parts = iteration_ratio(build_config(values))
        add(f"{one.run.algorithm}_iteration_vs_bare", ratio, 1.20, f"one rank: {parts}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0 if all(r["ok"] for r in results.values()) else 1
