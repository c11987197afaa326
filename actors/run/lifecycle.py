"""The life of a run as a state machine: what follows from each loss, stop and signal. Pure: no Ray, no files.

The driver and its supervisor report events with ``Lifecycle.handle`` and carry out the action that it returns. Ranks
and roles report through the run-log actor, which keeps the first ``Stopped``; the driver reads it there.

Invariants:

1. ``Ended`` is final: every later event is answered with ``End`` and the same reason.
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
from dataclasses import dataclass, field

from rlproxi.config.sections import Faults

from ..rl.stops import Cause, Overdue, Stopped

#: Seconds that a role's reason for its stop may take to reach the log.
SILENT_S = 3.0


# -- states ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """No stage that can be tried again is under way."""


@dataclass(frozen=True)
class Running:
    """An attempt at ``stage`` is under way.

    first_step: the largest step that the stage had logged before it. replaced: roles were replaced during it.
    """

    stage: str
    first_step: int
    replaced: bool = False


@dataclass(frozen=True)
class Replacing:
    """The conductor and the weight store are made anew, while the ranks of ``attempt`` wait for them."""

    attempt: Running


@dataclass(frozen=True)
class Stopping:
    """The attempt at ``stage`` is over, and its remedy is being prepared."""

    stage: str


@dataclass(frozen=True)
class Leaving:
    """A signal asked the run to end; a checkpoint is being saved. ``since``: when, on the machine's clock."""

    reason: str
    since: float


@dataclass(frozen=True)
class Ended:
    """The run is over, with a reason for the user."""

    reason: str


State = Between | Running | Replacing | Stopping | Leaving | Ended

# -- events ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageBegan:
    """The first attempt at a stage begins. ``step``: the largest step that the stage has ever logged."""

    stage: str
    step: int = 0


@dataclass(frozen=True)
class StepReached:
    """The largest step that the stage has ever logged, whether a restart went behind it or not."""

    step: int


@dataclass(frozen=True)
class StageDone:
    """The stage's work returned."""


@dataclass(frozen=True)
class RolesLost:
    """The conductor or the weight store is lost, while the attempt's ranks wait for new ones."""

    reason: str


@dataclass(frozen=True)
class Replaced:
    """The new conductor and weight store are ready."""


@dataclass(frozen=True)
class AttemptStopped:
    """The attempt is over, because of this stop."""

    stop: Stopped


@dataclass(frozen=True)
class RanksFailed:
    """The attempt is over, because Ray Train gave up its ranks. ``error``: the last one's."""

    error: str


@dataclass(frozen=True)
class AttemptBegan:
    """The remedy is in place, and the stage is tried again."""


@dataclass(frozen=True)
class RoleAnswered:
    """``role`` answered. ``silent``: it has stopped, and the run log does not know why."""

    role: str
    silent: bool = False


@dataclass(frozen=True)
class RolePending:
    """``role`` was asked whether it is alive, and has not answered yet."""

    role: str


@dataclass(frozen=True)
class LeaveAsked:
    """A signal asked the run to end; reported at every look from then on.

    since: when it came, on the machine's clock. can_save: a conductor can end the stage with a checkpoint.
    """

    signal: str
    since: float
    can_save: bool


Event = (
    StageBegan
    | StepReached
    | StageDone
    | RolesLost
    | Replaced
    | AttemptStopped
    | RanksFailed
    | AttemptBegan
    | RoleAnswered
    | RolePending
    | LeaveAsked
)

# -- actions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proceed:
    """Nothing has to be done."""


@dataclass(frozen=True)
class ReplaceRoles:
    """Warn, close conductor and weight store and make new ones; then report ``Replaced``, or ``RolesLost`` again."""

    warning: str


@dataclass(frozen=True)
class TryAgain:
    """Warn, and run the stage's work again from the last checkpoint, with new roles where they are gone."""

    warning: str


@dataclass(frozen=True)
class TrySmaller:
    """Halve the micro-batch and run the stage's work again, with new roles."""

    reason: str


@dataclass(frozen=True)
class DeclareLost:
    """Tell everybody of ``stop``. ``kill``: the role hangs, so kill it."""

    role: str
    stop: Stopped
    kill: bool


@dataclass(frozen=True)
class AskToSave:
    """Ask the conductor to end the stage with a checkpoint."""

    reason: str


@dataclass(frozen=True)
class End:
    """End the run with a reason for the user."""

    reason: str


Action = Proceed | ReplaceRoles | TryAgain | TrySmaller | DeclareLost | AskToSave | End


def leave_reason(signal: str) -> str:
    """The message of a run that ends because of ``signal``."""
    return f"asked to end by {signal}; go on with --resume and the run's directory"


# -- the machine ----------------------------------------------------------------------------


@dataclass
class Lifecycle:
    """Decides what a run does next; see the module.

    Args:
        faults: the limits that the config sets.
        max_failures: how often Ray Train restarts the ranks within an attempt, for its message.
        clock: seconds; only differences count.
    """

    faults: Faults
    max_failures: int
    clock: Callable[[], float] = time.monotonic
    state: State = Between()
    step: int = 0  #: the largest step that the stage has logged
    losses: int = 0  #: since that step
    pending: dict[str, Overdue] = field(default_factory=dict)  #: role -> whether its answer is overdue
    silent: dict[str, Overdue] = field(default_factory=dict)  #: role -> whether the reason for its stop is overdue

    def handle(self, event: Event) -> Action:
        """Takes an event; returns what has to be done now."""
        if isinstance(self.state, Ended):
            return End(self.state.reason)
        action = self._decide(event)
        if isinstance(action, End):
            self.state = Ended(action.reason)
        return action

    def _decide(self, event: Event) -> Action:
        if isinstance(event, LeaveAsked):
            return self._leave(event)
        if isinstance(event, (RoleAnswered, RolePending)):
            return self._look_at(event)
        if isinstance(event, StepReached):
            if event.step > self.step:
                self.step, self.losses = event.step, 0
            return Proceed()
        if isinstance(self.state, Leaving) and isinstance(event, (StageBegan, RolesLost, AttemptStopped, RanksFailed)):
            stop = event.stop if isinstance(event, AttemptStopped) else Stopped(self.state.reason)
            return End(stop.reason if stop.cause is Cause.ENDED else self.state.reason)
        if isinstance(event, StageBegan):
            self.step, self.losses, self.state = event.step, 0, Running(event.stage, event.step)
        elif isinstance(event, RolesLost):
            return self._replace(event.reason)
        elif isinstance(event, AttemptStopped):
            return self._remedy(event.stop)
        elif isinstance(event, RanksFailed):
            return self._after_failure(event.error)
        elif isinstance(event, AttemptBegan) and isinstance(self.state, Stopping):
            self.state = Running(self.state.stage, self.step)
        elif isinstance(event, Replaced) and isinstance(self.state, Replacing):
            self.state = Running(self.state.attempt.stage, self.state.attempt.first_step, replaced=True)
            self.pending.clear()
            self.silent.clear()
        elif isinstance(event, StageDone):
            self.state = Between()
        return Proceed()

    def _count_loss(self, reason: str) -> str | None:
        """The warning for one more lost role; None where it was one too many."""
        self.losses += 1
        if self.losses > self.faults.max_restarts:
            return None
        return f"{reason}: going on with new ones, from the last checkpoint ({self.losses} of faults.max_restarts)"

    def _replace(self, reason: str) -> Action:
        attempt = self.state.attempt if isinstance(self.state, Replacing) else self.state
        warning = self._count_loss(reason) if isinstance(attempt, Running) else None
        if warning is None or not isinstance(attempt, Running):
            return End(reason)
        self.state = Replacing(attempt)
        return ReplaceRoles(warning)

    def _remedy(self, stop: Stopped) -> Action:
        attempt = self.state.attempt if isinstance(self.state, Replacing) else self.state
        if stop.cause is Cause.ENDED or not isinstance(attempt, (Running, Stopping)):
            return End(stop.reason)
        self.state = Stopping(attempt.stage)
        if stop.cause is Cause.OUT_OF_MEMORY:
            return TrySmaller(stop.reason)
        warning = self._count_loss(stop.reason)
        return End(stop.reason) if warning is None else TryAgain(warning)

    def _after_failure(self, error: str) -> Action:
        attempt = self.state
        words = f"the learner failed ({error})"
        if not isinstance(attempt, Running):
            return End(words)
        words = f"{attempt.stage}: {words}"
        if self.step > attempt.first_step or attempt.replaced:
            self.state = Stopping(attempt.stage)
            return TryAgain(f"{words}: going on from the last checkpoint, since step {self.step} was reached meanwhile")
        return End(
            f"{words} in {self.max_failures + 1} attempts without a new step after {attempt.first_step} "
            "(learner.max_failures); once its cause is mended, go on with --resume"
        )

    def _look_at(self, event: RoleAnswered | RolePending) -> Action:
        role, hang_s = event.role, self.faults.hang_timeout_s
        hangs = self.pending.setdefault(role, Overdue(hang_s, self.clock))(isinstance(event, RolePending))
        if hangs:
            words = f"the {role} has not answered for {hang_s:g} s (faults.hang_timeout_s)"
            return DeclareLost(role, Stopped(words, Cause.LOST), kill=True)
        if isinstance(event, RoleAnswered):
            overdue = self.silent.setdefault(role, Overdue(SILENT_S, self.clock))
            if overdue(event.silent):
                words = f"the {role} has stopped, and its reason was lost with the log's writer"
                return DeclareLost(role, Stopped(words, Cause.LOST), kill=False)
        return Proceed()

    def _leave(self, event: LeaveAsked) -> Action:
        reason = leave_reason(event.signal)
        if not event.can_save or self.clock() - event.since > self.faults.grace_s:
            return End(reason)
        if isinstance(self.state, Leaving):
            return Proceed()
        self.state = Leaving(reason, event.since)
        return AskToSave(reason)
