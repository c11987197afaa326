"""The conductor's loop, pool and weight store under random schedules of answers, deaths, losses and restarts.

Their own code on virtual time; actors, rewards and ranks are simulated. A deadlock shows at once: nothing is left that
could happen (``virtual_time.Deadlock``).
"""

import asyncio
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors.rl.loop import Loop
from actors.rl.messages import Dispatched, Ready, Trained
from actors.rl.pool import RolloutPool
from actors.rl.staleness import Stamp
from fixtures import virtual_time
from fixtures.local_actors import Local
from fixtures.simulated_roles import Log, NoObserver, Rollout, Store, Weights, brightness, handles, made_of
from rlproxi.algorithms import grpo
from rlproxi.config.loading import build_config
from rlproxi.rewards import RewardError

STEPS, RANKS = 6, 2


@dataclass
class World:
    """A run on virtual time. ``dice`` decides how long everything takes, who dies, and what gets lost."""

    dice: random.Random
    bound: int
    actors: int = 3
    deaths: int = 0
    restarts: int = 0
    lost_scores: float = 0.0
    trained: list = field(default_factory=list)  # (attempt, iteration, [(chain, version)], rewards)
    attempt: int = 0  # of a learner; the ledger counts from 1
    at: int = 0  # the newest checkpoint

    def __post_init__(self):
        config = build_config(
            {
                "rl": {
                    "steps": STEPS,
                    "prompts_per_step": 4,
                    "groups_per_micro_batch": 1,
                    "group_size": 2,
                    "max_staleness": self.bound,
                },
                "rewards": {"train": [{"name": "attributes"}], "max_masked_fraction": 1.0},
                "evaluate": {"every": 0},
                "resources": {"learner_workers": RANKS},
            }
        )
        self.log, self.store = Log(), Store(self.bound + 2)
        self.rollouts = [
            Rollout(lambda request: self.pause(2.0), restart_s=self.dice.uniform(0.1, 9.0)) for _ in range(self.actors)
        ]
        self.pool = RolloutPool(handles(self.rollouts), Local(self.store), Local(self.log))
        self.algorithm = grpo.GRPO(config)
        self.loop = Loop(config, self.algorithm, self.pool, self, Local(self.log), None, NoObserver())

    async def pause(self, most: float) -> None:
        await asyncio.sleep(self.dice.choice([0.0, self.dice.uniform(0, most), self.dice.expovariate(1 / most)]))

    async def total(self, images, prompt):
        """A reward, in place of the client: late, or lost."""
        try:
            await self.pause(1.0)
        except asyncio.CancelledError:
            if self.dice.random() < 0.5:
                raise  # else as Python 3.11's asyncio.wait_for: where the answer was there, it goes on
        if self.dice.random() < self.lost_scores:
            raise RewardError("lost on its way")
        return brightness(images), {"attributes": brightness(images)}

    async def call(self, method, *arguments):
        """A call to the conductor: it takes its time, and arrives even where its caller dies meanwhile."""

        async def sent():
            await self.pause(0.5)
            return await method(*arguments)

        call = asyncio.ensure_future(sent())
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(call)

    async def learner(self):
        """Ranks that march in step; a checkpoint every four iterations, and at the end."""
        self.store.publish(self.at, Weights(self.attempt, self.at))
        start, number = self.at, await self.call(self.loop.begin, self.at)
        for iteration in range(start, STEPS):
            answers = await asyncio.gather(
                *(self.call(self.loop.next_batch, iteration, r, RANKS) for r in range(RANKS))
            )
            assert all(isinstance(answer, Ready) for answer in answers), answers
            chains = {j: chain for answer in answers for j, chain in answer.chains.items()}
            versions, rewards = answers[0].versions, answers[0].rewards
            assert sorted(chains) == list(range(4)) and all(answer.versions == versions for answer in answers)
            await self.pause(3.0)
            self.trained.append((self.attempt, iteration, [(chains[j], versions[j]) for j in range(4)], rewards))
            self.store.publish(iteration + 1, Weights(self.attempt, iteration + 1))
            if iteration % 4 == 3 or iteration + 1 == STEPS:
                self.at = iteration + 1
            await self.call(self.loop.commit, Trained(number, iteration, {}))

    async def kills(self):
        for _ in range(self.deaths):
            await self.pause(5.0)
            self.dice.choice(self.rollouts).die()

    async def run(self) -> "World":
        killing = asyncio.ensure_future(self.kills())
        for _ in range(self.restarts):
            running = asyncio.ensure_future(self.learner())
            await asyncio.wait([running], timeout=self.dice.expovariate(1 / 12))
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            if self.at == STEPS:
                break
            self.attempt += 1
        if self.at < STEPS or self.attempt == 0:
            await self.learner()
        await killing
        await asyncio.sleep(100)  # whatever is late arrives
        return self


def check(world: World) -> None:
    """Nothing lost, doubled, stale or mixed; nothing left over."""
    for attempt in {attempt for attempt, *_ in world.trained}:
        mine = [iteration for each, iteration, *_ in world.trained if each == attempt]
        assert mine == list(range(mine[0], mine[0] + len(mine))), "each iteration once, in order"
    last = {}  # the weights that count are those of the last attempt that trained an iteration
    for attempt, iteration, made, rewards in world.trained:
        last[iteration] = attempt
        requests = world.algorithm.requests(iteration)
        assert rewards.shape == (4, 2)
        for j, (chain, version) in enumerate(made):
            assert chain.request == requests[j], "each group once, in its place"
            assert chain.weights == Weights(attempt, version), "stamped with the weights that made it, of this attempt"
            assert 0 <= iteration - version <= world.bound
            assert np.isnan(rewards[j]).all() or (rewards[j] == brightness(made_of(requests[j]))).all()
    assert sorted(last) == list(range(STEPS))
    loop, pool = world.loop, world.pool
    assert world.log.stopped is None and loop.stopped is None
    assert (loop.ready, loop.answers, loop.tasks, loop.ledger.used) == ({}, {}, set(), 0)
    assert pool.idle.qsize() == world.actors and not pool.busy and not pool.fetching
    assert pool.lost <= sum(rollout.deaths for rollout in world.rollouts), "each death counts once"


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    bound=st.integers(0, 3),
    actors=st.integers(1, 5),
    deaths=st.integers(0, 6),
    restarts=st.integers(0, 3),
    lost=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_any_schedule_of_deaths_losses_and_restarts_trains_each_group_once(seed, bound, actors, deaths, restarts, lost):
    world = World(random.Random(seed), bound, actors, deaths, restarts, lost)
    check(virtual_time.run(world.run()))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), deaths=st.integers(0, 3))
def test_bound_zero_is_the_synchronous_loop(seed, deaths):
    """The same groups, weights and rewards as a plain loop over iterations."""
    world = virtual_time.run(World(random.Random(seed), 0, deaths=deaths).run())
    plain = []
    for iteration in range(STEPS):
        for request in world.algorithm.requests(iteration):
            plain.append((iteration, request, Weights(0, iteration), brightness(made_of(request)).tolist()))
    assert plain == [
        (iteration, chain.request, chain.weights, rewards[j].tolist())
        for _, iteration, made, rewards in world.trained
        for j, (chain, _) in enumerate(made)
    ]


def test_a_learner_that_starts_far_before_the_newest_version_finds_its_weights():
    """The store kept the newest numbers, and dropped the weights that had just been published."""
    store = Store(keep=2)
    for version in (*range(8), 3):
        store.publish(version, Weights(int(version == 3), version))
    assert asyncio.run(store.get(3)).weights == Weights(1, 3)
    with pytest.raises(KeyError, match=r"weights of version 7 are gone; held: \[3\]"):
        asyncio.run(store.get(7))


def test_after_a_restart_an_actor_takes_the_new_weights_of_a_version():
    """An actor that holds version 2 of the attempt before takes version 2 of this one."""

    async def main():
        store, rollout = Store(keep=2), Rollout(lambda request: asyncio.sleep(1))
        pool = RolloutPool(handles([rollout]), Local(store), Local(Log()))
        request = grpo.GRPO(build_config({})).requests(0)[0]
        made = []
        for attempt in (0, 1):
            store.publish(2, Weights(attempt, 2))
            pool.begin()
            made.append((await pool.sample(request, 2)).chain.weights)
        return made

    assert virtual_time.run(main()) == [Weights(0, 2), Weights(1, 2)]


def test_work_of_an_earlier_attempt_is_not_handed_over():
    async def main():
        world = World(random.Random(1), bound=1)
        world.store.publish(0, Weights(0, 0))
        assert [await world.loop.begin(0) for _ in range(2)] == [1, 2]
        await asyncio.sleep(0)
        stamp = Stamp(attempt=1, iteration=1, version=0)
        await world.loop.hand_over(3, Dispatched(world.algorithm.requests(1)[3], stamp))
        assert world.loop.ready == {}
        await asyncio.wait_for(world.loop.next_batch(0), 100)
        with pytest.raises(RuntimeError, match="committed by the learner of attempt 1, which attempt 2 replaced"):
            await world.loop.commit(Trained(1, 0, {}))
        with pytest.raises(RuntimeError, match="iteration 1 is committed, and no learner of this attempt was given it"):
            await world.loop.commit(Trained(2, 1, {}))
        await world.loop.commit(Trained(2, 0, {}))
        assert world.loop.ledger.version == 1
        await world.loop.close()

    virtual_time.run(main())


# -- the pool alone -----------------------------------------------------------------------


def test_an_actor_that_is_being_restarted_is_asked_for_nothing_and_died_once():
    async def main():
        log, store = Log(), Store(2)
        rollout = Rollout(lambda request: asyncio.sleep(2), restart_s=30)
        pool = RolloutPool(handles([rollout]), Local(store), Local(log))
        store.publish(0, Weights(0, 0))
        asking = asyncio.ensure_future(pool.sample(grpo.GRPO(build_config({})).requests(0)[0], 0))
        await asyncio.sleep(1)
        rollout.die()
        await asking
        return pool.lost, rollout.calls, [fields["message"] for _, fields in log.records]

    lost, calls, messages = virtual_time.run(main())
    assert (
        (lost, calls) == (1, 2)
        and len(messages) == 1
        and messages[0].startswith("rollout actor lost, request repeated: ")
    )


class Gone:
    """An actor that Ray does not bring back."""

    async def ready(self):
        raise ActorDiedError()

    async def save(self, publication, weights, folder):
        raise ActorDiedError()


def test_actors_that_never_come_back_end_the_run_instead_of_holding_it():
    async def main():
        log, store = Log(), Store(2)
        store.publish(0, Weights(0, 0))
        pool = RolloutPool(handles([Gone(), Gone()]), Local(store), Local(log))
        waiting = [pool.save(0, "best") for _ in range(3)]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(str(e) == "all 2 rollout actors have died and do not come back" for e in ended), ended
        return [fields["message"] for _, fields in log.records][-1]

    assert virtual_time.run(main()).endswith("does not come back; 0 left")


def test_a_store_that_is_gone_is_a_fault_of_the_run():
    class Dead:
        async def get(self, version):
            raise ActorUnavailableError("the store is gone", None)

    async def main():
        pool = RolloutPool(handles([Gone()]), Local(Dead()), Local(Log()))
        with pytest.raises(ActorUnavailableError, match="the store is gone"):
            await asyncio.gather(pool.save(0, "best"), pool.save(0, "best"))
        assert pool.fetching == {}

    virtual_time.run(main())


def test_no_deadlock_stays_unseen():
    async def main():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(virtual_time.Deadlock):
        virtual_time.run(main())
