"""The driver: one process's work on a run directory, stage by stage. What a stage loses, it starts again.

The run directory is the truth. A stage that is done is not done again; one that was cut short goes on from its last
checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from rlproxi.algorithms.rollout import flatten
from rlproxi.config.loading import Config, dump_config, smaller_micro_batch
from rlproxi.config.sections import STAGES
from rlproxi.errors import RunStopped
from rlproxi.files import write_json
from rlproxi.models.folders import ModelFolder
from rlproxi.models.loading import trainable, training_form
from rlproxi.planning.preflight import cache_folder, with_paths
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry.runlog import RunLog, last_step, read

from ..cluster import join as cluster
from ..rewards.service import app_names, withdraw
from ..rl.stops import Cause, Stop
from ..train.jobs import RanksFailed, pretrain, train
from ..train.setups import LearnerSetup, PretrainSetup
from . import cleanup
from .actors import RunActors
from .lifecycle import Action, AttemptBegan, AttemptFailed, End, Event, GoOn, Lifecycle, RolesLost, StepReached
from .log_writer import RunLogWriter
from .prepare import needs, prepare, pretrain_start, rl_start
from .supervisor import Roles, Signals, Supervisor


class Driver:
    """Runs the stages of ``config`` that are not done yet in ``run_dir``."""

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, run_dir.resolve()
        self.start = time.time()
        self.files = RunDirectory(self.run_dir)
        dump_config(config, self.files.config)  # the run-log actor and the live page read it

    def run(self) -> None:
        """Runs all stages that are configured and not done yet.

        Raises RunStopped or ConfigError with the reason where it cannot go on.
        """
        print(f"\nrun directory  {self.run_dir}")
        how = cluster.connect()
        cluster.check_size(with_paths(self.config, self.run_dir))
        print(f"ray            {how}")
        with contextlib.ExitStack() as opened:  # closed in the reverse order
            stages = self._open(opened, joined=how == "joined")
            done = {r["name"] for r in read(self.run_dir) if r["event"] == "stage" and r["status"] == "done"}
            with stages.signals:
                for stage in STAGES:
                    if stage in self.config.run.stages and stage not in done and (stage != "encode" or stages.cache):
                        stages.run(stage)
        self._print_result(stages.config)

    def _open(self, opened: contextlib.ExitStack, joined: bool) -> Stages:
        """Starts what surrounds the stages: live page, log, and a cleanup actor where Ray lives on after the run."""
        if self.config.telemetry.dashboard:
            self._show_page(opened)  # first, and so closed last: what has just been logged is still shown
        actor: Any = RunLogWriter
        log = actor.options(**cluster.beside_driver()).remote(str(self.run_dir))
        opened.callback(_close_log, log)
        stages = Stages(self.config, self.run_dir, log)
        if joined:
            names = [*app_names(self.config.rewards, self.run_dir.name).values()]
            opened.callback(ray.kill, cleanup.start(log, names, stages.capacity.on))
        opened.callback(stages.close)
        return stages

    def _show_page(self, opened: contextlib.ExitStack) -> None:
        """Starts the live page beside the run; a page that cannot start ends no run."""
        from rlproxi.dashboard.process import PageProcess

        t = self.config.telemetry
        try:
            page = PageProcess(self.run_dir, t.dashboard_host, t.dashboard_port, self._warn)
        except (OSError, RuntimeError) as error:
            self._warn(f"no live page: {error}")
        else:
            opened.callback(page.close)
            print(f"dashboard      {page.url}", flush=True)

    def _warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)
        with RunLog(self.run_dir) as log:
            log.append("warning", message=message)

    def _print_result(self, config: Config) -> None:
        from ..cluster.advice import describe, measured

        report, file = self.files.report, self.files.summary
        if report.is_file():
            print(f"\nreport         {report}")
        heldout = json.loads(file.read_text()).get("heldout", {}) if file.is_file() else {}
        before, after = heldout.get("before"), heldout.get("after")
        if after is not None:
            print(f"held-out judge {'not evaluated' if before is None else f'{before:.3f}'} -> {after:.3f}")
        alarms = [r for r in read(self.run_dir) if r["event"] == "alarm"]
        if alarms:
            message, best = alarms[-1]["message"], alarms[-1]["best"]
            print(f"ALARM          {message}")
            if best is not None:
                where = self.files.best if best else self.files.pretrained
                print(f"               the best model, of iteration {best}: {where}")
        costs = measured(self.run_dir, config)
        for line in describe(costs) if costs else []:
            print(line)
        print(f"total          {time.time() - self.start:.0f} s")


def _close_log(log: Any) -> None:
    with contextlib.suppress(RayError):  # its exporters may hold records back; a fault there ends no run
        ray.get(log.close.remote(), timeout=30)
    ray.kill(log)


class Stages:
    """The stages of a run, each a method named after it, and what they share.

    Args:
        config: as the user gave it; ``self.config`` has every path filled in.
        run_dir: absolute.
        log: the run-log actor.
    """

    def __init__(self, config: Config, run_dir: Path, log: Any):
        self.run_dir, self.files, self.log = run_dir, RunDirectory(run_dir), log
        self.given, self.config = config, with_paths(config, run_dir)
        self.capacity = cluster.Capacity(self.config)
        self.actors = RunActors(run_dir, log)
        self.signals = Signals(config.faults.grace_s)
        self.lifecycle = Lifecycle(config.faults, config.learner.max_failures)

    def run(self, stage: str) -> None:
        """Runs one stage, once the cluster has a place for it, and logs its begin and end."""
        self.capacity.hold(stage)
        begun = time.time()
        ray.get(self.log.append.remote("stage", {"name": stage, "status": "start"}))
        getattr(self, stage)()
        seconds = time.time() - begun
        ray.get(self.log.append.remote("stage", {"name": stage, "status": "done", "seconds": seconds}))
        print(f"{stage:<14} done in {seconds:.0f} s")

    def close(self) -> None:
        """Ends the run's actors, takes its rewards down and asks the autoscaler for nothing any more."""
        withdraw(self.actors.apps)
        self.actors.close()
        self.capacity.give_back()

    @property
    def cache(self) -> str | None:
        """The folder of the encoded shards; None for the embedded portraits."""
        folder = cache_folder(self.config, self.run_dir)
        return None if folder is None else str(folder)

    # -- the stages -----------------------------------------------------------------------

    def curate(self) -> None:
        """Filters and rewrites raw shards."""
        from ..data.curator import curate

        bars = [("curate/examine", 100), ("curate/write", 100)]
        counts = self._supervisor().watch(lambda: curate(self.config, self.run_dir, self.log), bars)
        print(f"               {counts['kept']} of {counts['samples']} samples kept")

    def encode(self) -> None:
        """Encodes shards into the cache."""
        from rlproxi.data.addresses import list_shards

        from ..data.encoder import encode

        parts, cache = ModelFolder.of(self.config), Path(self.cache or "")
        vae_folder = str(parts.path) if parts is not None and parts.has_vae else None
        bars = [("encode", len(list_shards(self.config.data.urls)))]
        counts = self._supervisor().watch(lambda: encode(self.config, cache, vae_folder, self.log), bars)
        print(f"               {counts['samples']} samples, {counts['skipped']} skipped {counts['reasons'] or ''}")

    def prepare(self) -> None:
        """Trains the text encoder and the classifiers that the run needs."""
        bars = [(f"prepare/{name}", steps) for name, steps in needs(self.config).items()]
        trained = self._supervisor().watch(lambda: prepare(self.config, self.run_dir, self.log), bars)
        for name, words in trained.items():
            print(f"               {name}: {words}")

    def pretrain(self) -> None:
        """Pre-trains, which writes models/pretrained."""
        start = str(pretrain_start(self.config, self.run_dir, self.cache))

        def work() -> None:
            setup = PretrainSetup(self.config, str(self.run_dir), start, self.log, self.cache)
            self._supervisor().watch(lambda: pretrain(setup), [("pretrain", self.config.pretrain.steps)], "loss")

        self.until_done("pretrain", work)

    def before(self) -> None:
        """Evaluates the policy that RL starts from."""
        self._evaluate("before", rl_start(self.config, self.run_dir), 0)

    def rl(self) -> None:
        """Trains by reward, which writes models/final."""
        model = rl_start(self.config, self.run_dir)

        def learn() -> None:
            self.actors.start(self.config, model)
            setup = LearnerSetup(self.config, str(self.run_dir), str(model), self.actors.names, self.log)
            supervisor = self._supervisor(replace=lambda reason: self._replace_roles(model, reason))
            supervisor.watch(lambda: train(setup), [("rl", self.config.rl.steps)], "reward/mean")
            if not self.files.final.is_dir():
                raise RunStopped("rl ended without models/final; go on with --resume")

        self.until_done("rl", learn)

    def after(self) -> None:
        """Evaluates the trained policy, or the starting one where RL saved none."""
        final = self.files.final
        trained = last_step(read(self.run_dir), "rl") or 0  # fewer than the config's after an early end
        self._evaluate("after", final if final.is_dir() else rl_start(self.config, self.run_dir), trained)

    def report(self) -> None:
        """Writes summary.json and report.html."""
        from rlproxi.pages.report import write_report
        from rlproxi.pages.summary import summary

        write_json(self.files.summary, summary(self.run_dir, self.config))
        write_report(self.run_dir)

    def _evaluate(self, tag: str, model: Path, version: int) -> None:
        def work() -> dict[str, Any]:
            self.actors.start(self.config, rl_start(self.config, self.run_dir))
            weights = flatten(trainable(training_form(model, self.config, "rl")))
            ray.get(self.actors.store.publish.remote(version, weights))
            steps = sorted({*self.config.evaluate.steps, self.config.sampler.num_inference_steps})
            conductor = self.actors.conductor
            return self._supervisor().watch(lambda: ray.get(conductor.evaluate.remote(tag, steps, version)))

        def shown(name: str, x: dict[str, Any]) -> str:
            return f"{name} no score" if x["mean"] is None else f"{name} {x['mean']:.3f} ± {x['sem']:.3f}"

        for count, entry in self.until_done(tag, work)["by_steps"].items():
            scores = ", ".join(shown(*x) for x in [*entry["heldout"].items(), *entry["train"].items()])
            far = f", distance {entry['distance']['total']:.3f}" if "distance" in entry else ""
            print(f"               {tag} RL, {count:>3} steps: {scores}, diversity {entry['diversity']:.3f}{far}")

    # -- attempts ---------------------------------------------------------------------------

    def _supervisor(self, replace: Callable[[str], Roles] | None = None) -> Supervisor:
        return Supervisor(self.log, self.actors.handles(), self.lifecycle, self.signals, replace)

    def until_done(self, stage: str, work: Callable[[], Any]) -> Any:
        """Runs ``work``, again after each failure that the lifecycle has a remedy for; returns what it returns.

        Raises RunStopped where there is none.
        """
        while True:
            self._decide(stage, AttemptBegan(stage, self._reached(stage)))
            event: Stop | AttemptFailed
            traceback = ""
            try:
                return work()
            except RunStopped as error:
                stop = ray.get(self.log.stop_state.remote())
                event = Stop(str(error), Cause.ENDED if stop is None else stop.cause)
            except RayActorError as error:
                event = _lost(error)
            except RanksFailed as error:
                event, traceback = AttemptFailed(error.words), str(error)
            try:
                action = self._decide(stage, event)
            except RunStopped:
                if traceback:
                    print(traceback, file=sys.stderr)
                raise
            if (isinstance(action, GoOn) and action.smaller) or not self.actors.well():
                self.actors.close()  # first: a stop that is still on its way must not meet the stage started again
            ray.get(self.log.clear_stop.remote())

    def _replace_roles(self, model: Path, reason: str) -> Roles:
        """New roles while Ray Train starts the ranks again, which wait for them."""
        while True:
            self._decide("rl", RolesLost(reason))
            self.actors.close()
            try:
                self.actors.start(self.config, model)
                break
            except RayActorError as error:  # a new one has died in its turn
                reason = _lost(error).reason
        # Last: until then a rank's report that a role is lost may still be on its way.
        ray.get(self.log.clear_stop.remote())
        return self.actors.handles()

    def _decide(self, stage: str, event: Event) -> Action:
        """What the lifecycle answers to an event, after its warning. Raises RunStopped where it ends the run."""
        self.lifecycle.handle(StepReached(self._reached(stage)))
        action = self.lifecycle.handle(event)
        if isinstance(action, End):
            raise RunStopped(action.reason)
        if isinstance(action, GoOn):
            smaller = f": {self._halve_micro_batch(stage, action.warning)}" if action.smaller else ""
            self._warn(f"{action.warning}{smaller}")
        return action

    def _warn(self, message: str) -> None:
        print(f"\n               {message}", flush=True)
        ray.get(self.log.append.remote("warning", {"message": message}))

    def _reached(self, stage: str) -> int:
        """The largest step that the stage has ever logged, whether a restart went behind it or not."""
        metrics = (r for r in read(self.run_dir) if r["event"] == "metrics")
        return max((r["step"] for r in metrics if r["stage"] == stage), default=0)

    def _halve_micro_batch(self, stage: str, reason: str) -> str:
        """Takes half the micro-batch and says so; raises RunStopped where there is none."""
        smaller = smaller_micro_batch(self.given, stage)
        if smaller is None:
            remedies = "model.gradient_checkpointing=true, model.lora, a higher learner.zero_stage or smaller groups"
            words = f"{reason}: micro-batches cannot be smaller; set {remedies}"
            self.lifecycle.handle(Stop(words))
            raise RunStopped(words)
        words = f"going on with {_micro_batch(smaller, stage)} (was {_micro_batch(self.given, stage)})"
        self.given, self.config = smaller, with_paths(smaller, self.run_dir)
        dump_config(smaller, self.files.config)
        return words


def _lost(error: RayActorError) -> Stop:
    return Stop(f"an actor of the run is lost ({' '.join(str(error).split())[:200]})", Cause.LOST)


def _micro_batch(config: Config, stage: str) -> str:
    """The key that bounds a forward's images, with its value."""
    if stage == "rl":
        return f"rl.groups_per_micro_batch={config.rl.groups_per_micro_batch}"
    size = config.pretrain.micro_batch_size or config.pretrain.batch_size // config.resources.learner_workers
    return f"pretrain.micro_batch_size={size}"
