"""``python -m rlproxi.run [CONFIG] [key=value ...] [--dry-run] [--resume RUN_DIR]``: stages in order.

The run directory is the truth. A stage that is done is not done again; one that was cut short goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path

from .config import Config, config_folder, dump_config, load_config
from .schema import STAGES, ConfigError, Reward
from .evaluation.heldout import write_json
from .telemetry.runlog import read, series, stage_seconds


class RunStopped(RuntimeError):
    """The run ended itself, with a reason for the user."""


def main(argv: list[str] | None = None) -> int:
    """Returns the process's exit code: 0 done, 1 stopped with a reason, 2 bad input."""
    parser = argparse.ArgumentParser("python -m rlproxi.run", description="Pre-train, fine-tune by reward, report.")
    parser.add_argument("arguments", nargs="*", metavar="CONFIG | key=value",
                        help="a YAML file (default: configs/quickstart.yaml) and overrides such as grpo.lr=1e-5")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run directory")
    options = parser.parse_args(argv)
    try:
        config, run_dir = _open(options)
        _check_params(with_paths(config, run_dir or Path(config.run.dir)))
        from .dry_run import describe

        print(describe(config))
        if options.dry_run:
            return 0
        _Session(config, run_dir or _new_run_dir(config)).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


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


def with_paths(config: Config, run_dir: Path) -> Config:
    """The embedded scorers read what this run's own ``prepare`` makes, unless told otherwise."""
    own = {"attributes": "reward", "judge": "judge"}

    def resolve(reward: Reward) -> Reward:
        if reward.kind in own and "path" not in reward.params:
            path = str(run_dir / "models" / f"{own[reward.kind]}.safetensors")
            return reward.model_copy(update={"params": {"path": path, **reward.params}})
        return reward

    rewards = config.rewards.model_copy(update={
        "train": [resolve(r) for r in config.rewards.train],
        "heldout": [resolve(r) for r in config.rewards.heldout]})
    return config.model_copy(update={"rewards": rewards})


def _check_params(config: Config) -> None:
    """Raises ConfigError for a scorer that does not exist, or parameters that it does not take."""
    from .rewards import checked_params, parameters

    for key, rewards in (("train", config.rewards.train), ("heldout", config.rewards.heldout)):
        for i, reward in enumerate(rewards):
            try:
                checked_params(reward.kind, reward.params)
                if reward.tune_micro_batch and "micro_batch" not in parameters(reward.kind):
                    raise ValueError(f"reward {reward.name!r} scores without micro-batches; leave tune_micro_batch out")
            except ValueError as error:
                raise ConfigError(f"rewards.{key}.{i}: {error}") from None


class _Session:
    """One process's work on a run directory."""

    def __init__(self, config: Config, run_dir: Path):
        self.run_dir = run_dir.resolve()
        self.config = with_paths(config, self.run_dir)
        dump_config(config, self.run_dir / "config.yaml")
        self.start = time.time()

    def run(self) -> None:
        """All stages that are configured and not done yet."""
        from actors import cluster
        from actors.scribe import Scribe

        print(f"\nrun directory  {self.run_dir}")
        how = cluster.connect()
        cluster.check_size(self.config)
        print(f"ray            {how}")
        self.scribe = Scribe.remote(str(self.run_dir))
        self.apps: dict[str, str] = {}
        self.conductor = None
        done = {r["name"] for r in read(self.run_dir) if r["event"] == "stage" and r["status"] == "done"}
        try:
            for stage in STAGES:
                if stage in self.config.run.stages and stage not in done:
                    self._stage(stage)
        finally:
            self._close()
        self._print_result()

    def _stage(self, stage: str) -> None:
        import ray

        begun = time.time()
        ray.get(self.scribe.append.remote("stage", {"name": stage, "status": "start"}))
        getattr(self, f"_{stage}")()
        seconds = time.time() - begun
        ray.get(self.scribe.append.remote("stage", {"name": stage, "status": "done", "seconds": seconds}))
        print(f"{stage:<14} done in {seconds:.0f} s")

    # -- the stages -----------------------------------------------------------------------

    def _prepare(self) -> None:
        from actors.preparer import needs, prepare

        p = self.config.prepare
        bars = [(f"prepare/{name}", p.text_steps if name == "text" else p.classifier_steps) for name in needs(self.config)]
        accuracies = self._watch(lambda: prepare(self.config, self.run_dir, self.scribe), bars)
        for name, accuracy in accuracies.items():
            print(f"               {name} classifier: {accuracy:.3f} of attributes right on fresh portraits")

    def _pretrain(self) -> None:
        from actors.training import PretrainSetup, pretrain

        setup = PretrainSetup(self.config, str(self.run_dir), str(self._pretrain_start()), self.scribe, self._cache())
        self._watch(lambda: pretrain(setup), [("pretrain", self.config.pretrain.steps)], "loss")

    def _pretrain_start(self) -> Path:
        """What pre-training starts from: ``model.init``, else a new network, made once as models/start."""
        from actors.preparer import start_model

        if self.config.model.init:
            return self._without_adapters(_model_folder(self.config.model.init))
        own = self.run_dir / "models" / "start"
        return own if own.is_dir() else start_model(self.config, self.run_dir, self._cache())

    def _cache(self) -> str | None:
        """The folder of the encoded shards; None for the embedded portraits."""
        return None if self.config.data.source == "faces" else str(self.config.data.cache or self.run_dir / "cache")

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
        conductor, store = self._system(model)
        setup = LearnerSetup(self.config, str(self.run_dir), str(model), conductor, store, self.scribe)
        self._watch(lambda: train(setup), [("rl", self.config.grpo.steps)], "reward/mean")

    def _after(self) -> None:
        final = self.run_dir / "models" / "final"
        trained = series(read(self.run_dir), "rl", "reward/mean")[0]  # fewer than grpo.steps after an early end
        self._evaluate("after", final if final.is_dir() else self._start_model(), int(max(trained, default=0)))

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

        from actors.conductor import Conductor
        from actors.reward_service import deploy
        from actors.weights import WeightStore

        if self.conductor is None:
            # Rollout actors load the model while the rewards are deployed.
            self.store = WeightStore.remote(keep=self.config.grpo.max_staleness + 2)
            self.conductor = Conductor.remote(self.config, str(self.run_dir), str(model), self.scribe, self.store)
            try:
                self.apps = deploy(self.config.rewards, self.run_dir.name)
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
            print(f"               {tag} RL, {count:>3} steps: {told}")

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
        write_json(self.run_dir / "summary.json", summary(self.run_dir, self.config))

    def _print_result(self) -> None:
        if (self.run_dir / "report.html").is_file():
            print(f"\nreport         {self.run_dir / 'report.html'}")
        final = json.loads((self.run_dir / "summary.json").read_text()) if (self.run_dir / "summary.json").is_file() else {}
        if final.get("heldout", {}).get("after") is not None:
            print(f"held-out judge {final['heldout']['before']:.3f} -> {final['heldout']['after']:.3f}")
        alarms = [r for r in read(self.run_dir) if r["event"] == "alarm"]
        if alarms:
            best = alarms[-1]["best"]
            where = self.run_dir / "models" / ("best" if best else "pretrained")
            print(f"ALARM          {alarms[-1]['message']}\n               the best model, of iteration {best}: {where}")
        print(f"total          {time.time() - self.start:.0f} s")

    def _close(self) -> None:
        import ray

        if self.apps:
            from actors.reward_service import withdraw

            withdraw(self.apps)
        if self.conductor is not None:
            ray.get(self.conductor.close.remote())
            ray.kill(self.conductor)
            ray.kill(self.store)
        ray.kill(self.scribe)


def _model_folder(path: str) -> Path:
    from .models.loading import find_model

    try:
        return find_model(path)
    except FileNotFoundError as error:
        raise ConfigError(f"model.init: {error}") from None


def summary(run_dir: Path, config: Config) -> dict:
    """summary.json from the run directory alone: what a script needs."""
    records = read(run_dir)
    seconds = stage_seconds(records)
    rewards = [r for r in series(records, "rl", "reward/mean")[1] if not math.isnan(r)]
    rates = [r for r in series(records, "rl", "images_per_second")[1] if not math.isnan(r)]

    def heldout(tag: str) -> float | None:
        file = run_dir / "evaluation" / f"{tag}.json"
        if not file.is_file() or not config.rewards.heldout:
            return None
        entry = json.loads(file.read_text())["by_steps"].get(str(config.sampler.num_inference_steps))
        return entry["heldout"][config.rewards.heldout[0].name]["mean"] if entry else None

    return {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "reward": {"first": rewards[0] if rewards else None, "last": rewards[-1] if rewards else None},
        "heldout": {"before": heldout("before"), "after": heldout("after"),
                    "best_iteration": max((r["step"] for r in records if r["event"] == "best"), default=None)},
        "images_per_second": sum(rates) / len(rates) if rates else None,
        "seed": config.run.seed,
        "git": _git(),
        "versions": {name: metadata.version(name) for name in
                     ("ray", "torch", "deepspeed", "transformers", "diffusers", "numpy")},
    }


def _git() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
