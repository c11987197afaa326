"""The driver's watch over a stage: progress bars, announcements, actors that do not answer, and signals to end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.exceptions import RayError

from rlproxi.errors import RunStopped

from ..rl.stops import Cause, Stop
from .lifecycle import DeclareLost, End, Event, LeaveAsked, Leaving, Lifecycle, RoleAsked, leave_reason

#: Seconds between two looks at a stage.
_EVERY = 0.5

#: name -> handle of an actor with a method ``alive``.
Roles = dict[str, Any]


class Signals:
    """SIGTERM and SIGINT while a run goes on: the first asks it to save and end, a second ends it at once.

    A context manager; does nothing outside a process's main thread, where Python allows no handlers.

    Args:
        grace_s: how long the iteration under way and its checkpoint may take, in seconds, for its message.
    """

    def __init__(self, grace_s: float):
        self.grace_s = grace_s
        self.name: str | None = None  # of the signal that came
        self.since = 0.0
        self.watched = False  # a supervisor looks at ``name`` soon
        self.replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.replaced = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.replaced.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name, self.since = signal.Signals(number).name, time.monotonic()
        if not self.watched:
            raise RunStopped(leave_reason(self.name))
        words = f"saving a checkpoint, for at most {self.grace_s:g} s (faults.grace_s); once more ends at once"
        print(f"\n{self.name}: {words}", flush=True)


class Supervisor:
    """Watches a stage's work, which runs in a thread, and carries out what the lifecycle decides meanwhile.

    Args:
        log: the run-log actor.
        roles: actors that the stage needs; see ``Roles``.
        replace: reason -> new roles, after a loss; for a stage whose ranks wait for them, and which saves a checkpoint
            when the role "conductor" is asked to leave. Other stages end when a role is lost, and are left at once.
    """

    def __init__(
        self,
        log: Any,
        roles: Roles,
        lifecycle: Lifecycle,
        signals: Signals,
        replace: Callable[[str], Roles] | None = None,
    ):
        self.log, self.roles, self.lifecycle = log, dict(roles), lifecycle
        self.signals, self.replace = signals, replace
        self.asked: dict[str, ray.ObjectRef] = {}  # role -> its answer to come

    def watch(self, work: Callable[[], Any], bars: Sequence[tuple[str, int]] = (), shown: str | None = None) -> Any:
        """Returns what ``work`` returns. Prints announcements meanwhile and draws the progress bars.

        Args:
            bars: (stage in the run log, number of steps) of each bar.
            shown: the metric beside a bar.

        Raises what ``work`` raised, and RunStopped where the run was stopped or asked to end.
        """
        outcome: Future[Any] = Future()

        def target() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        self.signals.watched = True
        try:
            threading.Thread(target=target, daemon=True).start()
            self._until_done(outcome, bars, shown)
        finally:
            self.signals.watched = False
        stop = self._stop_state()
        if stop is not None:
            raise RunStopped(stop.reason)
        return outcome.result()

    def _until_done(self, outcome: Future[Any], bars: Sequence[tuple[str, int]], shown: str | None) -> None:
        from tqdm import tqdm

        drawn = [(name, tqdm(total=total, desc=name, unit="step", mininterval=1.0)) for name, total in bars]
        while not outcome.done():
            wait([outcome], _EVERY)
            for name, bar in drawn:
                newest = ray.get(self.log.progress.remote(name))
                if newest and newest["step"] > bar.n:
                    bar.update(newest["step"] - bar.n)
                    if shown and newest.get(shown) is not None:
                        bar.set_postfix_str(f"{shown} {newest[shown]:.4f}")
            self._print_announcements()
            for name in list(self.roles):
                self._look_at(name)
            if self.replace is not None:
                self._replace_lost_roles(self.replace)
            if self.signals.name is not None:
                can_save = self.replace is not None and "conductor" in self.roles
                self._report(LeaveAsked(self.signals.name, self.signals.since, can_save))
        self._print_announcements()
        for _, bar in drawn:
            if outcome.exception() is None:
                bar.update((bar.total or 0) - bar.n)
            bar.close()

    def _print_announcements(self) -> None:
        """Notes go to stdout, warnings to stderr."""
        from tqdm import tqdm

        for event, message in ray.get(self.log.take_announcements.remote()):
            warning = event == "warning"
            stream = sys.stderr if warning else sys.stdout
            tqdm.write(f"warning: {message}" if warning else message, file=stream)
            stream.flush()

    def _stop_state(self) -> Stop | None:
        return ray.get(self.log.stop_state.remote())

    def _look_at(self, name: str) -> None:
        """Asks a role whether it is alive, and reports its answer or that there is none yet."""
        if name not in self.asked:
            self.asked[name] = self.roles[name].alive.remote()
        answer = self.asked[name]
        if not ray.wait([answer], timeout=0)[0]:
            return self._report(RoleAsked(name, answered=False))
        del self.asked[name]
        silent = False
        with contextlib.suppress(RayError):  # that a role is dead is noticed by those who call it
            silent = not ray.get(answer) and self._stop_state() is None
        self._report(RoleAsked(name, True, silent))

    def _report(self, event: Event) -> None:
        """Reports an event to the lifecycle, and carries out what it decides."""
        action = self.lifecycle.handle(event)
        if isinstance(action, End):
            raise RunStopped(action.reason)
        if isinstance(action, Leaving):
            self.roles["conductor"].leave.remote(action.reason)
        elif isinstance(action, DeclareLost):
            # A hang is looked at once more, because it may be this process that stood still.
            if action.kill and ray.wait([self.asked[action.role]], timeout=1)[0]:
                return
            ray.get(self.log.stop.remote(action.stop.reason, action.stop.cause))
            if action.kill:
                ray.kill(self.roles.pop(action.role))
                if "conductor" in self.roles:  # ends the wait of the learner, which would not notice
                    self.roles["conductor"].stop.remote(action.stop.reason, action.stop.cause)

    def _replace_lost_roles(self, replace: Callable[[str], Roles]) -> None:
        stop = self._stop_state()
        if stop is not None and stop.cause is Cause.LOST:
            self.roles = dict(replace(stop.reason))
            self.asked.clear()
