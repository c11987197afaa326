"""What the system costs where `rlproxi bench` does not look: start-up, pre-training, new weights (docs/benchmarks.md).

    PYTHONPATH=.:tests python tests/studies/system_costs.py --run RUN_DIR [--json FILE] \\
        [--parts startup pretrain weights]

RUN_DIR is a quickstart run. ``startup``: seconds from the command to each stage of the smoke run and to its first
iteration. ``pretrain``: images/s of the quickstart's pre-training (Ray Data, Ray Train, DeepSpeed) against a plain
torch loop that draws the same portraits and trains the same network, in as many processes, which exchange nothing.
``weights``: from the learner's flat array to rollout actors that have it in their network, by their own calls: the time
of a request with new weights less that of one without.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from few_step_study import arm_config, train

from fixtures.run_processes import ROOT, launch
from rlproxi.telemetry.runlog import read, series

STEPS = 80


def finished(arguments: list[str]) -> None:
    process = launch(arguments)
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(said[-3000:])


def startup() -> dict[str, float]:
    """Seconds since the command: the begin of each stage, the first iteration of RL, the end."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        finished([str(ROOT / "configs" / "smoke.yaml"), f"run.dir={folder}"])
        ended = time.time()
        records = read(next(Path(folder).iterdir()))
    found = {r["name"]: r["time"] - begun for r in records if r["event"] == "stage" and r["status"] == "start"}
    first = next(r["time"] for r in records if r["event"] == "metrics" and r["stage"] == "rl" and "seconds/step" in r)
    return {**found, "first iteration": first - begun, "end": ended - begun}


def pretrain(run_dir: Path) -> dict[str, float]:
    """images/s: of the system, and of plain loops before it and after it (a shared machine drifts)."""
    config = arm_config(run_dir, "T 0.8", STEPS, 0)
    before = plain(run_dir, config.resources.learner_workers)
    with tempfile.TemporaryDirectory() as folder:
        finished(
            [
                str(ROOT / "configs" / "quickstart.yaml"),
                f"run.dir={folder}",
                "run.stages=[prepare,pretrain]",
                "prepare.text_steps=20",
                "prepare.classifier_steps=20",
                "prepare.samples=256",
                f"pretrain.steps={STEPS}",
                "telemetry.dashboard=false",
            ]
        )
        ours = statistics.median(series(read(next(Path(folder).iterdir())), "pretrain", "images_per_second")[1][2:])
    bare = statistics.mean([before, plain(run_dir, config.resources.learner_workers)])
    return {"images/s": ours, "plain loop": bare, "ratio": ours / bare}


def plain(run_dir: Path, workers: int) -> float:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool:
        return sum(pool.map(_loop, [str(run_dir)] * workers, [workers] * workers))


def _loop(run: str, workers: int) -> float:
    """images/s of one process, its first 20 steps left out."""
    import torch

    torch.set_num_threads(1)
    config = arm_config(Path(run), "T 0.8", STEPS, 0)
    size = config.pretrain.batch_size // workers
    times: list[float] = []
    config = config.model_copy(
        update={
            "pretrain": config.pretrain.model_copy(update={"batch_size": size}),
            "model": config.model.model_copy(update={"precision": "auto"}),
        }
    )  # as the run that it is beside
    train(config, Path(run), lambda line: times.append(time.perf_counter()))
    return size * 20 * (len(times) - 2) / (times[-1] - times[1])


def weights(run_dir: Path, repeats: int = 5) -> dict[str, float]:
    """Actors -> median seconds."""
    import numpy as np
    import ray

    from actors.cluster.join import connect
    from actors.rl.rollout_actor import RolloutActor
    from actors.rl.weights import WeightStore
    from rlproxi.algorithms.requests import SampleRequest
    from rlproxi.algorithms.rollout import flatten
    from rlproxi.models.loading import trainable, training_form

    connect()
    config, model = arm_config(run_dir, "T 0.8", STEPS, 0), run_dir / "models" / "pretrained"
    flat = flatten(trainable(training_form(model, config, "rl")))
    store, found, version = WeightStore.remote(), {"MB": flat.nbytes / 1e6}, 0
    request = SampleRequest("train", 0, ("a face",), (0,), 1, num_steps=1)
    for count in (1, 2, 4):
        actors = [RolloutActor.options(num_cpus=0.1).remote(config, str(model)) for _ in range(count)]

        def round_trip() -> float:
            """A publication, where there is a new version, and a request to each actor that names the newest."""
            begun = time.perf_counter()
            if version > published[0]:
                ray.get(store.publish.remote(version, np.array(flat)))
                published[0] = version
            held = ray.get(store.get.remote(version))
            ray.get([ref for actor in actors for ref in actor.sample.remote(request, held.publication, held.weights)])
            return time.perf_counter() - begun

        published, taken = [version], []
        version += 1
        for _ in range(2):
            round_trip()
        for _ in range(repeats):
            version += 1
            taken.append(round_trip() - round_trip())
        found[f"{count} actors"] = statistics.median(taken)
        for actor in actors:
            ray.kill(actor)
    ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", default=["startup", "pretrain", "weights"])
    options = parser.parse_args()
    run_dir, told = options.run.resolve(), {}
    for part in options.parts:
        told[part] = startup() if part == "startup" else {"pretrain": pretrain, "weights": weights}[part](run_dir)
        print(part, {name: round(value, 3) for name, value in told[part].items()}, flush=True)
    if options.json:
        options.json.write_text(json.dumps(told))


if __name__ == "__main__":
    sys.exit(main())
