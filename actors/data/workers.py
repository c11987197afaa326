"""The pool of workers that encoding and curation share, and the progress that both write into the run log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

#: How often a task is tried again after its worker died. A task that kills every worker must end the job.
RETRIES = 3


class WorkerPool:
    """Actors of one class that work through lists of tasks; they are killed when the ``with`` block ends.

    The actors start with the first task. Each has one task at a time, so that at most one task per actor is in flight.
    An actor that dies is restarted and repeats its task.

    Args:
        worker: the class of the actors, without Ray's decorator.
        places: for each actor (Ray options, arguments of the constructor).
    """

    def __init__(self, worker: type, places: Sequence[tuple[dict[str, Any], tuple]]):
        self.kind, self.places = worker, places
        self.actors: list[Any] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def run(self, method: str, tasks: Mapping[str, tuple]) -> Iterator[tuple[str, Any]]:
        """(name, result) of each task, in the order in which they finish. Tasks start in their own order.

        Args:
            method: the actors' method that does a task.
            tasks: name -> arguments of the method.

        Raises what a task raised, and RuntimeError that names a task whose actors all died.
        """
        if tasks and not self.actors:
            remote: Any = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(self.kind)
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
                raise RuntimeError(
                    f"{name}: the worker died {RETRIES + 1} times on this shard, most likely for lack of memory: a "
                    f"shard's rows are held in memory until they are written; make shards smaller ({error})"
                ) from None
            idle.append(actor)
            yield name, result


class Progress:
    """Counts finished shards and their samples, and writes both into the run log as metrics of ``stage``.

    Args:
        total: shards of the stage. The metrics' step is then the percentage that is done, and a record is written
            whenever it rises. Without it the step is the number of finished shards.
        done: shards that were finished before.
        counts: what is counted beside shards, from these numbers on; "samples" must be among them.
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
