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
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from rlproxi.algorithms.rollout import flatten
from rlproxi.config.loading import Config, dump_config, smaller_micro_batch
from rlproxi.config.sections import STAGES
from rlproxi.errors import ConfigError, RunStopped
from rlproxi.evaluation.heldout import write_json
from rlproxi.models.folders import find_model, parts_folder
from rlproxi.models.loading import trainable, training_form
from rlproxi.planning.preflight import cache_folder, with_paths
from rlproxi.telemetry.runlog import RunLog, last_step, read

from ..cluster import join as cluster
from ..rewards.service import app_names, deploy, withdraw
from ..rl.conductor import Conductor
from ..rl.stops import LOST, OUT_OF_MEMORY
from ..rl.weights import WeightStore
from ..train.jobs import LearnerSetup, PretrainSetup, RanksFailed, pretrain, train
from . import cleanup as caretaker
from .log_writer import Scribe
from .supervisor import Leaving, Watch


class Driver:
    """Runs the stages of ``config`` that are not done yet in ``run_dir``."""

    def __init__(self, config: Config, run_dir: Path):
        self.run_dir = run_dir.resolve()
        self.start = time.time()
        self.apps: dict[str, str] = {}
        self.conductor = self.store = None
        self._take(config)

    def _take(self, config: Config) -> None:
        """The run's config from here on: in its directory as it was given, in here with every path."""
        dump_config(config, self.run_dir / "config.yaml")
        self.given, self.config = config, with_paths(config, self.run_dir)

    def run(self) -> None:
        """All stages that are configured and not done yet."""
        print(f"\nrun directory  {self.run_dir}")
        how = cluster.connect()
        cluster.check_size(self.config)
        print(f"ray            {how}")
        self.page = self._show_page()
        self.scribe = Scribe.options(**cluster.beside_driver()).remote(str(self.run_dir))
        self.capacity = cluster.Capacity(self.config)
        names = [*app_names(self.config.rewards, self.run_dir.name).values()]
        # Where Ray lives on after the run, somebody has to clear up when the run cannot.
        self.caretaker = caretaker.start(self.scribe, names, self.capacity.on) if how == "joined" else None
        done = {r["name"] for r in read(self.run_dir) if r["event"] == "stage" and r["status"] == "done"}
        try:
            with Leaving(self.config.faults.grace_s) as self.leaving:
                for stage in STAGES:
                    if stage in self.config.run.stages and stage not in done and (stage != "encode" or self._cache()):
                        self._stage(stage)
        finally:
            self._close()
        self._print_result()

    def _show_page(self):
        """The live page beside the run; None where it is turned off or cannot be had, which ends no run."""
        from rlproxi.dashboard.beside import Beside

        t = self.config.telemetry
        try:
            page = Beside(self.run_dir, t.dashboard_host, t.dashboard_port, self._warn) if t.dashboard else None
        except (OSError, RuntimeError) as error:
            return self._warn(f"no live page: {error}")
        if page:
            print(f"dashboard      {page.url}", flush=True)
        return page

    def _warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)
        with RunLog(self.run_dir) as log:
            log.append("warning", message=message)

    def _stage(self, stage: str) -> None:
        self.capacity.hold(stage)
        begun = time.time()
        ray.get(self.scribe.append.remote("stage", {"name": stage, "status": "start"}))
        getattr(self, f"_{stage}")()
        seconds = time.time() - begun
        ray.get(self.scribe.append.remote("stage", {"name": stage, "status": "done", "seconds": seconds}))
        print(f"{stage:<14} done in {seconds:.0f} s")

    # -- the stages -----------------------------------------------------------------------

    def _curate(self) -> None:
        from ..data.curator import curate

        told = self._watch(
            lambda: curate(self.config, self.run_dir, self.scribe), [("curate/examine", 100), ("curate/write", 100)]
        )
        print(f"               {told['kept']} of {told['samples']} samples kept")

    def _encode(self) -> None:
        from rlproxi.data.shards import list_shards

        from ..data.encoder import encode

        parts = parts_folder(self.config)
        latent = parts is not None and (parts / "vae").is_dir()
        told = self._watch(
            lambda: encode(self.config, Path(self._cache()), str(parts) if latent else None, self.scribe),
            [("encode", len(list_shards(self.config.data.urls)))],
        )
        print(f"               {told['samples']} samples, {told['skipped']} skipped {told['reasons'] or ''}")

    def _prepare(self) -> None:
        from .prepare import needs, prepare

        p = self.config.prepare
        bars = [
            (f"prepare/{name}", p.text_steps if name == "text" else p.classifier_steps) for name in needs(self.config)
        ]
        accuracies = self._watch(lambda: prepare(self.config, self.run_dir, self.scribe), bars)
        for name, accuracy in accuracies.items():
            print(f"               {name} classifier: {accuracy:.3f} of attributes right on fresh portraits")

    def _pretrain(self) -> None:
        start = str(self._pretrain_start())
        self._until_it_stands(
            "pretrain",
            lambda: self._watch(
                lambda: pretrain(PretrainSetup(self.config, str(self.run_dir), start, self.scribe, self._cache())),
                [("pretrain", self.config.pretrain.steps)],
                "loss",
            ),
        )

    def _before(self) -> None:
        self._evaluate("before", self._start_model(), 0)

    def _rl(self) -> None:
        model = self._start_model()

        def replace(reason: str) -> dict[str, Any]:
            """New roles while Ray Train starts the ranks again; those wait for them."""
            self.replaced = True
            while True:
                self._count_lost("rl", reason)
                self._close_system()
                try:
                    self._system(model)
                    break
                except RayActorError as error:  # it has died in its turn
                    reason = _of_lost(error)
            # Last: until then the ranks' own word that a role is lost may still be on its way.
            ray.get(self.scribe.clear_stop.remote())
            return self._roles()

        def learn() -> None:
            self._system(model)
            setup = LearnerSetup(self.config, str(self.run_dir), str(model), self._names(), self.scribe)
            self._watch(
                lambda: train(setup), [("rl", self.config.rl.steps)], "reward/mean", saves=True, replace=replace
            )
            if not (self.run_dir / "models" / "final").is_dir():
                raise RunStopped("rl ended without models/final; go on with --resume")

        self._until_it_stands("rl", learn)

    def _after(self) -> None:
        final = self.run_dir / "models" / "final"
        trained = last_step(read(self.run_dir), "rl") or 0  # fewer than the config's after an early end
        self._evaluate("after", final if final.is_dir() else self._start_model(), trained)

    def _report(self) -> None:
        from rlproxi.pages.report import write_report
        from rlproxi.pages.summary import summary

        write_json(self.run_dir / "summary.json", summary(self.run_dir, self.config))
        write_report(self.run_dir)

    # -- what stages start from -------------------------------------------------------------

    def _pretrain_start(self) -> Path:
        """What pre-training starts from: ``model.init``, else a new network, made once as models/start."""
        from .prepare import start_model

        if self.config.model.init:
            return self._without_adapters(_model_folder(self.config.model.init))
        own = self.run_dir / "models" / "start"
        return own if own.is_dir() else start_model(self.config, self.run_dir, self._cache())

    def _cache(self) -> str | None:
        """The folder of the encoded shards; None for the embedded portraits."""
        folder = cache_folder(self.config, self.run_dir)
        return None if folder is None else str(folder)

    def _start_model(self) -> Path:
        """What RL starts from: this run's pre-training, else ``model.init``."""
        own = self.run_dir / "models" / "pretrained"
        if own.is_dir():
            return self._without_adapters(own)
        if self.config.model.init:
            return self._without_adapters(_model_folder(self.config.model.init))
        raise ConfigError(
            f"no starting policy: {own} does not exist and model.init is not set; add 'pretrain' to "
            "run.stages or name a model folder with model.init"
        )

    def _without_adapters(self, folder: Path) -> Path:
        """``folder``, or, where it holds adapters and new ones are to be trained, a merged copy: they are its base."""
        if self.config.model.lora is None or not (folder / "lora").is_dir():
            return folder
        merged = self.run_dir / "models" / f"{folder.name}-merged"
        if not merged.is_dir():
            from rlproxi.models.pipeline import TextToImage

            TextToImage.from_pretrained(folder).merged().save_pretrained(merged)
        return merged

    # -- the actors of before, rl and after ---------------------------------------------------

    def _system(self, model: Path) -> tuple[Any, Any]:
        """Conductor and weight store, with rewards and rollout actors behind them; made once for before, rl and after."""
        if self.conductor is None:
            # Rollout actors load the model while the rewards are deployed.
            conductor, store = self._names()
            self.store = self._named(WeightStore, store, keep=self.config.rl.max_staleness + 2)
            self.conductor = self._named(
                Conductor, conductor, self.config, str(self.run_dir), str(model), self.scribe, self.store
            )
            try:
                c = self.config
                self.apps = self.apps or deploy(
                    c.rewards, self.run_dir.name, c.resources.placement, c.faults.hang_timeout_s
                )
            except (ValueError, FileNotFoundError, RuntimeError) as error:
                raise ConfigError(f"rewards: {error}") from None
            ray.get(self.conductor.connect.remote(self.apps))
        return self.conductor, self.store

    def _names(self) -> tuple[str, str]:
        """Those by which the learner's ranks find conductor and weight store."""
        return f"{self.run_dir.name} conductor", f"{self.run_dir.name} weights"

    def _named(self, kind: Any, name: str, *arguments: Any, **more: Any) -> Any:
        """An actor with a name, on this node; waits where one that was killed still has it."""
        given_up = time.monotonic() + 60
        while True:
            try:
                return kind.options(name=name, **cluster.beside_driver()).remote(*arguments, **more)
            except ValueError:
                if time.monotonic() > given_up:
                    raise
                time.sleep(0.1)

    def _roles(self) -> dict[str, Any]:
        return {"conductor": self.conductor, "weight store": self.store} if self.conductor is not None else {}

    def _well(self) -> bool:
        """Whether conductor and weight store are there and can go on."""
        try:
            return bool(self._roles()) and all(
                ray.get([role.alive.remote() for role in self._roles().values()], timeout=10)
            )
        except (RayActorError, GetTimeoutError):
            return False

    def _evaluate(self, tag: str, model: Path, version: int) -> None:
        def work() -> dict:
            conductor, store = self._system(self._start_model())
            ray.get(store.publish.remote(version, flatten(trainable(training_form(model, self.config, "rl")))))
            steps = sorted({*self.config.evaluate.steps, self.config.sampler.num_inference_steps})
            return self._watch(lambda: ray.get(conductor.evaluate.remote(tag, steps, version)))

        for count, entry in self._until_it_stands(tag, work)["by_steps"].items():
            told = ", ".join(
                f"{name} {x['mean']:.3f} ± {x['sem']:.3f}" if x["mean"] is not None else f"{name} no score"
                for name, x in [*entry["heldout"].items(), *entry["train"].items()]
            )
            far = f", distance {entry['distance']['total']:.3f}" if "distance" in entry else ""
            print(f"               {tag} RL, {count:>3} steps: {told}, diversity {entry['diversity']:.3f}{far}")

    def _close_system(self) -> None:
        """Ends conductor, rollout actors and weight store, whatever state they are in; the rewards stay."""
        if self.conductor is not None:
            with contextlib.suppress(RayError):  # it may be what is lost: then its actors have gone with it
                ray.get(self.conductor.close.remote(), timeout=10)
            ray.kill(self.conductor)
            ray.kill(self.store)
            self.conductor = self.store = None

    # -- around them ----------------------------------------------------------------------

    def _watch(
        self,
        work: Callable[[], Any],
        bars: list[tuple[str, int]] = [],
        shown: str | None = None,
        saves: bool = False,
        replace: Callable[[str], dict[str, Any]] | None = None,
    ) -> Any:
        watch = Watch(self.scribe, self._roles(), self.config.faults.hang_timeout_s, self.leaving, saves, replace)
        return watch.over(work, bars, shown)

    def _until_it_stands(self, stage: str, work: Callable[[], Any]) -> Any:
        """Runs ``work``; after a stop that has a remedy, with that remedy again from the last checkpoint.

        Out of memory: with half the micro-batch, until it fits. A lost conductor, weight store or controller of Ray Train: with
        new ones, ``faults.max_restarts`` times in a row. Ranks that Ray Train gives up: again, unless none of its attempts has
        reached a new step.
        """
        self.lost, self.reached = 0, self._reached(stage)
        while True:
            kind, failed, before, self.replaced = "", None, self._reached(stage), False
            try:
                return work()
            except RunStopped as stop:
                kind, told = ray.get(self.scribe.stop_kind.remote()), str(stop)
            except RayActorError as error:
                kind, told = LOST, _of_lost(error)
            except RanksFailed as error:
                failed, told = error, f"{stage}: the learner failed ({error.words})"
            if kind == OUT_OF_MEMORY:
                self._warn_aloud(f"{told}: {self._smaller(stage, told)}")
            elif kind == LOST:
                self._count_lost(stage, told)
            elif failed is not None and (self._reached(stage) > before or self.replaced):
                self._warn_aloud(
                    f"{told}: going on from the last checkpoint, since step {self._reached(stage)} was reached meanwhile"
                )
            elif failed is not None:
                print(failed, file=sys.stderr)  # with the ranks' tracebacks
                raise RunStopped(
                    f"{told} in {self.config.learner.max_failures + 1} attempts without a new step after {before} "
                    "(learner.max_failures); once its cause is mended, go on with --resume"
                ) from None
            else:
                raise RunStopped(told)
            if kind == OUT_OF_MEMORY or not self._well():
                self._close_system()  # first: a stop that is still on its way must not meet the stage started again
            ray.get(self.scribe.clear_stop.remote())

    def _count_lost(self, stage: str, told: str) -> None:
        """Warns that a lost role is replaced; RunStopped where that has been done ``faults.max_restarts`` times in a row."""
        reached = self._reached(stage)
        if reached > self.reached:  # it stood for a while: what is counted begins anew
            self.lost, self.reached = 0, reached
        self.lost += 1
        if self.lost > self.config.faults.max_restarts:
            raise RunStopped(told)
        self._warn_aloud(
            f"{told}: going on with new ones, from the last checkpoint ({self.lost} of faults.max_restarts)"
        )

    def _warn_aloud(self, told: str) -> None:
        print(f"\n               {told}", flush=True)
        ray.get(self.scribe.append.remote("warning", {"message": told}))

    def _reached(self, stage: str) -> int:
        """The largest step that the stage has ever logged, dropped since or not."""
        return max(
            (r["step"] for r in read(self.run_dir) if r["event"] == "metrics" and r["stage"] == stage), default=0
        )

    def _smaller(self, stage: str, told: str) -> str:
        """Takes half the micro-batch; raises RunStopped where there is none."""
        smaller = smaller_micro_batch(self.given, stage)
        if smaller is None:
            raise RunStopped(
                f"{told}: micro-batches cannot be smaller; set model.gradient_checkpointing=true, "
                "model.lora, a higher learner.zero_stage, or a smaller group_size"
            ) from None
        words = f"going on with {_micro_batch(smaller, stage)} (was {_micro_batch(self.given, stage)})"
        self._take(smaller)
        return words

    def _print_result(self) -> None:
        from ..cluster.advice import describe, measured

        if (self.run_dir / "report.html").is_file():
            print(f"\nreport         {self.run_dir / 'report.html'}")
        final = (
            json.loads((self.run_dir / "summary.json").read_text()) if (self.run_dir / "summary.json").is_file() else {}
        )
        before, after = (final.get("heldout", {}).get(when) for when in ("before", "after"))
        if after is not None:
            print(f"held-out judge {'not evaluated' if before is None else f'{before:.3f}'} -> {after:.3f}")
        alarms = [r for r in read(self.run_dir) if r["event"] == "alarm"]
        if alarms:
            best = alarms[-1]["best"]
            where = self.run_dir / "models" / ("best" if best else "pretrained")
            print(
                f"ALARM          {alarms[-1]['message']}\n               the best model, of iteration {best}: {where}"
            )
        advice = measured(self.run_dir, self.config)
        print("\n".join([*(describe(advice) if advice else []), f"total          {time.time() - self.start:.0f} s"]))

    def _close(self) -> None:
        if self.apps:
            withdraw(self.apps)
        self._close_system()
        self.capacity.give_back()
        if self.caretaker is not None:
            ray.kill(self.caretaker)
        with contextlib.suppress(RayError):  # its exporters may hold records back; a fault there ends no run
            ray.get(self.scribe.close.remote(), timeout=30)
        ray.kill(self.scribe)
        if self.page:  # last: what has just been logged is still shown
            self.page.close()


def _of_lost(error: RayActorError) -> str:
    return f"an actor of the run is lost ({' '.join(str(error).split())[:200]})"


def _micro_batch(config: Config, stage: str) -> str:
    """The key that bounds a forward's images, with its value."""
    if stage == "rl":
        return f"rl.groups_per_micro_batch={config.rl.groups_per_micro_batch}"
    size = config.pretrain.micro_batch_size or config.pretrain.batch_size // config.resources.learner_workers
    return f"pretrain.micro_batch_size={size}"


def _model_folder(path: str) -> Path:
    try:
        return find_model(path)
    except FileNotFoundError as error:
        raise ConfigError(f"model.init: {error}") from None
