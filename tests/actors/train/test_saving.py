"""The loop of a rank, killed at every point and resumed; a disk that is full; what is said."""

import os
import resource
import subprocess

import pytest

from fixtures.small_rank import SmallRank, same
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry.runlog import read


@pytest.fixture(scope="module")
def unbroken(process_group, tmp_path_factory):
    return SmallRank(tmp_path_factory.mktemp("unbroken")).live()


def said(run_dir, event="warning"):
    return [record["message"] for record in read(run_dir) if record["event"] == event]


QUICK = ["train 1", "train 3", "write 3", "done 3", "write 5"]
POINTS = [
    f"{where} {step}" for step in range(1, 6) for where in ("train", "write", "done") if where != "write" or step % 2
]


@pytest.mark.parametrize(
    "kill", [*QUICK, *(pytest.param(point, marks=pytest.mark.exhaustive) for point in POINTS if point not in QUICK)]
)
def test_killed_at_any_point_it_goes_on_as_the_unbroken_run(kill, unbroken, tmp_path):
    """Two networks, an average, accumulation, a schedule, and noise of torch's own generator."""
    first = SmallRank(tmp_path, kill=kill).live()
    step = int(kill[-1])
    expected = step // 2 * 2
    # A checkpoint that is being written has only steps behind it that were told.
    assert not kill.startswith("write") or step in first.seen
    second = SmallRank(tmp_path, seed=50 if expected else 0).live()  # nothing of its own start may remain
    assert second.start == expected
    assert {**first.seen, **second.seen} == unbroken.seen and len(unbroken.seen) == 6
    if second.start:
        assert same(second.last, unbroken.last)
        assert same(second.ema.state_dict(), unbroken.ema.state_dict())
        assert said(tmp_path, "note") == [
            f"pretrain: goes on from step {second.start} of 6, bit for bit the unbroken run"
        ]
        assert (
            second.run_log.thing.take_announcements() == [("note", said(tmp_path, "note")[0])]
            and second.run_log.thing.take_announcements() == []
        )
    assert not [p for p in RunDirectory(tmp_path).checkpoints("pretrain").iterdir() if p.name.startswith(".")]


def test_a_flipped_bit_is_found_and_the_checkpoint_before_taken(unbroken, tmp_path):
    SmallRank(tmp_path, kill="done 4").live()
    file = RunDirectory(tmp_path).checkpoints("pretrain") / "step-000004" / "fake" / "state-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    second = SmallRank(tmp_path).live()
    assert second.start == 2 and same(second.last, unbroken.last)
    (warning,) = said(tmp_path)
    assert "step-000004 is damaged: fake/state-00000.safetensors (changed since it was written)" in warning
    assert second.run_log.thing.take_announcements()[0] == ("warning", warning)


def test_what_is_not_exact_is_said_and_why(process_group, tmp_path):
    SmallRank(tmp_path, kill="done 2", steps=4).live()
    second = SmallRank(tmp_path, stage=1, steps=4).live()
    assert second.start == 2 and sorted(second.seen) == [2, 3]
    assert said(tmp_path, "note") == [
        "pretrain: goes on from step 2 of 4, not bit for bit the unbroken run: learner.zero_stage "
        "was 0, is 1; sums are rounded in another order"
    ]


class Full:
    """A disk of 100 kB that is full or has room; a real one where this process may mount it, else a bound on files."""

    def __init__(self, folder):
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        self.mounted = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True
            ).returncode
        )
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        if not self.mounted:
            return resource.setrlimit(resource.RLIMIT_FSIZE, (2000, self.before[1]))
        with pytest.raises(OSError), open(self.filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 1024)

    def make_room(self):
        self.filler.unlink() if self.mounted else resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def close(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        if self.mounted:
            subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    made = Full(tmp_path / "disk")
    yield made
    made.close()


class OnDisk(SmallRank):
    """Its checkpoints lie on the disk that fills up, the run log elsewhere."""

    def __init__(self, run_dir, disk, full=(), **options):
        super().__init__(run_dir, **options)
        self.checkpointer.root, self.disk, self.full = RunDirectory(disk.folder).checkpoints(self.stage), disk, full

    def checkpoint(self, step):
        if step in self.full:
            self.disk.fill()
        super().checkpoint(step)
        if step in self.full:
            self.disk.make_room()


def test_training_outlives_a_full_disk_and_writes_again_when_there_is_room(unbroken, disk, tmp_path):
    rank = OnDisk(tmp_path, disk, full=(4,)).live()
    assert rank.seen == unbroken.seen and not rank.stopped
    (warning,) = said(tmp_path)
    assert warning.startswith("pretrain: no checkpoint of step 4: ") and "keep_checkpoints=1" in warning
    if disk.mounted:
        assert (
            "No space left on device" in warning and f"the disk at {disk.folder} has 0 of 409,600 bytes free" in warning
        )
    names = sorted(p.name for p in RunDirectory(disk.folder).checkpoints("pretrain").iterdir())
    assert names == ["step-000002", "step-000006"]


def test_after_so_many_failures_in_a_row_it_stops_with_words(unbroken, disk, tmp_path):
    rank = OnDisk(tmp_path, disk, full=(2, 4), max_checkpoint_failures=2).live()
    assert rank.stopped and sorted(rank.seen) == [0, 1, 2, 3] and not hasattr(rank, "last")
    assert "2 checkpoints in a row could not be written: free space there" in rank.reason
    assert len(said(tmp_path)) == 1
    back = OnDisk(tmp_path, disk).live()
    assert back.start == 0 and back.seen == unbroken.seen
