"""``rlproxi doctor``: what is installed, what a config needs and lacks, and whether it fits a cluster.

Every finding is one line, ok, warn or fail, with a remedy below it where there is one. Nothing is changed, nothing is
downloaded; Ray is joined only where ``--address`` names a cluster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.cluster import resources as demand
from actors.cluster.plan import Cluster, place, placeholders, problems, read_cluster, told

from ..config.loading import Config, config_folder, load_config
from ..errors import ConfigError


@dataclass(frozen=True)
class Finding:
    """level: ok, warn or fail. what: the thing looked at. remedy: what to do about it."""

    level: str
    what: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.level:<5} {self.what:<11} {self.text}"]
        return "\n".join([*lines, *([f"      {'':<11} -> {self.remedy}"] if self.remedy else [])])


def ok(what: str, text: str) -> Finding:
    return Finding("ok", what, text)


def warn(what: str, text: str, remedy: str = "") -> Finding:
    return Finding("warn", what, text, remedy)


def fail(what: str, text: str, remedy: str = "") -> Finding:
    return Finding("fail", what, text, remedy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG | key=value",
        help="a YAML file (default: configs/quickstart.yaml) and overrides, as for a run",
    )
    parser.add_argument(
        "--cluster", metavar="FILE", help="does the run fit on the cluster of this file? (ray up or KubeRay)"
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="does it fit on this running Ray cluster? HOST:PORT, or auto for the one on this machine",
    )
    parser.add_argument("--run", metavar="RUN_DIR", help="scaling advice from what a run measured")
    parser.add_argument(
        "--gpus", type=float, metavar="N", help="with --run: for N GPUs (default: as many as it had, and twice)"
    )
    parser.add_argument(
        "--load",
        action="store_true",
        help="load every scorer of the config, instead of only looking at its files: slow, and much memory",
    )


def command(argv: Sequence[str], survey: Callable[[str, str], dict] | None = None) -> int:
    """``main`` with its own parser, so that options may stand between CONFIG and key=value, as for a run."""
    parser = argparse.ArgumentParser(
        "rlproxi doctor",
        description="What is installed, what a config lacks, and whether "
        "it fits a cluster. Exit status 1 where something has to be mended.",
    )
    add_arguments(parser)
    return main(parser.parse_intermixed_args(argv), survey)


def main(arguments: argparse.Namespace, survey: Callable[[str, str], dict] | None = None) -> int:
    """Prints the findings; 0 when none of them is a failure, else 1. ``survey``: actors.cluster.survey.survey, for
    --address."""
    if arguments.run and not arguments.arguments and not arguments.cluster and not arguments.address:
        return _tell(_advice(arguments.run, arguments.gpus))
    overrides = [a for a in arguments.arguments if "=" in a]
    files = [a for a in arguments.arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"one config at a time, got {', '.join(files)}")
    config = load_config(files[0] if files else config_folder() / "quickstart.yaml", overrides)
    return _tell(_all(config, arguments, survey))


def _all(config: Config, arguments: argparse.Namespace, survey: Callable | None) -> Iterator[Finding]:
    from ..planning import machine

    yield from machine.packages()
    yield from machine.accelerators(config, elsewhere=bool(arguments.cluster or arguments.address))
    yield from machine.token()
    yield from machine.space(config)
    yield from machine.clock()
    yield from machine.ports(config)
    yield from files(config, arguments.load)
    if arguments.cluster:
        yield from on_file(config, arguments.cluster)
    if arguments.address:
        from actors.cluster import doctor as doctor_cluster

        yield from doctor_cluster.on_cluster(config, arguments.address, survey)
    if arguments.run:
        yield from _advice(arguments.run, arguments.gpus)


def _tell(found: Iterable[Finding]) -> int:
    counts = dict.fromkeys(("ok", "warn", "fail"), 0)
    for finding in found:
        counts[finding.level] += 1
        print(finding, flush=True)
    print(f"\n{counts['fail']} to mend, {counts['warn']} to know of, {counts['ok']} in order")
    return 1 if counts["fail"] else 0


def _advice(run_dir: str, gpus: float | None) -> Iterator[Finding]:
    from actors.cluster.advice import of_run

    for line in of_run(run_dir, gpus):
        level = "warn" if "no advice" in line or "too few" in line else "ok"
        yield Finding(level, "scaling", line.removeprefix("scaling").strip())


# -- the config's files -------------------------------------------------------------------


def files(config: Config, load: bool = False) -> Iterator[Finding]:
    """Everything that would stop the run, and, where the files are there, whether they are whole."""
    from ..planning.preflight import problems as preflight_problems

    found = preflight_problems(config)
    for problem in found:
        key, _, text = problem.text.partition(": ")
        yield fail(
            "config",
            f"{key}: {text}" if text else key,
            "get the file, or name where it is (the head of each recipe says how)" if problem.missing else "",
        )
    if not found:
        yield ok("config", f"{config.run.name}: stages {', '.join(config.run.stages)}; nothing is missing")
    for key in ("init", "encoders"):
        folder = getattr(config.model, key)
        if folder and Path(folder).is_dir():
            yield from _model(f"model.{key}", folder)
    for reward in [*config.rewards.train, *config.rewards.heldout]:
        yield from _reward(reward, load)


def _model(key: str, folder: str) -> Iterator[Finding]:
    from ..models.checkpoint_files import check_weights
    from ..models.folders import ModelFolder

    try:
        parts = [p for p in sorted(ModelFolder.find(folder).path.iterdir()) if p.is_dir() and (p / "config.json").is_file()]
    except FileNotFoundError:
        return  # preflight has told
    for part in parts:
        if part.name in ("safety_checker", "image_encoder"):
            continue  # no part of training
        try:
            check_weights(part)
            yield ok("model", f"{key}: {part} can be read")
        except (ValueError, OSError) as error:
            yield fail("model", f"{key}: {error}")


def _reward(reward, load: bool) -> Iterator[Finding]:
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
            yield ok(
                "reward",
                f"{reward.name}: {', '.join(map(str, named)) or 'needs no file'}" + (" is there" if named else ""),
            )
        return
    try:
        build(reward.kind, reward.params)
        yield ok("reward", f"{reward.name}: loaded")
    except Exception as error:  # whatever a scorer raises: that is what the user came to hear
        said = " ".join(str(error).split())[:300]
        yield fail("reward", f"{reward.name} does not load: {type(error).__name__}: {said}")


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint's outer form, without reading its weights; None where nothing is."""
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


# -- the cluster's file -------------------------------------------------------------------


def on_file(config: Config, path: str) -> Iterator[Finding]:
    """Whether the run fits on the groups of a cluster file, and whether Ray takes the file."""
    try:
        cluster = read_cluster(path)
    except (FileNotFoundError, ValueError) as error:
        yield fail("cluster", str(error))
        return
    left = placeholders(path)
    if left:
        lines = ", ".join(map(str, left))
        yield warn("cluster", f"{path}: REPLACE_ME stands in line {lines}", "fill them in before use")
    for warning in cluster.warnings:
        yield warn("cluster", f"{path}: {warning}")
    yield from fit(config, cluster)


def fit(config: Config, cluster: Cluster) -> Iterator[Finding]:
    """Role by role: where it would lie with the cluster at its largest, and what has no place."""
    asks = demand.of_run(config)
    if not any(group.resources for group in cluster.groups):
        return
    offered = {kind for group in cluster.groups for kind in group.resources} & set(demand.ROLES)
    asked = {kind for ask in asks for kind in ask.resources}
    if offered and not offered & asked:
        yield warn(
            "cluster",
            f"its groups offer {', '.join(sorted(offered))}, and the run asks for none of them, so "
            "roles go wherever their CPUs and GPUs fit",
            "add resources.placement=roles",
        )
    used, short = place(asks, cluster)
    for text in problems(asks, cluster):
        yield fail("cluster", text)
    homeless = {s.ask.role for s in short}
    for role in dict.fromkeys(ask.role for ask in asks if ask.role not in homeless):
        mine = "; ".join(f"{ask.count} {ask.name} ({told(ask.resources)} each)" for ask in asks if ask.role == role)
        yield ok("cluster", f"{role}: {mine}: fits")
    for group in cluster.groups:
        if group.head:
            continue
        count = used[group.name]
        text = f"group {group.name}: {count} of at most {group.most} nodes used, {group.least} kept at all times"
        if group.least > count:
            yield warn("cluster", text, "lower its minimum: this run pays for nodes it does not use")
        else:
            yield ok("cluster", text)
    grows = demand.of_run(config, largest=True)
    if not short and grows != asks:
        for text in problems(grows, cluster):
            yield warn("cluster", f"with every scorer at its max_replicas: {text}")
    if any(not g.head and g.least < used[g.name] for g in cluster.groups) and not config.resources.autoscaling:
        yield warn(
            "cluster",
            "nodes come on demand, and resources.autoscaling is false: a run that is larger than "
            "the cluster is at its start is refused",
            "add resources.autoscaling=true",
        )
