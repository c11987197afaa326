"""``rlproxi doctor``: what is installed, what a config needs and lacks, and whether it fits a cluster.

Every finding is one line, ok, warn or fail, with a remedy below it where there is one. Nothing is changed or
downloaded. Ray is joined only where ``--address`` names a cluster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..config.loading import Config, config_folder, load_config
from ..config.sections import Reward
from ..planning.findings import Finding, fail, ok, warn
from .arguments import add_config, split_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Check what is installed, what a config lacks, and whether it fits a cluster. The exit status is 1 where "
        "something has to be mended."
    )
    add_config(parser)
    add = parser.add_argument
    add("--cluster", metavar="FILE", help="does the run fit on the cluster of this file? (ray up or KubeRay)")
    add("--address", metavar="HOST:PORT", help="does it fit on this running Ray cluster? auto: the one on this machine")
    add("--run", metavar="RUN_DIR", help="scaling advice from what a run measured")
    add("--gpus", type=float, metavar="N", help="with --run: for N GPUs (default: as many as it had, and twice)")
    add("--load", action="store_true", help="load every scorer, not only look at its files: slow, and much memory")


def command(options: argparse.Namespace) -> int:
    """Print the findings. Returns 1 where one of them is a failure, else 0."""
    counts = dict.fromkeys(("ok", "warn", "fail"), 0)
    for finding in _findings(options):
        counts[finding.level] += 1
        print(finding, flush=True)
    print(f"\n{counts['fail']} to mend, {counts['warn']} to know of, {counts['ok']} in order")
    return 1 if counts["fail"] else 0


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    if not options.run or options.arguments or options.cluster or options.address:
        file, overrides = split_config(options.arguments)
        yield from _checks(load_config(file or config_folder() / "quickstart.yaml", overrides), options)
    if options.run:
        from actors.cluster.advice import advise

        for line in advise(options.run, options.gpus):
            level = "warn" if "no advice" in line or "too few" in line else "ok"
            yield Finding(level, "scaling", line.removeprefix("scaling").strip())


def _checks(config: Config, options: argparse.Namespace) -> Iterator[Finding]:
    """Findings about this machine, the config's files and the clusters named."""
    from actors.cluster import doctor
    from actors.cluster.resources import run_demand, total_resources

    from ..planning import machine

    yield from machine.packages()
    gpus = total_resources(run_demand(config))["GPU"]
    yield from machine.accelerators(config, gpus, elsewhere=bool(options.cluster or options.address))
    yield from machine.token()
    yield from machine.space(config)
    yield from machine.clock()
    yield from machine.ports(config)
    yield from files(config, options.load)
    if options.cluster:
        yield from doctor.check_file(config, options.cluster)
    if options.address:
        yield from doctor.check_running(config, options.address)


def files(config: Config, load: bool = False) -> Iterator[Finding]:
    """Report everything that would stop the run, and files that are damaged. ``load``: load every scorer too."""
    from ..planning.preflight import problems as preflight_problems

    found = preflight_problems(config)
    for problem in found:
        remedy = "get the file, or name where it is (the head of each recipe says how)" if problem.missing else ""
        yield fail("config", problem.text, remedy)
    if not found:
        yield ok("config", f"{config.run.name}: stages {', '.join(config.run.stages)}; nothing is missing")
    for key in ("init", "encoders"):
        folder = getattr(config.model, key)
        if folder and Path(folder).is_dir():
            yield from _model(f"model.{key}", folder)
    for reward in config.rewards.all:
        yield from _reward(reward, load)


def _model(key: str, folder: str) -> Iterator[Finding]:
    from ..models.checkpoint_files import check_weights
    from ..models.folders import ModelFolder

    try:
        parts = sorted(file.parent for file in ModelFolder.find(folder).path.glob("*/config.json"))
    except FileNotFoundError:
        return  # preflight reports it
    for part in parts:
        if part.name in ("safety_checker", "image_encoder"):
            continue  # no part of training
        try:
            check_weights(part)
            yield ok("model", f"{key}: {part} can be read")
        except (ValueError, OSError) as error:
            yield fail("model", f"{key}: {error}")


def _reward(reward: Reward, load: bool) -> Iterator[Finding]:
    from ..rewards import build, facts

    known = facts(reward.kind)
    if known.prepared_as and "path" not in reward.params:
        yield ok("reward", f"{reward.name}: the stage prepare makes it")
        return
    if reward.runtime_env:
        yield warn("reward", f"{reward.name}: has a runtime_env of its own and is not looked at here")
        return
    named = [Path(reward.params[key]) for key in known.file_parameters if isinstance(reward.params.get(key), str)]
    for path in named:
        problem = damaged(path) if path.is_file() else None
        if problem:
            yield fail("reward", f"{reward.name}: {path} {problem}", "get the file again")
            return
    if not load:
        if all(path.exists() for path in named):
            there = f"{', '.join(map(str, named))} is there" if named else "needs no file"
            yield ok("reward", f"{reward.name}: {there}")
        return
    try:
        build(reward.kind, reward.params)
        yield ok("reward", f"{reward.name}: loaded")
    except Exception as error:  # whatever a scorer raises is the answer to --load
        message = " ".join(str(error).split())[:300]
        yield fail("reward", f"{reward.name} does not load: {type(error).__name__}: {message}")


def damaged(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, without reading its weights; None where nothing is."""
    import zipfile

    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a checkpoint"
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "is cut short"
    if path.suffix == ".safetensors":
        size = int.from_bytes(head[:8], "little")
        if size > path.stat().st_size - 8:
            return "is cut short"
    return None
