"""Two real ranks (gloo): checkpoints that cross the number of ranks, and a failure that both learn of."""

import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from actors.train import checkpoints
from fixtures.small_rank import SmallRank, engine_of, state, train
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry.runlog import read

#: (stage of the one rank, stage of the two): each way over.
CASES = [(0, 3), (3, 0)]


def _two(rank: int, root: str, cases: list[tuple[int, int]], full: bool) -> None:
    """What each of the two does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{root}/store", 2), rank=rank, world_size=2)
    folder, found = Path(root), {}
    for one, two in cases:
        engine = engine_of("plain", two, seed=3)
        engine.load(folder / f"one-{one}")
        found[f"{one}-{two}"] = train(engine, 3, 5)
        engine.save(folder / f"two-{one}-{two}")
        engine.close()
    if full:
        found["full"] = _full(rank, folder / "run")
    torch.save(found, folder / f"found-{rank}")
    dist.destroy_process_group()


def _full(rank: int, run_dir: Path) -> list[str]:
    """The second rank alone meets the limit of its files' size: what is in the folder after each checkpoint."""
    small = SmallRank(run_dir, stage=1, noise=False, steps=6)
    seen, write = [], small.checkpoint

    def checkpoint(step: int) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank and step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        write(step)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        seen.append(f"{step}: {small.checkpointer.unwritten}")

    small.checkpoint = checkpoint
    small.live()
    return seen


def ranks(folder: Path, cases: list[tuple[int, int]], full: bool = False) -> Path:
    """Writes into ``folder`` checkpoints of one rank after three steps, of two after five, and what the two saw."""
    for stage in {one for one, _ in cases}:
        engine = engine_of("plain", stage)
        train(engine, 0, 3)
        engine.save(folder / f"one-{stage}")
        engine.close()
    (folder / "run").mkdir()
    mp.spawn(_two, (str(folder), cases, full), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def root(process_group, tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("ranks"), CASES, full=True)


def goes_on(stage: int, folder: Path, start: int, stop: int, then: Path | None = None):
    """Metrics of one rank that goes on from ``folder``."""
    engine = engine_of("plain", stage, seed=4)
    engine.load(folder)
    metrics = train(engine, start, stop)
    if then:
        engine.save(then)
    engine.close()
    return metrics


@pytest.mark.parametrize("one, two", CASES)
def test_from_one_rank_to_two_and_back(one, two, root, tmp_path):
    crossing(one, two, root, tmp_path)


@pytest.mark.exhaustive
def test_from_one_rank_to_two_and_back_at_the_other_stages(process_group, tmp_path):
    cases = [(1, 2), (2, 1), (3, 3), (0, 1)]
    folder = ranks(tmp_path, cases)
    for one, two in cases:
        crossing(one, two, folder, tmp_path / f"{one}-{two}")


def crossing(one: int, two: int, root: Path, tmp_path: Path) -> None:
    """Two ranks went on from one's checkpoint, and one goes on from theirs, as one rank does from its own."""
    same_size = goes_on(one, root / f"one-{one}", 3, 5, tmp_path / "five")
    for rank in (0, 1):
        found = torch.load(root / f"found-{rank}", weights_only=True)[f"{one}-{two}"]
        for ours, expected in zip(found, same_size, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)
    expected, tensors = state(tmp_path / "five"), state(root / f"two-{one}-{two}")
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-6)
    back = goes_on(one, root / f"two-{one}-{two}", 5, 7)
    for ours, unbroken in zip(back, goes_on(one, tmp_path / "five", 5, 7), strict=True):
        assert ours == pytest.approx(unbroken, rel=1e-4)


def test_both_ranks_learn_that_one_could_not_write(root):
    """Neither is left waiting in a collective, training goes on, and the next checkpoint is written."""
    for rank in (0, 1):
        assert torch.load(root / f"found-{rank}", weights_only=True)["full"] == ["2: 0", "4: 1", "6: 0"]
    warnings = {r["message"] for r in read(root / "run") if r["event"] == "warning"}
    assert len(warnings) == 1 and "no checkpoint of step 4: " in warnings.pop()
    folder = RunDirectory(root / "run").checkpoints("pretrain")
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000006"]
    newest = checkpoints.latest(folder, pytest.fail)
    assert newest.world == 2 and {"random-00000.safetensors", "random-00001.safetensors"} <= newest.files.keys()


def test_a_run_of_two_ranks_goes_on_as_one_and_says_so(root):
    one = SmallRank(root / "run", noise=False, steps=8).live()
    assert one.start == 6 and sorted(one.seen) == [6, 7]
    (note,) = [r["message"] for r in read(root / "run") if r["event"] == "note"]
    assert note == (
        "pretrain: goes on from step 6 of 8, not bit for bit the unbroken run: learner.zero_stage was 1, is 0; "
        "resources.learner_workers was 2, is 1; sums are rounded in another order"
    )
