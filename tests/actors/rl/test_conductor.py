"""The loop and the run log in this process: their own code, without Ray. Rollouts and scorers are simulated."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from actors.rl.loop import Loop
from actors.rl.messages import Ended, Leave, Lost, Ready, Sampled, Stopped, Trained
from actors.rl.stops import Cause, Stop
from fixtures.local_actors import local_log
from fixtures.simulated_roles import NoObserver
from rlproxi.algorithms import grpo
from rlproxi.config.loading import build_config
from rlproxi.rewards import RewardError
from rlproxi.telemetry.runlog import read

STEPS, BROKEN = 4, 255  # BROKEN: the pixel of images that nobody can score


class Client:
    """Rewards that are the images' brightness."""

    async def total(self, images, prompt):
        if images.max() == BROKEN:
            raise RewardError("no score today")
        return images.mean((1, 2, 3)), {"attributes": images.mean((1, 2, 3))}

    async def provenance(self, name):
        raise RewardError(f"{name} hangs")


class Pool:
    """Rollout actors that answer at once, unless a test puts another ``sample`` in the place of this."""

    def begin(self):
        pass

    async def sample(self, request, version):
        return await pictures(request, version)


def make(folder, bound: int = 1, **sections) -> Loop:
    """The loop as the conductor's ``connect`` makes it; two micro-batches an iteration."""
    config = build_config(
        {
            "rl": {
                "steps": STEPS,
                "prompts_per_step": 2,
                "groups_per_micro_batch": 1,
                "group_size": 2,
                "max_staleness": bound,
            },
            "rewards": {"train": [{"name": "attributes"}]},
            "evaluate": {"every": 0},
            **sections,
        }
    )
    return Loop(config, grpo.GRPO(config), Pool(), Client(), local_log(folder), None, NoObserver())


async def pictures(request, version, pixel: int = 100) -> Sampled:
    return Sampled(np.full((request.images, 2, 2, 3), pixel, np.uint8), np.ones(request.images, bool), "chain", 0.0)


async def commit(conductor: Loop, iteration: int) -> None:
    await conductor.commit(Trained(conductor.ledger.attempt, iteration, {}))


async def settled() -> None:
    """Everything that can happen without us has happened."""
    for _ in range(40):
        await asyncio.sleep(0)


def warnings(folder) -> list[str]:
    return [r["message"] for r in read(folder) if r["event"] == "warning"]


# -- all ranks get the same answers -------------------------------------------------------


@dataclass
class Play:
    """``ranks`` learner ranks and a conductor; ``pick(n)`` chooses what happens next.

    Time passes where the conductor waits for others: for each micro-batch, each evaluation, each rank's next call.
    ``finish``: the iteration before which the held-out reward falls. ``broken``: one that cannot be scored.
    """

    conductor: Loop
    pick: object
    ranks: int
    finish: int | None = None
    broken: int | None = None
    may_stop: bool = False
    waiting: list = field(default_factory=list)

    def __post_init__(self):
        self.conductor.pool.sample = self.sample
        self.conductor.evaluator = SimpleNamespace(evaluate=self.evaluate, early_end=None)
        self.answers = [[] for _ in range(self.ranks)]

    async def gate(self):
        self.waiting.append(asyncio.get_running_loop().create_future())
        await self.waiting[-1]

    async def sample(self, request, version):
        await self.gate()
        return await pictures(request, version, BROKEN if request.step == self.broken else 100)

    async def evaluate(self, tag, step_counts, version):
        await self.gate()
        iteration = int(tag.split("-")[1])
        if self.finish is not None and iteration >= self.finish:
            self.conductor.evaluator.early_end = "the held-out reward fell"

    async def rank(self, number: int):
        for iteration in range(STEPS):
            await self.gate()
            answer = await self.conductor.next_batch(iteration)
            self.answers[number].append(answer.versions if isinstance(answer, Ready) else answer)
            if not isinstance(answer, Ready):
                return
            self.arrived[iteration] += 1
            while self.arrived[iteration] < self.ranks:  # a collective
                await asyncio.sleep(0)
            if number == 0:
                await commit(self.conductor, iteration)

    async def run(self) -> list:
        """The answers that the ranks got, which are the same for all."""
        self.arrived = [0] * STEPS
        await self.conductor.begin(0)
        learner = [asyncio.create_task(self.rank(r)) for r in range(self.ranks)]
        while True:
            await settled()
            if all(rank.done() for rank in learner):
                break
            self.waiting = [gate for gate in self.waiting if not gate.done()]
            moves = len(self.waiting) + self.may_stop
            assert moves, f"the ranks wait for each other, after {self.answers}"
            choice = self.pick(moves)
            if choice < len(self.waiting):
                self.waiting[choice].set_result(None)
            else:
                self.may_stop = False
                await self.conductor.stop("enough")
        for rank in learner:
            rank.result()
        for task in self.conductor.tasks:
            task.cancel()
        assert all(answers == self.answers[0] for answers in self.answers), self.answers
        return self.answers[0]


@settings(max_examples=150)
@given(
    data=st.data(),
    bound=st.integers(0, 3),
    ranks=st.integers(2, 3),
    may_stop=st.booleans(),
    finish=st.none() | st.integers(1, STEPS - 1),
    broken=st.none() | st.integers(0, STEPS - 1),
)
def test_every_rank_gets_the_same_answer_in_any_order_of_events(
    tmp_path_factory, data, bound, ranks, may_stop, finish, broken
):
    conductor = make(tmp_path_factory.mktemp("run"), bound, evaluate={"every": 1})
    play = Play(conductor, lambda n: data.draw(st.integers(0, n - 1)), ranks, finish, broken, may_stop)
    answers = asyncio.run(play.run())
    batches = [each for each in answers if isinstance(each, tuple)]
    assert all(0 <= i - version <= bound for i, versions in enumerate(batches) for version in versions)
    assert answers[: len(batches)] == batches and answers[len(batches) :] in ([], [Stopped()], [Ended()])
    if answers[-1] == Stopped():
        assert conductor.stopped
    elif answers[-1] == Ended():
        assert len(batches) == conductor.end == finish
    if not may_stop or conductor.stopped is None:  # then the outcome is that of no order
        last = min(x for x in (finish, broken, STEPS) if x is not None)
        assert len(batches) == last
        end = Ended() if last == finish else Stopped() if last == broken else None
        assert answers[last:] == ([end] if end else [])


async def both(conductor, iteration: int, between) -> list:
    """What two ranks are answered for an iteration when ``between()`` happens after the first one's call."""
    first = asyncio.create_task(conductor.next_batch(iteration))
    await settled()
    await between()
    await settled()
    return [await asyncio.wait_for(first, 1), await asyncio.wait_for(conductor.next_batch(iteration), 1)]


def test_a_stop_between_two_ranks_calls_takes_no_batch_away(tmp_path):
    async def main():
        conductor = make(tmp_path)
        await conductor.begin(0)
        one, two = await both(conductor, 0, lambda: conductor.stop("enough"))
        assert one.rewards.shape == (2, 2) and two.rewards is one.rewards
        await commit(conductor, 0)
        assert await both(conductor, 2, settled) == [Stopped()] * 2, "was not complete"

    asyncio.run(main())


def test_an_iteration_that_a_stop_left_incomplete_stays_so(tmp_path):
    async def main():
        conductor, late = make(tmp_path, bound=0), asyncio.Event()

        async def sample(request, version):
            await late.wait()
            return await pictures(request, version)

        conductor.pool.sample = sample
        await conductor.begin(0)

        async def stop_then_samples():
            await conductor.stop("enough")
            late.set()

        assert await both(conductor, 0, stop_then_samples) == [Stopped()] * 2
        assert conductor.ready == {} and not conductor.tasks

    asyncio.run(main())


def test_iterations_dispatched_before_an_early_end_are_trained(tmp_path):
    async def main():
        conductor = make(tmp_path, bound=1)
        await conductor.begin(0)
        one, two = await both(conductor, 1, lambda: conductor.end_before(2, "the held-out reward fell"))
        assert two.rewards is one.rewards and one.versions == (0, 0)
        assert await both(conductor, 2, settled) == [Ended()] * 2
        await conductor.begin(1)
        again = await asyncio.wait_for(conductor.next_batch(1), 1)
        assert again.versions == (1, 1), "a restarted learner gets an answer of its own"
        assert conductor.end is None, "the same evaluation ends it again"

    asyncio.run(main())


def test_too_many_masked_groups_stop_every_rank_once(tmp_path):
    async def main():
        conductor = make(tmp_path, bound=0)
        conductor.pool.sample = lambda request, version: pictures(request, version, BROKEN)
        await conductor.begin(0)
        assert await both(conductor, 0, settled) == [Stopped()] * 2
        assert conductor.stopped.startswith("100% of the groups of iteration 0 have no score")

    asyncio.run(main())
    stops = [message for message in warnings(tmp_path) if message.startswith("run stopped")]
    assert len(stops) == 1 and sum("has no score: no score today" in message for message in warnings(tmp_path)) == 2


# -- faults -------------------------------------------------------------------------------


def test_rewards_without_provenance_end_no_run(tmp_path):
    async def main():
        conductor = make(tmp_path, rewards={"train": [{"name": "attributes", "tune_micro_batch": True}]})
        await conductor.begin(0)
        await conductor.next_batch(0)
        await commit(conductor, 0)
        assert conductor.ledger.version == 1 and conductor.stopped is None

    asyncio.run(main())
    assert warnings(tmp_path) == ["reward 'attributes' does not say where its scores come from: attributes hangs"]


def test_a_lost_role_sends_every_rank_back_to_begin_anew(tmp_path):
    async def main():
        conductor = make(tmp_path)
        conductor.pool.sample = lambda request, version: asyncio.sleep(3600)
        await conductor.begin(0)
        asked = asyncio.gather(conductor.next_batch(0, 0, 2), conductor.next_batch(0, 1, 2))
        await settled()
        await conductor.stop("the weight store is lost", Cause.LOST)
        assert await asked == [Lost("the weight store is lost")] * 2
        assert conductor.log.thing.stop_state().cause is Cause.LOST

    asyncio.run(main())


def test_a_commit_waits_until_its_record_is_in_the_log(tmp_path):
    async def main():
        conductor, written = make(tmp_path), asyncio.Event()
        conductor.log = SimpleNamespace(
            append=SimpleNamespace(remote=lambda event, fields: written.wait() if event == "metrics" else None)
        )
        await conductor.begin(0)
        await conductor.next_batch(0)
        committed = asyncio.ensure_future(commit(conductor, 0))
        await settled()
        assert not committed.done() and conductor.ledger.version == 1, "sampling goes on meanwhile"
        written.set()
        await committed

    asyncio.run(main())


@pytest.mark.parametrize(
    "cause, kind, words",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "out_of_memory",
            "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (ValueError("a shape"), "", "RayTaskError(ValueError): "),
    ],
)
def test_a_fault_of_a_rollout_actor_stops_with_its_kind(tmp_path, cause, kind, words):
    async def fails(request, version):
        raise RayTaskError("sample", f"Traceback\n{cause}", cause, "actor", 1, "127.0.0.1").as_instanceof_cause()

    async def main():
        conductor = make(tmp_path)
        conductor.pool.sample = fails
        await conductor.begin(0)
        assert await both(conductor, 0, settled) == [Stopped()] * 2
        conductor.log.thing.clear_stop()  # as the driver does before it starts RL again
        await conductor.stop("a late one")
        assert conductor.log.thing.stop_state() is None
        return conductor.stopped

    assert asyncio.run(main()).startswith(words)
    (warning,) = [r for r in read(tmp_path) if r["event"] == "warning"]
    assert warning["message"].startswith(f"run stopped: {words}") and warning.get("kind", "") == kind


def test_the_first_stop_stays_until_it_is_cleared(tmp_path):
    log = local_log(tmp_path).thing
    assert log.stop_state() is None
    log.stop("no memory", Cause.OUT_OF_MEMORY)
    log.stop("another")
    assert log.stop_state() == Stop("no memory", Cause.OUT_OF_MEMORY)
    log.clear_stop()
    assert log.stop_state() is None
    log.stop("another")
    assert log.stop_state() == Stop("another", Cause.ENDED)
    assert [r.get("kind") for r in read(tmp_path)] == ["out_of_memory", None, None]


def test_ranks_that_are_asked_to_leave_all_save_first(tmp_path):
    async def main():
        conductor = make(tmp_path, bound=0)
        await conductor.begin(0)
        answers = await both(conductor, 0, lambda: conductor.leave("asked to end"))
        assert all(isinstance(answer, Ready) for answer in answers), "the iteration under way is trained"
        conductor.answers.clear()
        assert await both(conductor, 0, settled) == [Leave()] * 2

    asyncio.run(main())
    assert warnings(tmp_path) == ["run stopped: asked to end"]


# -- samples that are NaN or Inf ----------------------------------------------------------


async def half_broken(request, version, every: bool = False) -> Sampled:
    """Samples of which the first (or every one) is not finite."""
    sampled = await pictures(request, version)
    sampled.images[1:] += 50  # so that rewards differ
    sampled.finite[: None if every else 1] = False
    return sampled


@pytest.mark.parametrize("on_failure, missing", [("drop_group", [True, True]), ("mask_sample", [True, False])])
def test_a_broken_sample_is_a_missing_score(tmp_path, on_failure, missing):
    async def main():
        conductor = make(
            tmp_path,
            bound=0,
            rewards={"train": [{"name": "attributes"}], "on_failure": on_failure, "max_masked_fraction": 1.0},
        )
        conductor.pool.sample = half_broken
        await conductor.begin(0)
        batch, _ = await both(conductor, 0, settled)
        assert np.isnan(batch.rewards).tolist() == [missing] * 2 and batch.refused is None

    asyncio.run(main())
    assert (
        sum(
            "count as missing, because some of a group's are NaN or Inf: lower the learning rate" in w
            for w in warnings(tmp_path)
        )
        == 2
    )


def test_too_many_broken_samples_are_the_learners_to_skip(tmp_path):
    async def main():
        conductor = make(tmp_path, bound=0)
        conductor.pool.sample = lambda request, version: half_broken(request, version, every=True)
        await conductor.begin(0)
        one, two = await both(conductor, 0, settled)
        assert (
            one.refused
            == two.refused
            == (
                "4 of its 4 samples are NaN or Inf, and 100% of the groups have no score "
                "(rewards.max_masked_fraction = 0.5)"
            )
        )
        assert np.isnan(one.rewards).all() and conductor.stopped is None
        await commit(conductor, 0)
        await settled()
        assert conductor.ledger.version == 1

    asyncio.run(main())
