"""The driver's eyes on a stage: progress bars, what is said aloud, actors that no longer answer, and signals to end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from rlproxi.errors import RunStopped

from ..rl.stops import LOST

#: Seconds between two looks at a stage.
_EVERY = 0.5
#: A role's word of why it has stopped may be so late.
_SILENT_S = 3.0


class Leaving:
    """SIGTERM and SIGINT while a run goes on: the first asks it to save and end, a second ends it at once.

    A context manager; does nothing outside a process's main thread, where Python allows no handlers.

    Args:
        grace_s: how long the iteration under way and its checkpoint may take, in seconds.
    """

    def __init__(self, grace_s: float):
        self.grace_s = grace_s
        self.name: str | None = None  # of the signal
        self.since = 0.0
        self.watched = False  # somebody looks at ``name`` soon

    def __enter__(self) -> Leaving:
        main = threading.current_thread() is threading.main_thread()
        self.replaced = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.replaced.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name, self.since = signal.Signals(number).name, time.monotonic()
        if not self.watched:
            raise RunStopped(self.reason)
        print(
            f"\n{self.name}: saving a checkpoint, for at most {self.grace_s:g} s (faults.grace_s); once more ends at once",
            flush=True,
        )

    @property
    def reason(self) -> str:
        return f"asked to end by {self.name}; go on with --resume and the run's directory"


class Watch:
    """Looks after a stage's work while it goes on in a thread.

    Args:
        scribe: knows the stage's progress and whether the run is to stop.
        roles: name -> handle of actors with a method ``alive``; one that does not answer for ``hang_timeout_s`` is killed
            and the stage stopped with the kind ``LOST``.
        leaving: the signals. saves: the stage writes a checkpoint when the role "conductor" is asked to leave; others are
            left at once.
        replace: reason -> new roles; for a stage whose work goes on by itself once lost roles are there again.
    """

    def __init__(
        self,
        scribe: Any,
        roles: dict[str, Any],
        hang_timeout_s: float,
        leaving: Leaving,
        saves: bool = False,
        replace: Callable[[str], dict[str, Any]] | None = None,
    ):
        self.scribe, self.roles, self.hang_timeout_s = scribe, roles, hang_timeout_s
        self.leaving, self.saves, self.replace = leaving, saves, replace
        self.asked: dict[str, tuple[ray.ObjectRef, float]] = {}
        self.left = False
        self.silent: dict[str, float] = {}  # role -> since when

    def over(self, work: Callable[[], Any], bars: list[tuple[str, int]] = [], shown: str | None = None) -> Any:
        """What ``work`` returns. Prints what is said meanwhile and draws a bar for each (name in the scribe's progress,
        number of steps), with the metric ``shown`` beside it. Raises what ``work`` raised; RunStopped where the run was
        stopped or left."""
        outcome: dict = {}

        def target() -> None:
            try:
                outcome["value"] = work()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=target, daemon=True)
        self.leaving.watched = True
        try:
            thread.start()
            self._until_done(thread, outcome, bars, shown)
        finally:
            self.leaving.watched = False
        reason = ray.get(self.scribe.stop_reason.remote())
        if reason:
            raise RunStopped(reason)
        if "error" in outcome:
            raise outcome["error"]
        return outcome.get("value")

    def _until_done(
        self, thread: threading.Thread, outcome: dict, bars: list[tuple[str, int]], shown: str | None
    ) -> None:
        from tqdm import tqdm

        drawn = [(name, tqdm(total=total, desc=name, unit="step", mininterval=1.0)) for name, total in bars]
        while thread.is_alive():
            thread.join(_EVERY)
            for name, bar in drawn:
                newest = ray.get(self.scribe.progress.remote(name))
                if newest and newest["step"] > bar.n:
                    bar.update(newest["step"] - bar.n)
                    if shown and newest.get(shown) is not None:
                        bar.set_postfix_str(f"{shown} {newest[shown]:.4f}")
            self._relay()
            self._look_for_hangs()
            self._replace()
            self._leave()
        self._relay()  # what was said last
        for _, bar in drawn:
            if "error" not in outcome:
                bar.update(bar.total - bar.n)
            bar.close()

    def _relay(self) -> None:
        """Prints what roles said to the user: notes to stdout, warnings to stderr."""
        from tqdm import tqdm

        for event, message in ray.get(self.scribe.hear.remote()):
            loud = event == "warning"
            stream = sys.stderr if loud else sys.stdout
            tqdm.write(f"warning: {message}" if loud else message, file=stream)
            stream.flush()

    def _look_for_hangs(self) -> None:
        for name, handle in list(self.roles.items()):
            answer, since = self.asked.get(name) or (handle.alive.remote(), time.monotonic())
            self.asked[name] = (answer, since)
            if ray.wait([answer], timeout=0)[0]:
                del self.asked[name]
                self._look_for_silence(name, answer)
            elif time.monotonic() - since > self.hang_timeout_s and not ray.wait([answer], timeout=1)[0]:
                # Once more before, because it may be this process that stood still.
                del self.roles[name]
                told = f"the {name} has not answered for {self.hang_timeout_s:g} s (faults.hang_timeout_s)"
                ray.get(self.scribe.stop.remote(told, LOST))
                ray.kill(handle)
                if "conductor" in self.roles:  # ends the wait of the learner, which would not notice
                    self.roles["conductor"].stop.remote(told, LOST)

    def _look_for_silence(self, name: str, answer: ray.ObjectRef) -> None:
        """A role that has stopped has told the scribe why; unless that died with what it had been told."""
        with contextlib.suppress(RayError):  # that it is dead others notice
            if ray.get(answer) or ray.get(self.scribe.stop_reason.remote()) is not None:
                self.silent.pop(name, None)
            elif time.monotonic() - self.silent.setdefault(name, time.monotonic()) > _SILENT_S:
                ray.get(
                    self.scribe.stop.remote(f"the {name} has stopped, and why was lost with the log's writer", LOST)
                )

    def _replace(self) -> None:
        if self.replace is not None and ray.get(self.scribe.stop_kind.remote()) == LOST:
            self.roles = self.replace(ray.get(self.scribe.stop_reason.remote()))
            self.asked.clear()

    def _leave(self) -> None:
        """Where a signal asked for it: has the conductor end the stage, and gives up waiting after the grace."""
        if self.leaving.name is None:
            return
        conductor = self.roles.get("conductor") if self.saves else None
        if conductor is None or time.monotonic() - self.leaving.since > self.leaving.grace_s:
            raise RunStopped(self.leaving.reason)
        if not self.left:
            self.left = True
            conductor.leave.remote(self.leaving.reason)
