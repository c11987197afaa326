"""A run's lifecycle as a state machine: what follows from each loss, stop and signal. Pure: no Ray, no files.

The driver and its supervisor report events with ``Lifecycle.handle`` and carry out the action that it returns. Ranks
and roles report through the run-log actor, which keeps the first ``Stop``; the driver reads it there.

Invariants:

1. ``End`` is final: every later event is answered with ``End`` and the same reason.
2. Without a new step, lost roles are replaced at most ``faults.max_restarts`` times. The next loss ends the run.
3. Ranks that Ray Train gave up are started again only if their attempt reached a new step or had roles replaced.
4. A run that was asked to leave starts nothing again. It asks the conductor to save once, and ends after
   ``faults.grace_s``.
5. A role is killed only after ``faults.hang_timeout_s`` without an answer. One that says it has stopped, while the log
   holds no reason, counts as lost after ``SILENT_S``.
6. Out of memory always leads to a smaller micro-batch and is not counted as a loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rlproxi.config.sections import Faults

from ..rl.stops import Cause, Overdue, Stop

#: Seconds that a role's reason for its stop may take to reach the log.
SILENT_S = 3.0


@dataclass(frozen=True)
class _Reason:
    reason: str


# -- states ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """No attempt at a stage is under way."""


@dataclass(frozen=True)
class Running:
    """An attempt at a stage. first_step: the largest step logged before it. replaced: roles were replaced during it."""

    first_step: int
    replaced: bool = False


class Leaving(_Reason):
    """A signal asked the run to end. A state, and the action: ask the conductor to end the stage with a checkpoint."""


class End(_Reason):
    """The run is over, with a reason for the user. A state, and the action that leads to it."""


State = Between | Running | Leaving | End

# -- events, besides ``Stop``: the attempt is over -------------------------------------------


@dataclass(frozen=True)
class AttemptBegan:
    """An attempt at a stage begins. ``step``: the largest step that the stage has ever logged."""

    stage: str
    step: int = 0


@dataclass(frozen=True)
class StepReached:
    """The largest step that the stage has ever logged, whether a restart went behind it or not."""

    step: int


class RolesLost(_Reason):
    """The conductor or the weight store is lost, while the attempt's ranks wait for new ones."""


class AttemptFailed(_Reason):
    """The attempt is over, because Ray Train gave up its ranks. ``reason``: the last one's error."""


@dataclass(frozen=True)
class RoleAsked:
    """A role was asked whether it is alive. silent: it answered that it stopped, and the run log does not know why."""

    role: str
    answered: bool
    silent: bool = False


@dataclass(frozen=True)
class LeaveAsked:
    """A signal asked the run to end; reported at every look from then on.

    since: when it came, on the machine's clock. can_save: a conductor can end the stage with a checkpoint.
    """

    signal: str
    since: float
    can_save: bool


Event = Stop | AttemptBegan | StepReached | RolesLost | AttemptFailed | RoleAsked | LeaveAsked

# -- actions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proceed:
    """Nothing has to be done."""


@dataclass(frozen=True)
class GoOn:
    """Warn, replace what is lost, and go on from the last checkpoint. smaller: with half the micro-batch."""

    warning: str
    smaller: bool = False


@dataclass(frozen=True)
class DeclareLost:
    """Report ``stop`` to all. kill: the role hangs, so kill it."""

    role: str
    stop: Stop
    kill: bool


Action = Proceed | GoOn | DeclareLost | Leaving | End


def leave_reason(signal: str) -> str:
    """The message of a run that ends because of ``signal``."""
    return f"asked to end by {signal}; go on with --resume and the run's directory"


# -- the machine ----------------------------------------------------------------------------


@dataclass
class Lifecycle:
    """Decides what a run does next; see the module.

    Args:
        faults: the limits that the config sets.
        max_failures: how often Ray Train restarts the ranks within an attempt, for a message.
        clock: seconds; only differences count.
    """

    faults: Faults
    max_failures: int
    clock: Callable[[], float] = time.monotonic
    state: State = Between()
    stage: str = ""  #: the last one that was tried
    step: int = 0  #: the largest step that the stage has logged
    losses: int = 0  #: since that step
    pending: dict[str, Overdue] = field(default_factory=dict)  #: role -> whether its answer is overdue
    silent: dict[str, Overdue] = field(default_factory=dict)  #: role -> whether the reason for its stop is overdue

    def handle(self, event: Event) -> Action:
        """Takes an event; returns what has to be done now."""
        if isinstance(self.state, End):
            return self.state
        action = self._decide(event)
        if isinstance(action, End):
            self.state = action
        return action

    def _decide(self, event: Event) -> Action:
        if isinstance(event, LeaveAsked):
            return self._leave(event)
        if isinstance(event, RoleAsked):
            return self._look_at(event)
        if isinstance(event, StepReached):
            if event.step > self.step:
                self.step, self.losses = event.step, 0
            return Proceed()
        if isinstance(self.state, Leaving):
            if isinstance(event, Stop) and event.cause is Cause.ENDED:
                return End(event.reason)
            return End(self.state.reason)
        if isinstance(event, AttemptBegan):
            if event.stage != self.stage:
                self.stage, self.step, self.losses = event.stage, event.step, 0
            self.state = Running(event.step)
            return Proceed()
        if isinstance(event, AttemptFailed):
            return self._after_failure(event.reason)
        if isinstance(event, Stop):
            self.state = Between()
            if event.cause is Cause.ENDED:
                return End(event.reason)
            if event.cause is Cause.OUT_OF_MEMORY:
                return GoOn(event.reason, smaller=True)
        return self._after_loss(event.reason)

    def _after_loss(self, reason: str) -> Action:
        self.losses += 1
        if self.losses > self.faults.max_restarts:
            return End(reason)
        if isinstance(self.state, Running):
            self.state = replace(self.state, replaced=True)
        self.pending.clear()
        self.silent.clear()
        count = f"{self.losses} of faults.max_restarts"
        return GoOn(f"{reason}: going on with new ones, from the last checkpoint ({count})")

    def _after_failure(self, error: str) -> Action:
        attempt, words = self.state, f"{self.stage}: the learner failed ({error})"
        if not isinstance(attempt, Running):
            return End(words)
        if self.step > attempt.first_step or attempt.replaced:
            self.state = Between()
            return GoOn(f"{words}: going on from the last checkpoint, since step {self.step} was reached meanwhile")
        return End(
            f"{words} in {self.max_failures + 1} attempts without a new step after {attempt.first_step} "
            "(learner.max_failures); once its cause is mended, go on with --resume"
        )

    def _look_at(self, event: RoleAsked) -> Action:
        role, hang_s = event.role, self.faults.hang_timeout_s
        if self.pending.setdefault(role, Overdue(hang_s, self.clock))(not event.answered):
            words = f"the {role} has not answered for {hang_s:g} s (faults.hang_timeout_s)"
            return DeclareLost(role, Stop(words, Cause.LOST), kill=True)
        if event.answered and self.silent.setdefault(role, Overdue(SILENT_S, self.clock))(event.silent):
            words = f"the {role} has stopped, and its reason was lost with the log's writer"
            return DeclareLost(role, Stop(words, Cause.LOST), kill=False)
        return Proceed()

    def _leave(self, event: LeaveAsked) -> Action:
        reason = leave_reason(event.signal)
        if not event.can_save or self.clock() - event.since > self.faults.grace_s:
            return End(reason)
        if isinstance(self.state, Leaving):
            return Proceed()
        self.state = Leaving(reason)
        return self.state
