"""The conductor's real loop, pool, reward client, weight store and observer with 1 to 512 GPUs that are simulated.

    python tests/studies/scale_simulation.py [--gpus 1 8 64 512] [--json FILE] [--plot FILE]

Virtual time: what waits costs nothing, what the conductor computes costs this machine's CPU and is counted. Each GPU
has a rollout actor, a learner rank and a reward replica, which share it while they work at once, and the same work at
every scale. docs/scaling.md says where the figures of ``Work`` come from, and what follows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from actors.rewards.service import RewardClient  # noqa: E402
from actors.rl.loop import Loop  # noqa: E402
from actors.rl.messages import Trained  # noqa: E402
from actors.rl.observer import Observer  # noqa: E402
from actors.rl.pool import RolloutPool  # noqa: E402
from fixtures import virtual_time  # noqa: E402
from fixtures.local_actors import Local  # noqa: E402
from fixtures.simulated_roles import Log, Rollout, Store, Weights, brightness, handles  # noqa: E402
from rlproxi.algorithms import grpo  # noqa: E402
from rlproxi.config.loading import Config, build_config  # noqa: E402
from rlproxi.telemetry.timeline import Diary  # noqa: E402

GB = 1e9


@dataclass(frozen=True)
class Work:
    """What one GPU does in an iteration, and what the machines are. Seconds are of a GPU that does nothing else."""

    micro_batches: int = 4  # of one group each, for each GPU
    group_size: int = 8
    sample_s: float = 0.42  # an image
    train_s: float = 0.46
    score_s: float = 0.05
    jitter: float = 0.05  # sigma of a call's log-normal duration
    stragglers: float = 0.01  # share of sampling calls that take twice as long
    image_bytes: int = 3 * 512**2
    chain_bytes: int = 4 * 9 * 16 * 64**2  # three trained steps, three latents each
    weights_bytes: float = 50e6  # float32: an adapter; 1e10 is a network of 2.5 billion parameters
    gradient_bytes: float = 25e6  # bfloat16
    per_node: int = 8
    link: float = 12.5 * GB  # of a node, bytes/s: 100 Gbit/s
    all_reduce: float = 40 * GB  # bus bandwidth between nodes
    copy: float = 2 * GB  # into a node's shared memory, and from there to a GPU
    failures: float = 0.0  # deaths of rollout actors, for each GPU and hour
    restart_s: float = 60.0


class Shared:
    """A GPU or a link: what is at work shares it equally. ``busy``: seconds in which it had any work."""

    def __init__(self):
        self.jobs: dict[asyncio.Future, float] = {}
        self.at = self.busy = 0.0
        self.timer: asyncio.TimerHandle | None = None

    async def work(self, seconds: float) -> None:
        """Returns when so many seconds of the whole of it were had."""
        self._advance()
        job = asyncio.get_running_loop().create_future()
        self.jobs[job] = max(seconds, 1e-9)
        self._set_timer()
        try:
            await job
        finally:
            if job in self.jobs:  # cancelled
                self._advance()
                self.jobs.pop(job, None)
                self._set_timer()

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        if self.jobs:
            had = (now - self.at) / len(self.jobs)
            self.jobs = {job: left - had for job, left in self.jobs.items()}
            self.busy += now - self.at
        self.at = now

    def _set_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.jobs:
            least = min(self.jobs.values()) * len(self.jobs)
            self.timer = asyncio.get_running_loop().call_later(max(0.0, least), self._ended)

    def _ended(self) -> None:
        self._advance()
        least = min(self.jobs.values())
        for job in [job for job, left in self.jobs.items() if left <= max(1e-9, least + 1e-9)]:
            del self.jobs[job]
            if not job.done():
                job.set_result(None)
        self._set_timer()


class FanOut:
    """How a publication gets to the nodes. ``owner``: each node from the owner's. ``ray``: from a node that is picked
    among those that have it when it is asked for. ``tree``: a node is asked by one other at a time."""

    def __init__(self, how: str, nodes: int, work: Work, dice: random.Random):
        self.how, self.work, self.dice = how, work, dice
        self.links = [Shared() for _ in range(nodes)]
        self.has: dict[int, list[int]] = {}  # version -> nodes
        self.pulls: dict[tuple[int, int], asyncio.Future] = {}
        self.free = asyncio.Condition()
        self.serving: set[int] = set()
        self.seconds: list[float] = []

    async def take(self, version: int, node: int) -> None:
        """A GPU of ``node`` takes the weights of ``version``; the node pulls them once."""
        key = version, node
        if key not in self.pulls:
            self.pulls[key] = asyncio.ensure_future(self._pull(version, node))
        await asyncio.shield(self.pulls[key])
        await asyncio.sleep(self.work.weights_bytes / self.work.copy)

    async def _pull(self, version: int, node: int) -> None:
        has, begun = self.has.setdefault(version, [0]), asyncio.get_running_loop().time()
        if node not in has:
            if self.how == "tree":
                async with self.free:
                    await self.free.wait_for(lambda: set(has) - self.serving)
                    source = min(set(has) - self.serving)
                    self.serving.add(source)
            else:
                source = 0 if self.how == "owner" else self.dice.choice(has)
            await self.links[source].work(self.work.weights_bytes / self.work.link)
            has.append(node)
            if self.how == "tree":
                async with self.free:
                    self.serving.discard(source)
                    self.free.notify_all()
        self.seconds.append(asyncio.get_running_loop().time() - begun)


class Replicas:
    """A Serve handle: the less busy of two replicas picked at random; each scores one request after the other."""

    def __init__(self, gpus: list[Shared], work: Work, dice: random.Random):
        self.gpus, self.work_, self.dice = gpus, work, dice
        self.queued = [0] * len(gpus)
        self.one = [asyncio.Lock() for _ in gpus]
        self.requests = 0
        self.score = SimpleNamespace(remote=self._score)

    async def _score(self, images, prompts):
        self.requests += 1
        place = min((self.dice.randrange(len(self.gpus)) for _ in range(2)), key=self.queued.__getitem__)
        self.queued[place] += 1
        try:
            async with self.one[place]:
                await self.gpus[place].work(len(images) * self.work_.score_s)
        finally:
            self.queued[place] -= 1
        return brightness(images)


@dataclass
class Simulation:
    """One run. ``result`` after ``run``."""

    gpus: int
    bound: int
    work: Work
    fan_out: str = "ray"
    iterations: int = 8
    seed: int = 0
    ended: list[float] = field(default_factory=list)
    flight: list[int] = field(default_factory=list)
    stale: set[int] = field(default_factory=set)
    waited: list[float] = field(default_factory=list)

    def _config(self, folder: Path) -> Config:
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"a photograph of subject {i} before a wall, soft light\n" for i in range(20_000)))
        w = self.work
        whole = self.gpus * w.micro_batches * w.group_size * (w.image_bytes + w.chain_bytes)
        return build_config(
            {
                "rl": {
                    "steps": self.iterations,
                    "prompts_per_step": self.gpus * w.micro_batches,
                    "groups_per_micro_batch": 1,
                    "group_size": w.group_size,
                    "max_staleness": self.bound,
                    "max_bytes_in_flight": (self.bound + 1) * whole,
                },
                "run": {"stages": ["rl"]},
                "data": {"prompts": str(prompts)},
                "evaluate": {"every": 0},
                "telemetry": {"samples_every": 0},
                "rewards": {"train": [{"name": "attributes"}], "replicas": self.gpus, "timeout_s": 3600},
                "resources": {"learner_workers": self.gpus, "rollout_actors": self.gpus},
            }
        )

    async def _learner(self, config: Config) -> None:
        w, now = self.work, asyncio.get_running_loop().time
        exchange = 2 * (self.gpus - 1) / self.gpus * w.gradient_bytes / w.all_reduce + 20e-6 * math.log2(self.gpus)
        attempt = await self._publish_and(self.loop.begin, 0, 0)
        self.ended.append(now())
        for iteration in range(self.iterations):
            waits = now()
            had = await asyncio.gather(*(self._rank(iteration, rank) for rank in range(self.gpus)))
            self.waited.append(min(had) - waits)
            await asyncio.sleep(exchange)
            self.flight.append(self.loop.ledger.used)
            await self._publish_and(self.loop.commit, iteration + 1, Trained(attempt, iteration, {}))
            self.ended.append(now())

    async def _publish_and(self, call, version: int, argument):
        await asyncio.sleep(self.work.weights_bytes / self.work.copy)
        self.store.publish(version, Weights(0, version, int(self.work.weights_bytes)))
        return await call(argument)

    async def _rank(self, iteration: int, rank: int) -> float:
        """One rank's iteration; returns when it had its batch."""
        batch = await self.loop.next_batch(iteration, rank, self.gpus)
        had = asyncio.get_running_loop().time()
        self.stale |= {iteration - version for version in batch.versions}
        assert all(chain.weights.version == batch.versions[j] for j, chain in batch.chains.items())
        images = len(batch.chains) * self.work.group_size
        await self.devices[rank].work(images * self.work.train_s * self.dice.lognormvariate(0, self.work.jitter / 5))
        return had

    async def _kills(self) -> None:
        """Deaths at random times, as often as ``failures`` says."""
        rate = self.work.failures * self.gpus / 3600
        while rate:
            await asyncio.sleep(self.dice.expovariate(rate))
            self.dice.choice(self.rollouts).die()

    def _rollout(self, number: int) -> Rollout:
        w, gpu, node = self.work, self.devices[number], number // self.work.per_node

        async def work(request):
            slow = 2 if self.dice.random() < w.stragglers else 1
            await gpu.work(slow * request.images * w.sample_s * self.dice.lognormvariate(0, w.jitter))

        return Rollout(work, w.restart_s, lambda weights: self.nodes.take(weights.version, node))

    async def run(self, folder: Path) -> dict:
        config, w, diary = self._config(folder), self.work, Diary()
        self.dice = random.Random(self.seed)
        self.devices = [Shared() for _ in range(self.gpus)]
        self.nodes = FanOut(self.fan_out, math.ceil(self.gpus / w.per_node), w, self.dice)
        self.rollouts = [self._rollout(number) for number in range(self.gpus)]
        self.store, log, algorithm = Store(self.bound + 2), Log(), grpo.GRPO(config)
        pool = RolloutPool(handles(self.rollouts), Local(self.store), Local(log), diary)
        replicas = Replicas(self.devices, w, self.dice)
        with mock.patch("actors.rewards.service.serve.get_app_handle", lambda app: replicas):
            client = RewardClient(config.rewards, {"attributes": "app"}, diary)
        observer = Observer(config, folder, Local(log), diary, lambda: pool.lost, True)
        micro = w.group_size * (w.image_bytes + w.chain_bytes)
        with mock.patch.object(algorithm, "bytes_per_micro_batch", lambda: micro):
            self.loop = Loop(config, algorithm, pool, client, Local(log), None, observer)
        killing = asyncio.ensure_future(self._kills())
        begun = time.process_time()
        await self._learner(config)
        cpu = time.process_time() - begun
        killing.cancel()
        assert self.loop.stopped is None and not self.loop.ready and self.loop.ledger.used == 0
        observer.writer.shutdown()
        return self._result(cpu, pool, replicas, len(log.records))

    def _result(self, cpu: float, pool: RolloutPool, replicas: Replicas, records: int) -> dict:
        # Without the iterations in which the pipeline fills, or runs empty.
        steady = [b - a for a, b in zip(self.ended, self.ended[1:])][1 + self.bound : self.iterations - self.bound]
        step = statistics.mean(steady)
        images = self.gpus * self.work.micro_batches * self.work.group_size
        calls = sum(rollout.calls for rollout in self.rollouts)
        return {
            "gpus": self.gpus,
            "bound": self.bound,
            "fan_out": self.fan_out,
            "weights_bytes": self.work.weights_bytes,
            "failures": self.work.failures,
            "seconds/step": step,
            "images/s/gpu": images / step / self.gpus,
            "busy": statistics.mean(gpu.busy for gpu in self.devices) / self.ended[-1],
            "learner_waits": statistics.mean(self.waited[1:]),
            "fan_out_s": max(self.nodes.seconds),
            "bytes_in_flight": max(self.flight),
            "image_bytes/step": images * self.work.image_bytes,
            "cpu/step": cpu / self.iterations,
            "staleness": max(self.stale),
            "lost": pool.lost,
            "messages/step": {
                "sample": calls / self.iterations,
                "score": replicas.requests / self.iterations,
                "next_batch": self.gpus,
                "weights": self.store.asked / self.iterations,
                "log": records / self.iterations,
            },
        }


def simulate(gpus: int, bound: int, work: Work = Work(), **more) -> dict:
    """The figures of one run; see ``Simulation``."""
    with tempfile.TemporaryDirectory() as folder:
        return virtual_time.run(Simulation(gpus, bound, work, **more).run(Path(folder)))


FULL = replace(Work(), weights_bytes=1e10, gradient_bytes=5e9)
#: name -> (staleness bound, work, fan-out)
SCENARIOS = {
    "adapter, synchronous": (0, Work(), "ray"),
    "adapter, bound 1": (1, Work(), "ray"),
    "adapter, bound 1, actors die": (1, replace(Work(), failures=0.1), "ray"),
    "full weights, synchronous": (0, FULL, "ray"),
    "full weights, bound 1": (1, FULL, "ray"),
    "full weights, synchronous, owner only": (0, FULL, "owner"),
    "full weights, synchronous, tree": (0, FULL, "tree"),
}


def table(rows: list[dict]) -> str:
    """Markdown."""
    head = (
        "| scenario | GPUs | s/iteration | images/s/GPU | against the fewest | busy | weights to all nodes | "
        "in flight | CPU/iteration |\n|---|---|---|---|---|---|---|---|---|"
    )
    base = {row["scenario"]: row["images/s/gpu"] for row in reversed(rows)}
    return "\n".join(
        [
            head,
            *(
                f"| {r['scenario']} | {r['gpus']} | {r['seconds/step']:.1f} | {r['images/s/gpu']:.3f} | "
                f"{r['images/s/gpu'] / base[r['scenario']]:.0%} | {r['busy']:.0%} | {r['fan_out_s']:.1f} s | "
                f"{r['bytes_in_flight'] / GB:.1f} GB | {r['cpu/step']:.2f} s |"
                for r in rows
            ),
        ]
    )


def plot(rows: list[dict], file: Path) -> None:
    """Throughput of a GPU against their number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    for name in dict.fromkeys(row["scenario"] for row in rows):
        mine = [row for row in rows if row["scenario"] == name]
        relative = [row["images/s/gpu"] / mine[0]["images/s/gpu"] for row in mine]
        axes.plot([row["gpus"] for row in mine], relative, marker="o", label=name)
    axes.axhline(0.85, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="GPUs", ylabel="images/s/GPU, against the fewest", ylim=(0, 1.1))
    axes.set_xticks(sorted({row["gpus"] for row in rows}), labels=sorted({row["gpus"] for row in rows}))
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    options = parser.parse_args()
    rows = []
    for name in options.scenario:
        bound, work, fan_out = SCENARIOS[name]
        for gpus in options.gpus:
            found = simulate(gpus, bound, work, fan_out=fan_out, iterations=options.iterations)
            rows.append({"scenario": name, **found})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps({"work": asdict(Work()), "rows": rows}, indent=1))
    print("\n" + table(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
