"""``python -m rlproxi.run [CONFIG] [key=value ...] [--dry-run] [--resume RUN_DIR]``: stages in order.

The run directory is the truth. A stage that is done is not done again; one that was cut short goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Callable

from .config import Config, config_folder, dump_config, load_config, smaller_micro_batch
from .schema import STAGES, ConfigError
from .evaluation.heldout import write_json
from .telemetry.runlog import RunLog, last_step, read


class RunStopped(RuntimeError):
    """The run ended itself, with a reason for the user."""


def main(argv: list[str] | None = None) -> int:
    """Returns the process's exit code: 0 done, 1 stopped with a reason, 2 bad input."""
    parser = argparse.ArgumentParser("python -m rlproxi.run", description="Pre-train, fine-tune by reward, report.")
    parser.add_argument("arguments", nargs="*", metavar="CONFIG | key=value",
                        help="a YAML file (default: configs/quickstart.yaml) and overrides such as grpo.lr=1e-5")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run directory")
    options = parser.parse_intermixed_args(argv)
    try:
        config, run_dir = _open(options)
        if _plan(config, options.dry_run):
            _Session(config, run_dir or _new_run_dir(config)).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(config: Config, dry_run: bool) -> bool:
    """Prints the plan; True when the run can start. Raises ConfigError for what would stop it: a dry run only tells of
    files that are not there."""
    from .dry_run import describe
    from .preflight import problems

    found = problems(config)
    stopping = [problem.text for problem in found if not (dry_run and problem.missing)]
    if stopping:
        raise ConfigError("\n       ".join(stopping))
    print(describe(config if not found else _with_shapes(config)))
    for problem in found:
        print(f"missing    {problem.text}")
    return not dry_run


def _with_shapes(config: Config) -> Config:
    """The config with the shapes of the published checkpoint in the place of one that is not there yet."""
    from .models.loading import published_shapes

    model = config.model
    for key in ("init", "encoders"):
        named = getattr(model, key)
        shapes = published_shapes(named) if named and not Path(named).is_dir() else None
        if shapes:
            model = model.model_copy(update={key: str(shapes)})
    return config.model_copy(update={"model": model})


def _open(options) -> tuple[Config, Path | None]:
    overrides = [a for a in options.arguments if "=" in a]
    files = [a for a in options.arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"one config at a time, got {', '.join(files)}")
    if not options.resume:
        return load_config(files[0] if files else config_folder() / "quickstart.yaml", overrides), None
    run_dir = Path(options.resume)
    if files:
        raise ConfigError(f"--resume takes the run's own config.yaml; leave out {files[0]} (key=value still works)")
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--resume {run_dir}: no config.yaml there, so it is not a run directory")
    return load_config(run_dir / "config.yaml", overrides), run_dir


def _new_run_dir(config: Config) -> Path:
    base = Path(config.run.dir) / f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, n = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder, n = base.with_name(f"{base.name}-{n}"), n + 1


class _Session:
    """One process's work on a run directory."""

    def __init__(self, config: Config, run_dir: Path):
        self.run_dir = run_dir.resolve()
        self.start = time.time()
        self._take(config)

    def _take(self, config: Config) -> None:
        """The run's config from here on: in its directory as it was given, in here with every path."""
        from .preflight import with_paths

        dump_config(config, self.run_dir / "config.yaml")
        self.given, self.config = config, with_paths(config, self.run_dir)

    def run(self) -> None:
        """All stages that are configured and not done yet."""
        from actors import caretaker, cluster
        from actors.reward_service import app_names
        from actors.scribe import Scribe

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
        self.apps: dict[str, str] = {}
        self.conductor = None
        done = {r["name"] for r in read(self.run_dir) if r["event"] == "stage" and r["status"] == "done"}
        try:
            for stage in STAGES:
                if stage in self.config.run.stages and stage not in done and (stage != "encode" or self._cache()):
                    self._stage(stage)
        finally:
            self._close()
        self._print_result()

    def _show_page(self):
        """The live page beside the run; None where it is turned off or cannot be had, which ends no run."""
        from .dashboard.beside import Beside

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
        import ray

        self.capacity.hold(stage)
        begun = time.time()
        ray.get(self.scribe.append.remote("stage", {"name": stage, "status": "start"}))
        getattr(self, f"_{stage}")()
        seconds = time.time() - begun
        ray.get(self.scribe.append.remote("stage", {"name": stage, "status": "done", "seconds": seconds}))
        print(f"{stage:<14} done in {seconds:.0f} s")

    # -- the stages -----------------------------------------------------------------------

    def _curate(self) -> None:
        from actors.curator import curate

        told = self._watch(lambda: curate(self.config, self.run_dir, self.scribe),
                           [("curate/examine", 100), ("curate/write", 100)])
        print(f"               {told['kept']} of {told['samples']} samples kept")

    def _encode(self) -> None:
        from actors.encoder import encode

        from .data.shards import list_shards
        from .models.loading import parts_folder

        parts = parts_folder(self.config)
        latent = parts is not None and (parts / "vae").is_dir()
        told = self._watch(lambda: encode(self.config, Path(self._cache()), str(parts) if latent else None, self.scribe),
                           [("encode", len(list_shards(self.config.data.urls)))])
        print(f"               {told['samples']} samples, {told['skipped']} skipped {told['reasons'] or ''}")

    def _prepare(self) -> None:
        from actors.preparer import needs, prepare

        p = self.config.prepare
        bars = [(f"prepare/{name}", p.text_steps if name == "text" else p.classifier_steps) for name in needs(self.config)]
        accuracies = self._watch(lambda: prepare(self.config, self.run_dir, self.scribe), bars)
        for name, accuracy in accuracies.items():
            print(f"               {name} classifier: {accuracy:.3f} of attributes right on fresh portraits")

    def _pretrain(self) -> None:
        from actors.training import PretrainSetup, pretrain

        start = str(self._pretrain_start())
        self._with_less_memory("pretrain", lambda: self._watch(
            lambda: pretrain(PretrainSetup(self.config, str(self.run_dir), start, self.scribe, self._cache())),
            [("pretrain", self.config.pretrain.steps)], "loss"))

    def _pretrain_start(self) -> Path:
        """What pre-training starts from: ``model.init``, else a new network, made once as models/start."""
        from actors.preparer import start_model

        if self.config.model.init:
            return self._without_adapters(_model_folder(self.config.model.init))
        own = self.run_dir / "models" / "start"
        return own if own.is_dir() else start_model(self.config, self.run_dir, self._cache())

    def _cache(self) -> str | None:
        """The folder of the encoded shards; None for the embedded portraits."""
        from .preflight import cache_folder

        folder = cache_folder(self.config, self.run_dir)
        return None if folder is None else str(folder)

    def _without_adapters(self, folder: Path) -> Path:
        """``folder``, or, where it holds adapters and new ones are to be trained, a merged copy: they are its base."""
        if self.config.model.lora is None or not (folder / "lora").is_dir():
            return folder
        merged = self.run_dir / "models" / f"{folder.name}-merged"
        if not merged.is_dir():
            from .models.pipeline import TextToImage

            TextToImage.from_pretrained(folder).merged().save_pretrained(merged)
        return merged

    def _before(self) -> None:
        self._evaluate("before", self._start_model(), 0)

    def _rl(self) -> None:
        from actors.training import LearnerSetup, train

        model = self._start_model()

        def learn() -> None:
            conductor, store = self._system(model)
            setup = LearnerSetup(self.config, str(self.run_dir), str(model), conductor, store, self.scribe)
            self._watch(lambda: train(setup), [("rl", self.config.rl.steps)], "reward/mean")

        self._with_less_memory("rl", learn)

    def _with_less_memory(self, stage: str, work: Callable[[], None]) -> None:
        """Runs ``work``, after an out-of-memory again from the last checkpoint with half the micro-batch, until it fits."""
        import ray

        from .memory_errors import OUT_OF_MEMORY

        while True:
            try:
                return work()
            except RunStopped as stop:
                if ray.get(self.scribe.stop_kind.remote()) != OUT_OF_MEMORY:
                    raise
                smaller = smaller_micro_batch(self.given, stage)
                if smaller is None:
                    raise RunStopped(f"{stop}: micro-batches cannot be smaller; set model.gradient_checkpointing=true, "
                                     "model.lora, a higher learner.zero_stage, or a smaller group_size") from None
                told = f"{stop}: going on with {_micro_batch(smaller, stage)} (was {_micro_batch(self.given, stage)})"
                self._take(smaller)
                print(f"\n               {told}")
                self._close_system()  # first: a stop that is still on its way must not meet the stage started again
                ray.get([self.scribe.clear_stop.remote(), self.scribe.append.remote("warning", {"message": told})])

    def _after(self) -> None:
        final = self.run_dir / "models" / "final"
        trained = last_step(read(self.run_dir), "rl") or 0  # fewer than the config's after an early end
        self._evaluate("after", final if final.is_dir() else self._start_model(), trained)

    def _report(self) -> None:
        from .evaluation.report import write_report

        self._write_summary()
        write_report(self.run_dir)

    def _start_model(self) -> Path:
        """What RL starts from: this run's pre-training, else ``model.init``."""
        own = self.run_dir / "models" / "pretrained"
        if own.is_dir():
            return self._without_adapters(own)
        if self.config.model.init:
            return self._without_adapters(_model_folder(self.config.model.init))
        raise ConfigError(f"no starting policy: {own} does not exist and model.init is not set; add 'pretrain' to "
                          "run.stages or name a model folder with model.init")

    def _system(self, model: Path):
        """Rewards, weight store and conductor; made once for before, rl and after."""
        import ray

        from actors.cluster import beside_driver
        from actors.conductor import Conductor
        from actors.reward_service import deploy
        from actors.weights import WeightStore

        if self.conductor is None:
            # Rollout actors load the model while the rewards are deployed.
            self.store = WeightStore.options(**beside_driver()).remote(keep=self.config.rl.max_staleness + 2)
            self.conductor = Conductor.options(**beside_driver()).remote(
                self.config, str(self.run_dir), str(model), self.scribe, self.store)
            try:
                self.apps = self.apps or deploy(self.config.rewards, self.run_dir.name, self.config.resources.placement)
            except (ValueError, FileNotFoundError, RuntimeError) as error:
                raise ConfigError(f"rewards: {error}") from None
            ray.get(self.conductor.connect.remote(self.apps))
        return self.conductor, self.store

    def _evaluate(self, tag: str, model: Path, version: int) -> None:
        import ray

        from .algorithms.rollout import flatten
        from .models.loading import trainable, training_form

        conductor, store = self._system(self._start_model())
        ray.get(store.publish.remote(version, flatten(trainable(training_form(model, self.config, "rl")))))
        steps = sorted({*self.config.evaluate.steps, self.config.sampler.num_inference_steps})
        result = ray.get(conductor.evaluate.remote(tag, steps, version))
        for count, entry in result["by_steps"].items():
            told = ", ".join(f"{name} {x['mean']:.3f} ± {x['sem']:.3f}" if x["mean"] is not None else f"{name} no score"
                             for name, x in [*entry["heldout"].items(), *entry["train"].items()])
            far = f", distance {entry['distance']['total']:.3f}" if "distance" in entry else ""
            print(f"               {tag} RL, {count:>3} steps: {told}, diversity {entry['diversity']:.3f}{far}")

    # -- around them ----------------------------------------------------------------------

    def _watch(self, work, bars: list[tuple[str, int]], shown: str | None = None):
        """Runs ``work`` in a thread and draws progress bars from the scribe; raises what it raised."""
        import ray
        from tqdm import tqdm

        outcome: dict = {}

        def target() -> None:
            try:
                outcome["value"] = work()
            except BaseException as error:  # noqa: BLE001  (re-raised in the main thread)
                outcome["error"] = error

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        drawn = [(name, tqdm(total=total, desc=name, unit="step", mininterval=1.0)) for name, total in bars]
        while thread.is_alive():
            thread.join(0.5)
            for name, bar in drawn:
                newest = ray.get(self.scribe.progress.remote(name))
                if newest and newest["step"] > bar.n:
                    bar.update(newest["step"] - bar.n)
                    if shown and newest.get(shown) is not None:
                        bar.set_postfix_str(f"{shown} {newest[shown]:.4f}")
        for _, bar in drawn:
            if "error" not in outcome:
                bar.update(bar.total - bar.n)
            bar.close()
        reason = ray.get(self.scribe.stop_reason.remote())
        if reason:
            raise RunStopped(reason)
        if "error" in outcome:
            raise outcome["error"]
        return outcome.get("value")

    def _write_summary(self) -> None:
        from .telemetry.summary import summary

        write_json(self.run_dir / "summary.json", summary(self.run_dir, self.config))

    def _print_result(self) -> None:
        from .advice import describe, measured

        if (self.run_dir / "report.html").is_file():
            print(f"\nreport         {self.run_dir / 'report.html'}")
        final = json.loads((self.run_dir / "summary.json").read_text()) if (self.run_dir / "summary.json").is_file() else {}
        before, after = (final.get("heldout", {}).get(when) for when in ("before", "after"))
        if after is not None:
            print(f"held-out judge {'not evaluated' if before is None else f'{before:.3f}'} -> {after:.3f}")
        alarms = [r for r in read(self.run_dir) if r["event"] == "alarm"]
        if alarms:
            best = alarms[-1]["best"]
            where = self.run_dir / "models" / ("best" if best else "pretrained")
            print(f"ALARM          {alarms[-1]['message']}\n               the best model, of iteration {best}: {where}")
        advice = measured(self.run_dir, self.config)
        print("\n".join([*(describe(advice) if advice else []), f"total          {time.time() - self.start:.0f} s"]))

    def _close(self) -> None:
        import ray

        if self.apps:
            from actors.reward_service import withdraw

            withdraw(self.apps)
        self._close_system()
        self.capacity.give_back()
        if self.caretaker is not None:
            ray.kill(self.caretaker)
        with contextlib.suppress(ray.exceptions.RayError):  # its exporters may hold records back; a fault there ends no run
            ray.get(self.scribe.close.remote(), timeout=30)
        ray.kill(self.scribe)
        if self.page:  # last: what has just been logged is still shown
            self.page.close()

    def _close_system(self) -> None:
        """Ends conductor, rollout actors and weight store; the rewards stay."""
        import ray

        if self.conductor is not None:
            ray.get(self.conductor.close.remote())
            ray.kill(self.conductor)
            ray.kill(self.store)
            self.conductor = None


def _micro_batch(config: Config, stage: str) -> str:
    """The key that bounds a forward's images, with its value."""
    if stage == "rl":
        return f"{config.section}.groups_per_micro_batch={config.rl.groups_per_micro_batch}"
    size = config.pretrain.micro_batch_size or config.pretrain.batch_size // config.resources.learner_workers
    return f"pretrain.micro_batch_size={size}"


def _model_folder(path: str) -> Path:
    from .models.loading import find_model

    try:
        return find_model(path)
    except FileNotFoundError as error:
        raise ConfigError(f"model.init: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
