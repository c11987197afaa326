"""A run's lifecycle: its invariants under random schedules, and the sequences that driver and supervisor rely on."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rl.stops import Cause, Overdue, Stop
from actors.run import lifecycle as life
from actors.run.lifecycle import End, Lifecycle, Proceed
from rlproxi.config.sections import Faults

MAX_RESTARTS, HANG_S, GRACE_S = 2, 10.0, 20.0


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def machine(clock=None, **faults) -> Lifecycle:
    limits = {"max_restarts": MAX_RESTARTS, "hang_timeout_s": HANG_S, "grace_s": GRACE_S, **faults}
    return Lifecycle(Faults(**limits), max_failures=3, clock=clock or Clock())


FAILED, LOST = life.AttemptFailed("ValueError: boom"), Stop("the weight store is lost", Cause.LOST)
NO_MEMORY = Stop("learner: out of memory", Cause.OUT_OF_MEMORY)


# -- random schedules -----------------------------------------------------------------------


class Driver:
    """Reports what could happen next in the machine's state, and checks each answer against the invariants."""

    def __init__(self, dice: random.Random):
        self.dice, self.clock = dice, Clock()
        self.run = machine(self.clock)
        self.stage, self.step, self.tried = "rl", 0, ""  # tried: the stage of the last attempt
        self.first_step, self.replaced = 0, False  # of the attempt
        self.retries = self.losses = 0  # since the last new step
        self.asked_to_leave: float | None = None
        self.saves_asked = 0
        self.since: dict[tuple[str, str], float] = {}  # (role, pending or silent) -> since when

    def event(self) -> life.Event:
        """One that driver or supervisor could report now."""
        role = self.dice.choice(["conductor", "weight store"])
        leave = self.clock() if self.asked_to_leave is None else self.asked_to_leave
        if self.dice.random() < 0.02:
            return self.dice.choice([life.LeaveAsked("SIGTERM", leave, self.dice.random() < 0.9), Stop("NaN")])
        if isinstance(self.run.state, life.Between):
            return self.dice.choice([life.AttemptBegan(self.stage, self.step), LOST])
        going_on = [
            life.StepReached(self.dice.randint(0, self.step + 1)),
            life.RolesLost("the weight store is lost"),
            LOST,
            NO_MEMORY,
            FAILED,
            life.RoleAsked(role, answered=False),
            life.RoleAsked(role, answered=False),
            life.RoleAsked(role, answered=True, silent=self.dice.random() < 0.5),
        ]
        if self.asked_to_leave is not None:
            going_on += [life.LeaveAsked("SIGTERM", leave, True), life.AttemptBegan("rl", self.step)]
        elif self.dice.random() < 0.02:
            self.stage += "+"  # the stage was done, and the next begins
            return life.AttemptBegan(self.stage, self.step)
        return self.dice.choice(going_on)

    def look(self) -> None:
        self.clock.now += self.dice.choice([0.0, 0.5, self.dice.uniform(0, 15)])
        event, before = self.event(), self.run.state
        action = self.run.handle(event)
        if not isinstance(before, life.End):
            self.note(event, before, action)
        self.check(event, before, action)

    def note(self, event: life.Event, before: life.State, action: life.Action) -> None:
        if isinstance(event, life.StepReached) and event.step > self.step:
            self.step, self.retries, self.losses = event.step, 0, 0
        elif isinstance(event, life.AttemptBegan):
            self.first_step, self.replaced = self.step, False
            if event.stage != self.tried:
                self.tried, self.retries, self.losses = event.stage, 0, 0
        elif isinstance(event, life.LeaveAsked):
            self.asked_to_leave = event.since
        elif isinstance(event, life.RoleAsked):
            for kind, holds in (("pending", not event.answered), ("silent", event.silent)):
                if holds:
                    self.since.setdefault((event.role, kind), self.clock())
                elif event.answered:
                    self.since.pop((event.role, kind), None)

    def check(self, event: life.Event, before: life.State, action: life.Action) -> None:
        after = self.run.state
        if isinstance(before, life.End):
            assert action == End(before.reason) and after == before, "the end is final"
            return
        assert isinstance(after, life.End) == isinstance(action, End)
        assert not isinstance(action, End) or action.reason, "every end has its reason"
        if isinstance(before, life.Leaving):
            assert isinstance(action, (Proceed, End, life.DeclareLost)), "whoever leaves starts nothing again"
            assert not isinstance(event, life.AttemptBegan) or isinstance(action, End)
            if isinstance(event, life.LeaveAsked) and self.clock() - event.since > GRACE_S:
                assert isinstance(action, End)
            if not isinstance(action, life.DeclareLost):
                return
        if isinstance(event, (Stop, life.AttemptFailed)):
            assert isinstance(after, (life.Between, life.End)), "the attempt is over"
        if event == NO_MEMORY:
            assert action == life.GoOn(NO_MEMORY.reason, smaller=True)
        elif isinstance(event, life.AttemptFailed) and isinstance(before, life.Running):
            assert isinstance(action, life.GoOn) == (self.step > self.first_step or self.replaced)
            self.retries += 1
        elif event == LOST or isinstance(event, life.RolesLost):
            self.losses, self.retries = self.losses + 1, self.retries + 1
            assert isinstance(action, life.GoOn) == (self.losses <= MAX_RESTARTS)
            self.replaced |= isinstance(event, life.RolesLost)
            self.since.clear()
        assert not isinstance(action, life.GoOn) or self.retries <= 2 * MAX_RESTARTS + 1, "it comes to an end"
        self.saves_asked += isinstance(action, life.Leaving)
        assert self.saves_asked <= 1
        if isinstance(action, life.DeclareLost):
            kind, limit = ("pending", HANG_S) if action.kill else ("silent", life.SILENT_S)
            assert self.clock() - self.since[action.role, kind] > limit and action.stop.cause is Cause.LOST


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32 - 1), looks=st.integers(1, 200))
def test_the_invariants_hold_under_any_schedule(seed, looks):
    driver = Driver(random.Random(seed))
    for _ in range(looks):
        driver.look()


def test_the_schedules_reach_every_state_and_action():
    states, actions = set(), set()
    for seed in range(200):
        driver = Driver(random.Random(seed))
        handle = driver.run.handle

        def noting(event, handle=handle):
            action = handle(event)
            actions.add(type(action))
            return action

        driver.run.handle = noting
        for _ in range(150):
            driver.look()
            states.add(type(driver.run.state))
    assert states == set(life.State.__args__) and actions == set(life.Action.__args__)


# -- a stage and its attempts ---------------------------------------------------------------


def began(step: int = 0, **faults) -> Lifecycle:
    run = machine(**faults)
    run.handle(life.AttemptBegan("rl", step))
    return run


def attempts(run: Lifecycle, *failures) -> life.Action:
    """What follows the last of several attempts, each of which reached a step and then failed."""
    for number, (step, failure) in enumerate(failures):
        if number:
            run.handle(life.AttemptBegan("rl", run.step))
        run.handle(life.StepReached(step))
        action = run.handle(failure)
    return action


def test_ranks_that_fail_are_tried_again_as_long_as_they_come_further():
    run, words = began(), "rl: the learner failed (ValueError: boom)"
    action = attempts(run, (3, FAILED), (4, FAILED), (6, FAILED))
    assert action == life.GoOn(f"{words}: going on from the last checkpoint, since step 6 was reached meanwhile")
    run.handle(life.AttemptBegan("rl", 6))
    run.handle(life.StepReached(6))
    assert run.handle(FAILED) == End(
        f"{words} in 4 attempts without a new step after 6 (learner.max_failures); "
        "once its cause is mended, go on with --resume"
    )


def test_a_restart_that_falls_back_is_no_new_step():
    assert isinstance(attempts(began(8), (8, FAILED)), End)
    assert isinstance(attempts(began(), (5, FAILED), (4, FAILED)), End)


def test_losses_are_counted_anew_after_a_new_step():
    words = "the weight store is lost: going on with new ones, from the last checkpoint ({} of faults.max_restarts)"
    assert attempts(began(), (4, LOST), (5, LOST), (7, LOST), (6, LOST)) == life.GoOn(words.format(2))
    assert attempts(began(7), (6, LOST), (7, LOST), (7, LOST)) == End("the weight store is lost")
    assert attempts(began(max_restarts=0), (3, LOST)) == End("the weight store is lost")


def test_losses_within_an_attempt_and_at_its_end_count_together():
    run = began()
    assert isinstance(run.handle(life.RolesLost("one")), life.GoOn)
    words = "its successor: going on with new ones, from the last checkpoint (2 of faults.max_restarts)"
    assert run.handle(life.RolesLost("its successor")) == life.GoOn(words)
    assert run.handle(LOST) == End("the weight store is lost")


def test_ranks_that_fail_after_a_replacement_are_tried_again_once():
    run = began(3)
    run.handle(life.RolesLost("the conductor is lost"))
    assert isinstance(run.handle(FAILED), life.GoOn)
    run.handle(life.AttemptBegan("rl", 3))
    assert isinstance(run.handle(FAILED), End)


def test_out_of_memory_is_tried_smaller_as_often_as_it_takes():
    run = began()
    assert attempts(run, *[(0, NO_MEMORY)] * 9) == life.GoOn("learner: out of memory", smaller=True)
    assert run.losses == 0
    assert run.handle(Stop("micro-batches cannot be smaller")) == End("micro-batches cannot be smaller")


def test_a_stop_without_a_remedy_ends_the_run():
    run = began()
    assert run.handle(Stop("loss is NaN")) == End("loss is NaN")
    assert run.handle(life.AttemptBegan("after")) == End("loss is NaN")


def test_the_next_stage_counts_its_own_losses():
    run = began()
    attempts(run, (0, LOST), (0, LOST))
    run.handle(life.AttemptBegan("rl"))
    run.handle(life.AttemptBegan("after"))
    assert isinstance(run.handle(LOST), life.GoOn) and run.losses == 1


# -- roles that hang, are silent ------------------------------------------------------------


def test_a_role_that_hangs_is_declared_lost_and_killed():
    clock = Clock()
    run, waits = machine(clock), life.RoleAsked("conductor", answered=False)
    for answered in (True, False):
        run.handle(waits)
        clock.now += HANG_S
        assert run.handle(waits) == Proceed()
        if answered:  # late, but in time
            assert run.handle(life.RoleAsked("conductor", answered=True)) == Proceed()
            clock.now += 1
    clock.now += 0.1
    words = "the conductor has not answered for 10 s (faults.hang_timeout_s)"
    assert run.handle(waits) == life.DeclareLost("conductor", Stop(words, Cause.LOST), kill=True)


def test_a_silent_role_is_declared_lost_unless_its_reason_arrives():
    clock = Clock()
    run = machine(clock)
    for silent in (True, True, False, True, True):
        assert run.handle(life.RoleAsked("conductor", True, silent)) == Proceed()
        clock.now += 1.5
    clock.now += 0.1
    words = "the conductor has stopped, and its reason was lost with the log's writer"
    declared = life.DeclareLost("conductor", Stop(words, Cause.LOST), kill=False)
    assert run.handle(life.RoleAsked("conductor", True, True)) == declared


def test_new_roles_begin_with_a_clean_slate():
    clock = Clock()
    run, waits = machine(clock), life.RoleAsked("conductor", answered=False)
    run.handle(life.AttemptBegan("rl"))
    run.handle(waits)
    run.handle(life.RolesLost("it is lost"))
    clock.now += 2 * HANG_S
    assert run.handle(waits) == Proceed()


# -- a signal -------------------------------------------------------------------------------


def test_a_run_that_is_asked_to_leave_saves_within_its_grace():
    clock = Clock()
    run = machine(clock)
    run.handle(life.AttemptBegan("rl"))
    asked, reason = life.LeaveAsked("SIGTERM", clock(), can_save=True), life.leave_reason("SIGTERM")
    assert run.handle(asked) == life.Leaving(reason)
    clock.now += GRACE_S
    assert run.handle(asked) == Proceed()
    clock.now += 0.1
    assert run.handle(asked) == End(reason) and run.state == life.End(reason)


def test_a_stage_that_cannot_save_is_left_at_once():
    reason = life.leave_reason("SIGINT")
    assert machine().handle(life.LeaveAsked("SIGINT", 100.0, can_save=False)) == End(reason)


@pytest.mark.parametrize(
    "event, reason",
    [
        (Stop("the loop said so"), "the loop said so"),
        (LOST, life.leave_reason("SIGTERM")),
        (NO_MEMORY, life.leave_reason("SIGTERM")),
        (life.RolesLost("gone"), life.leave_reason("SIGTERM")),
        (FAILED, life.leave_reason("SIGTERM")),
    ],
)
def test_whoever_leaves_starts_nothing_again(event, reason):
    run = began()
    run.handle(life.LeaveAsked("SIGTERM", 100.0, can_save=True))
    assert run.handle(event) == End(reason)


def test_overdue_counts_from_the_last_break():
    clock = Clock()
    overdue = Overdue(3.0, clock)
    seen = []
    for holds in (True, True, False, True, True, True):
        seen.append(overdue(holds))
        clock.now += 2
    assert seen == [False, False, False, False, False, True]
