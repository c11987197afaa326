from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.rl.staleness import Ledger, Stamp


@dataclass
class Pending:
    stamp: Stamp
    scored: bool = False


def simulate(
    pick, bound: int, iterations: int, micro_batches: int, size: int, limit: int
) -> tuple[list[str], list[int]]:
    """A dispatcher, rollouts that answer in any order, and a learner; ``pick(n)`` chooses what happens next.

    ``size``: bytes of an iteration. Returns (what happened, the staleness of every micro-batch trained on).
    """
    ledger = Ledger(bound, limit, size)
    attempt = ledger.begin(0)
    flying: list[Pending] = []
    happened, stale = [], []
    while ledger.version < iterations:
        moves = []
        if ledger.next < iterations and ledger.within_bound() and ledger.has_room():
            moves.append("dispatch")
        waiting = [p for p in flying if not p.scored]
        moves += ["score"] * len(waiting)
        version = ledger.version
        mine = [p for p in flying if p.stamp.iteration == version]
        if len(mine) == micro_batches and all(p.scored for p in mine):
            moves.append("train")
        assert moves, f"deadlock at version {version} with {len(flying)} micro-batches of {micro_batches} in flight"
        choice = pick(len(moves))
        move = moves[choice]
        if move == "dispatch":
            stamp = ledger.dispatch()
            flying += [Pending(stamp) for _ in range(micro_batches)]
        elif move == "score":
            waiting[choice - moves.index("score")].scored = True
        else:
            ledger.check(version, [p.stamp for p in mine])
            stale += [version - p.stamp.version for p in mine]
            flying = [p for p in flying if p.stamp.iteration != version]
            ledger.commit(version, attempt)
        happened.append(move)
        assert ledger.used == len({p.stamp.iteration for p in flying}) * size
        assert ledger.used <= limit or ledger.used == size  # one oversized iteration is let through, alone
    assert ledger.used == 0 and not flying
    return happened, stale


@settings(max_examples=120)
@given(
    data=st.data(),
    bound=st.integers(0, 4),
    iterations=st.integers(1, 7),
    micro_batches=st.integers(1, 3),
    size=st.integers(1, 10),
    room=st.integers(0, 40),
)
def test_no_schedule_exceeds_the_bound_or_the_budget_or_stops(data, bound, iterations, micro_batches, size, room):
    limit = size + room
    pick = lambda n: data.draw(st.integers(0, n - 1))  # noqa: E731
    happened, stale = simulate(pick, bound, iterations, micro_batches, size, limit)
    assert len(stale) == iterations * micro_batches and min(stale) >= 0 and max(stale) <= bound
    count = Counter(happened)
    assert count == {"dispatch": iterations, "score": len(stale), "train": iterations}


@given(data=st.data(), iterations=st.integers(1, 6), limit=st.integers(1, 9))
def test_one_oversized_iteration_at_a_time_is_let_through(data, iterations, limit):
    happened, _ = simulate(lambda n: data.draw(st.integers(0, n - 1)), 3, iterations, 1, 10, limit)
    assert happened == ["dispatch", "score", "train"] * iterations


@given(data=st.data(), iterations=st.integers(1, 6), micro_batches=st.integers(1, 3))
def test_bound_zero_is_strict_alternation(data, iterations, micro_batches):
    happened, stale = simulate(lambda n: data.draw(st.integers(0, n - 1)), 0, iterations, micro_batches, 1, 10**9)
    assert set(stale) == {0}
    assert happened == ["dispatch", *["score"] * micro_batches, "train"] * iterations


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_an_eager_dispatcher_reaches_the_bound_and_stays_there(bound):
    """Dispatch whenever it is allowed: the bound is used, not only kept."""
    _, stale = simulate(lambda n: 0, bound, 9, 1, 1, 10**9)
    assert stale == [*range(bound), *[bound] * (9 - bound)]


def test_the_budget_limits_how_far_ahead_the_dispatcher_gets():
    _, stale = simulate(lambda n: 0, 4, 9, 2, 10, limit=20)  # two iterations
    assert max(stale) == 1


@given(bound=st.integers(0, 10), iteration=st.integers(0, 50), version=st.integers(0, 50))
def test_the_rule(bound, iteration, version):
    ledger = Ledger(bound, limit=10**9, size=1)
    ledger.begin(iteration)
    ledger.dispatch()
    stamp = Stamp(1, iteration, version)
    if version <= iteration <= version + bound:
        ledger.check(iteration, [stamp])
    else:
        with pytest.raises(RuntimeError, match=f"iteration {iteration} of attempt 1 was given a group of"):
            ledger.check(iteration, [stamp])


def test_an_iteration_larger_than_the_budget_still_reaches_the_learner():
    ledger = Ledger(2, limit=10, size=11)
    ledger.begin(0)
    for iteration in range(3):
        stamp = ledger.dispatch()
        assert ledger.within_bound() and not ledger.has_room()
        words = f"iteration {iteration + 1} dispatched at version {iteration} with 11 bytes"
        with pytest.raises(RuntimeError, match=words):
            ledger.dispatch()
        ledger.check(iteration, [stamp])
        ledger.commit(iteration, 1)


class LedgerMachine(RuleBasedStateMachine):
    """Any order of dispatches, arrivals, commits, losses and restarts, those of earlier attempts among them."""

    @initialize(bound=st.integers(0, 3), limit=st.integers(1, 40), start=st.integers(0, 3))
    def begins(self, bound, limit, start):
        self.bound, self.limit = bound, limit
        self.ledger = Ledger(bound, limit, 10)
        self.flying: list[Stamp] = []  # of all attempts
        self.arrived: list[Stamp] = []
        self.trained: list[int] = []
        self.attempt, self.start = self.ledger.begin(start), start

    @rule(back=st.integers(0, 3))
    def learner_restarts(self, back):
        self.start = max(0, self.ledger.version - back)
        attempt = self.ledger.begin(self.start)
        assert attempt > self.attempt and self.ledger.used == 0
        self.attempt, self.trained, self.arrived = attempt, [], []

    @precondition(lambda self: self.ledger.within_bound() and self.ledger.has_room())
    @rule()
    def dispatches(self):
        stamp = self.ledger.dispatch()
        assert (stamp.attempt, stamp.version) == (self.attempt, self.ledger.version)
        assert stamp.iteration - stamp.version <= self.bound
        self.flying.append(stamp)

    @precondition(lambda self: self.flying)
    @rule(pick=st.integers(0, 10**6), twice=st.booleans())
    def answers(self, pick, twice):
        """One arrives; or is lost on its way and made again, so that its answer comes twice."""
        stamp = self.flying[pick % len(self.flying)]
        if not twice:
            self.flying.remove(stamp)
        if self.ledger.in_flight(stamp):
            assert stamp.attempt == self.attempt and stamp.iteration not in self.trained
            self.arrived.append(stamp)

    @precondition(lambda self: any(s.iteration == self.ledger.version for s in self.arrived))
    @rule()
    def commits(self):
        now = self.ledger.version
        mine = [s for s in self.arrived if s.iteration == now]
        self.ledger.check(now, mine)
        assert all(0 <= now - s.version <= self.bound and s.attempt == self.attempt for s in mine)
        self.ledger.commit(now, self.attempt)
        self.trained.append(now)
        self.arrived = [s for s in self.arrived if s.iteration > now]

    @rule(iteration=st.integers(0, 12), attempt=st.integers(0, 5))
    def another_learner_commits(self, iteration, attempt):
        if (iteration, attempt) != (self.ledger.version, self.attempt) or self.ledger.next == self.ledger.version:
            before = vars(self.ledger).copy(), self.ledger.used
            with pytest.raises(RuntimeError, match=f"iteration {iteration} is committed"):
                self.ledger.commit(iteration, attempt)
            assert (vars(self.ledger), self.ledger.used) == before

    @invariant()
    def nothing_leaks(self):
        ledger = self.ledger
        assert self.trained == list(range(self.start, ledger.version)), "each once, in order"
        assert ledger.used == 10 * (ledger.next - ledger.version) <= max(10, self.limit)
        assert ledger.next - ledger.version <= self.bound + 1
        assert ledger.next > ledger.version or (ledger.within_bound() and ledger.has_room()), "something can happen"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30)
