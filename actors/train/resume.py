"""Whether a resumed run repeats the unbroken run bit for bit, and if not, why. Pure."""

from __future__ import annotations

from typing import Any

from rlproxi.config.loading import Config

#: Keys that the numbers of a run do not depend on, in sections that they depend on.
_BESIDE = {"checkpoint_every", "log_every", "keep_checkpoints", "max_checkpoint_failures", "max_failures"}
_BESIDE |= {"replicas", "timeout_s", "retries"}
#: The keys of resources that reach the arithmetic.
_RESOURCES = {"learner_workers", "threads"}
#: Keys that change the order in which sums are rounded.
_ORDER = {"resources.learner_workers", "resources.threads", "learner.zero_stage", "device"}


def circumstances(config: Config, stage: str, device: str, versions: dict[str, str]) -> dict[str, Any]:
    """Name -> value of everything that a stage's numbers depend on. ``device``: cpu or a GPU's name."""
    own = {stage} if stage == "pretrain" else config.algorithm_parts
    sections = {"data", "model", "schedule", "sampler", "rewards", "learner", "resources", *own}
    found = {"run.seed": config.run.seed}
    for name, values in config.model_dump(mode="json").items():
        if name in sections:
            found.update({key: value for key, value in _flat(name, values).items() if _matters(key)})
    return {**found, "device": device, **versions}


def _matters(key: str) -> bool:
    first, last = key.split(".")[0], key.split(".")[-1]
    return last in _RESOURCES if first == "resources" else last not in _BESIDE


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {inner: v for key, part in value.items() for inner, v in _flat(f"{name}.{key}", part).items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def reasons(then: dict[str, Any], now: dict[str, Any], asynchronous: bool = False) -> list[str]:
    """The reasons why a resumed run is not exact; empty where it is.

    ``then``, ``now``: ``circumstances`` of the checkpoint and of the run that goes on from it. ``asynchronous``:
    whether groups may be sampled by weights older than those they train.
    """
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    found = [f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}" for key in changed[:4]]
    if len(changed) > 4:
        found.append(f"{len(changed) - 4} other settings have changed")
    if _ORDER & set(changed):
        found.append("sums are rounded in another order")
    if now.get("device") != "cpu":
        found.append("a GPU's kernels do not add in one order")
    if asynchronous:
        found.append("groups that were in flight are sampled again, by newer weights")
    return found


def sentence(stage: str, step: int, steps: int, why: list[str]) -> str:
    """The note that a resumed stage logs. ``why``: see ``reasons``."""
    exact = f"not bit for bit the unbroken run: {'; '.join(why)}" if why else "bit for bit the unbroken run"
    return f"{stage}: goes on from step {step} of {steps}, {exact}"
