"""The pool of workers that encoding and curation share, and the progress that both write into the run log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

#: How often a task is tried again after its worker died. A task that kills every worker must end the job.
RETRIES = 3


class WorkerPool:
    """Actors of the class ``worker`` that work through lists of tasks; they are killed when the ``with`` block ends.

    The actors start with the first task. Each has one task at a time. One that dies is restarted and repeats its task.
    ``places``: for each actor (Ray options, arguments of the constructor).
    """

    def __init__(self, worker: type, places: Sequence[tuple[dict[str, Any], tuple]]):
        self.worker, self.places = worker, places
        self.actors: list[Any] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def run(self, method: str, tasks: Mapping[str, tuple]) -> Iterator[tuple[str, Any]]:
        """(name, result) of each task, in the order in which they finish. ``tasks``: name -> arguments of ``method``.

        Raises what a task raised, and RuntimeError that names a task whose actors all died.
        """
        if tasks and not self.actors:
            remote: Any = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(self.worker)
            self.actors = [remote.options(**options).remote(*arguments) for options, arguments in self.places]
        waiting, idle = list(tasks.items())[::-1], list(self.actors)
        busy: dict[ray.ObjectRef, tuple[str, Any]] = {}
        while waiting or busy:
            while waiting and idle:
                (name, arguments), actor = waiting.pop(), idle.pop()
                busy[getattr(actor, method).remote(*arguments)] = name, actor
            (done,), _ = ray.wait(list(busy), num_returns=1)
            name, actor = busy.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                reason = "most likely for lack of memory, because it holds a whole shard: make shards smaller"
                raise RuntimeError(f"{name}: the worker died {RETRIES + 1} times, {reason} ({error})") from None
            idle.append(actor)
            yield name, result


class Progress:
    """Writes the number of finished shards and other ``counts``, "samples" among them, into the run log.

    The step of a record is the number of finished shards; with ``total`` it is the percentage that is done, and a
    record is written whenever it rises. ``done`` shards were finished before.
    """

    def __init__(self, log: Any, stage: str, total: int | None = None, done: int = 0, **counts: int):
        self.log, self.stage, self.total, self.done, self.counts = log, stage, total, done, counts
        self.before, self.begun, self.step = counts["samples"], time.time(), -1

    def add(self, **counts: int) -> None:
        """Count one more finished shard."""
        self.done += 1
        for name, count in counts.items():
            self.counts[name] += count
        step = self.done if self.total is None else 100 * self.done // self.total
        if step > self.step:
            self.step = step
            shards = {} if self.total is None else {"shards": self.done}
            rate = (self.counts["samples"] - self.before) / max(time.time() - self.begun, 1e-9)
            metrics = {"stage": self.stage, "step": step, **shards, **self.counts, "images_per_second": rate}
            self.log.append.remote("metrics", metrics)
