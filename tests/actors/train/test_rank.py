"""The training loop in this process, on real DeepSpeed and real checkpoints: what follows refused updates."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from actors.train import rollback
from actors.train.engine import Engine
from actors.train.rank import Rank
from actors.train.saving import RankPlace
from fixtures.local_actors import local_log
from rlproxi.algorithms.base import Update
from rlproxi.config.loading import build_config
from rlproxi.run_directory import RunDirectory
from rlproxi.telemetry.runlog import read

STEPS = 8


class Fit:
    """Least squares in ``STEPS`` steps; ``nan``: (step, how many rollbacks there were) -> whether its loss is NaN."""

    steps = STEPS

    def __init__(self, rank, nan):
        self.rank, self.nan = rank, nan

    def updates(self, step):
        for name in self.rank.engines:
            yield Update(name, 0.1, self._losses(name, step))

    def _losses(self, name, step):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = self.rank.engines[name].module(x).square().mean()
        bad = self.nan(step, self.rank.guard.rollbacks) and name == "policy"
        yield loss * (float("nan") if bad else 1.0), {"loss": loss.item()}


class OneRank(Rank):
    """A rank without Ray around it, its second network going along."""

    def __init__(self, folder, nan, earliest=0, **guards):
        settings = {"model": {"precision": "float32"}, "telemetry": {"timeline": False}, "resources": {"threads": 1}}
        config, place = build_config({"guards": guards, **settings}), RankPlace(0, 1, torch.device("cpu"))
        super().__init__(config, folder, "rl", local_log(folder), place, checkpoint_every=2)
        self.root, self.earliest = self.checkpointer.root, earliest
        self.nan, self.begun, self.seen, self.ended = nan, [], [], False
        self.build()

    def build(self):
        torch.manual_seed(0)
        self.engines = {
            name: Engine(nn.Linear(3, 2), self.device, 1, 1, (0.9, 0.99), 0.0, 1.0) for name in ("policy", "fake")
        }
        self.algorithm = Fit(self, self.nan)

    def begin(self, start):
        self.begun.append(start)

    def next_batch(self, step):
        return step

    def done(self, step, batch, metrics):
        self.seen.append(
            SimpleNamespace(step=step, lr=metrics.get("lr"), skipped=metrics["skipped_updates"], weights=self.weights())
        )

    def stop(self, error):
        self.run_log.stop.remote(f"{self.stage}: {error}")

    def finish(self):
        self.ended = True

    def weights(self):
        return {
            name: torch.cat([p.detach().reshape(-1).clone() for p in engine.module.module.parameters()])
            for name, engine in self.engines.items()
        }


@pytest.fixture
def make(process_group, tmp_path):
    made = []

    def rank(nan, folder="run", **guards):
        made.append(OneRank(tmp_path / folder, nan, **guards))
        made[-1].run()
        return made[-1]

    yield rank
    for one in made:
        one.close()


def warnings(rank):
    return [r["message"] for r in read(rank.run_dir) if r["event"] == "warning"]


def reason(rank):
    return rank.run_log.thing.stop_state().reason


def steps(rank):
    return [seen.step for seen in rank.seen]


def test_one_bad_update_is_skipped_counted_and_told(make):
    rank = make(lambda step, rollbacks: step == 3)
    assert steps(rank) == list(range(STEPS)) and rank.begun == [0] and rank.ended
    assert [seen.skipped for seen in rank.seen] == [0, 0, 0, 1, 0, 0, 0, 0]
    before, at = rank.seen[2].weights, rank.seen[3].weights
    assert torch.equal(before["policy"], at["policy"]) and not torch.equal(before["fake"], at["fake"])
    assert warnings(rank) == [
        "rl: step 4: an update of 'policy' is skipped, 1 in a row (guards.skips_in_a_row = 3): 1 of its losses "
        "are NaN or Inf"
    ]
    # Step 4's checkpoint, due amid skipped updates, waits for a good one.
    assert not (rank.root / "step-000004").exists()


def test_the_third_in_a_row_takes_all_networks_back_with_a_lower_rate_that_a_resume_keeps(make):
    fails = lambda step, rollbacks: 3 <= step <= 5 and not rollbacks  # noqa: E731
    rank = make(fails)
    assert rank.begun == [0, 2] and steps(rank) == [0, 1, 2, 3, 4, *range(2, STEPS)] and rank.ended
    assert [seen.lr for seen in rank.seen] == [0.1] * 5 + [0.05] * 6
    assert rank.seen[5].skipped == 1, "the third, which no record has told of"
    good = make(lambda step, rollbacks: False, "good")
    for name in ("policy", "fake"):
        assert torch.equal(rank.seen[1].weights[name], good.seen[1].weights[name])
        assert not torch.equal(rank.seen[5].weights[name], rank.seen[2].weights[name]), "another rate"
    assert "3 in a row" in warnings(rank)[-1] and warnings(rank)[-1].endswith(
        "Going back to step 2, with 0.5 of rl.lr from now on (guards.lr_factor)"
    )
    # What a resume from the same checkpoint, in another process, would do: the same.
    resumed = make(fails)
    assert resumed.guard.lr_scale == 0.5 and resumed.seen == [] and resumed.ended
    for folder in resumed.root.glob("step-*"):
        folder.rename(folder.with_name("gone-" + folder.name))
    again = make(lambda step, rollbacks: False)
    assert [seen.lr for seen in again.seen] == [0.05] * STEPS


def test_without_a_checkpoint_training_begins_anew(make):
    rank = make(lambda step, rollbacks: step >= 1 and not rollbacks)
    assert rank.begun == [0, 0] and steps(rank) == [0, 1, 2, *range(STEPS)]
    lower = rank.seen[3:]
    assert [seen.lr for seen in lower] == [0.05] * STEPS
    # As a new run that was told of the one rollback by its file.
    rollback.remember(RunDirectory(rank.run_dir.parent / "fresh").checkpoints("rl"), 1)
    fresh = make(lambda step, rollbacks: False, "fresh")
    assert all(
        torch.equal(one.weights["policy"], two.weights["policy"]) for one, two in zip(lower, fresh.seen, strict=True)
    )


def test_a_checkpoint_that_leads_nowhere_is_set_aside(make):
    rank = make(lambda step, rollbacks: step >= 4 and not rollbacks)
    assert rank.begun == [0, 2] and rank.ended
    assert (rank.root / "spoilt-step-000004").is_dir() and (rank.root / "step-000008").is_dir()
    assert any("step-000004 is set aside as spoilt-step-000004: training from there fails" in w for w in warnings(rank))


def test_what_goes_on_ends_the_run_in_words(make):
    rank = make(lambda step, rollbacks: step >= 3, max_rollbacks=1)
    assert rank.begun == [0, 2] and rank.stopped and not rank.ended
    assert reason(rank).startswith("rl: step 6: an update of 'policy' is skipped, 3 in a row")
    assert "Training went back 1 times (guards.max_rollbacks), with rl.lr down to 0.5 of the config's" in reason(rank)
    first = make(lambda step, rollbacks: True, "first")
    assert "so rl.lr is not the cause" in reason(first) and first.begun == [0]
    stops = make(lambda step, rollbacks: step >= 3, "stops", on_nonfinite="stop", skips_in_a_row=1)
    assert "(guards.on_nonfinite = stop)" in reason(stops) and steps(stops) == [0, 1, 2]


def test_a_batch_that_is_refused_counts_as_a_skipped_update(make, monkeypatch):
    monkeypatch.setattr(OneRank, "refused", lambda self, batch: "all NaN" if batch == 3 else None)
    rank = make(lambda step, rollbacks: False)
    same = lambda name: torch.equal(rank.seen[2].weights[name], rank.seen[3].weights[name])  # noqa: E731
    assert (
        rank.ended
        and same("policy")
        and same("fake")
        and warnings(rank)[0].endswith("(guards.skips_in_a_row = 3): all NaN")
    )


def test_data_that_begin_later_need_a_resume(make):
    rank = make(lambda step, rollbacks: step >= 3, earliest=3)
    assert reason(rank).endswith("this process has no data from there on: resume the run (--resume)")
    assert json.loads((rank.root / "rollbacks.json").read_text()) == {"rollbacks": 1}


@pytest.mark.parametrize("text", ["", "[]", '{"rollbacks": -1}', '{"rollbacks": true}', '{"rollbacks": "x"}', "\udcff"])
def test_a_damaged_count_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "rollbacks.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="rollbacks.json is not readable .* delete it"):
        rollback.count(tmp_path)
    rollback.remember(tmp_path, 2)
    assert rollback.count(tmp_path) == 2 and rollback.count(tmp_path / "none") == 0
