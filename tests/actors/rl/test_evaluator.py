import asyncio
import json

import numpy as np
import pytest

from actors.rl.evaluator import Evaluator
from actors.rl.messages import Sampled
from fixtures.local_actors import local_log
from rlproxi.config.loading import build_config
from rlproxi.rewards import RewardError
from rlproxi.telemetry.runlog import read
from rlproxi.telemetry.timeline import Diary

CONFIG = build_config(
    {
        "sampler": {"num_inference_steps": 4},
        "rl": {"groups_per_micro_batch": 2, "group_size": 4},
        "rewards": {"train": [{"name": "attributes"}], "heldout": [{"name": "judge"}]},
        "evaluate": {"prompts": 6, "samples": 2, "patience": 2},
    }
)
JUDGED = {0: 10, 10: 30, 20: 20, 30: 20}  # iteration -> held-out score; the training reward is the iteration


class Client:
    """Images carry their version and, for each prompt, its place in the list: a score anyone can compute."""

    lost = ""

    async def score(self, name, images, prompt):
        if prompt == self.lost:
            raise RewardError("no score today")
        version, place = images[:, 0, 0, 0].astype(np.float32), images[:, 0, 0, 1].astype(np.float32)
        if name == "attributes":
            return version
        return np.float32([JUDGED[int(v)] for v in version]) + 0.01 * (place % 2)

    async def details(self, name, images, prompt):
        if prompt == self.lost:
            raise RewardError("no score today")
        return {"hat": np.ones(len(images))}


class Run:
    """An evaluator on a run directory, and what it asked for."""

    def __init__(self, folder, config=CONFIG, client=None):
        self.folder, self.requests, self.saved, self.diary = folder, [], [], Diary()
        self.client = client or Client()
        self.evaluator = Evaluator(config, folder, local_log(folder), self.client, self)

    async def sample(self, request, version):
        self.requests.append((request, version))
        images = np.zeros((request.images, 2, 2, 3), np.uint8)
        images[..., 0], images[..., 1] = version, np.repeat(request.indices, request.group_size)[:, None, None]
        return Sampled(images, np.ones(len(images), bool), "chain", 0.1)

    async def save(self, version, folder):
        self.saved.append((version, folder))

    def evaluate(self, version, counts=(4,)):
        return asyncio.run(self.evaluator.evaluate(f"step-{version:06d}", list(counts), version))

    def events(self, event):
        return [r for r in read(self.folder) if r["event"] == event]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_scores_are_those_of_the_prompts_and_are_written(run):
    result = run.evaluate(10, (2, 4))
    assert json.loads((run.folder / "evaluation" / "step-000010.json").read_text()) == result
    assert list(result["by_steps"]) == ["2", "4"] and result["iteration"] == 10 and len(result["prompts"]) == 6
    entry, odd = result["by_steps"]["4"], np.array(run.requests[0][0].indices + run.requests[1][0].indices) % 2
    assert entry["train"]["attributes"] == {"mean": 10, "sem": 0} and entry["details"] == {"judge": {"hat": 1}}
    assert entry["heldout"]["judge"]["mean"] == pytest.approx(30 + 0.01 * odd.mean(), abs=1e-5)
    assert entry["heldout"]["judge"]["sem"] == pytest.approx(0.01 * odd.std(ddof=1) / 6**0.5, abs=1e-5)
    kept = np.load(run.folder / "samples" / "step-000010-N2.npz")
    assert kept["images"].shape == (12, 2, 2, 3) and kept["heldout"].shape == (12,) and kept["attributes"] == ["hat"]
    assert [(r["steps"], r["step"]) for r in run.events("evaluation")] == [(2, 10), (4, 10)]


def test_requests_are_no_larger_than_trainings_micro_batches(run):
    run.evaluate(10)
    assert [(r.images, r.num_steps, version) for r, version in run.requests] == [(8, 4, 10), (4, 4, 10)]


def test_a_missing_score_is_one_warning_and_counted(run):
    run.evaluate(0)
    run.client.lost = run.requests[0][0].prompts[1]
    entry = run.evaluate(10)["by_steps"]["4"]
    assert entry["train"]["attributes"] == {"mean": 10, "sem": 0, "missing": 2}
    assert entry["heldout"]["judge"]["missing"] == 2 and entry["details"]["judge"]["hat"] == 1
    assert [r["message"] for r in run.events("warning")] == [
        f"evaluation: {run.client.lost!r} has no score: no score today"
    ] * 2, "of each scorer"


@pytest.mark.parametrize("every", [False, True])
def test_a_broken_sample_is_a_missing_score(run, every):
    run.evaluate(0)
    whole = run.sample

    async def broken(request, version):
        sampled = await whole(request, version)
        sampled.finite[: None if every else 1] = request.images != 8  # broken in the first of two pieces
        return sampled

    run.sample = broken
    entry = run.evaluate(10)["by_steps"]["4"]
    missing = 8 if every else 1
    assert entry["train"]["attributes"] == {"mean": 10, "sem": 0, "missing": missing}
    assert entry["heldout"]["judge"]["missing"] == missing and "distance" not in entry and "diversity" not in entry
    assert [r["message"] for r in run.events("warning")] == [
        f"evaluation: {missing} of 12 samples of 4 steps count as missing, because they are NaN or Inf"
    ]
    kept = np.load(run.folder / "samples" / "step-000010-N4.npz")
    assert np.isnan(kept["heldout"]).sum() == np.isnan(kept["correct"]).sum() == missing


def test_an_evaluation_without_a_headline_does_not_end_rl(run):
    for version in (10, 20, 30):
        run.evaluate(version)
    assert run.evaluator.early_end
    run.evaluate(30, counts=(2,))
    assert run.evaluator.early_end is None


def test_the_best_is_kept_and_a_fall_raises_the_alarm(run):
    for version, best, below in ((0, 0, 0), (10, 10, 0), (20, 10, 1), (30, 10, 2)):
        run.evaluate(version)
        assert (run.evaluator.guard.best.iteration, run.evaluator.guard.below) == (best, below)
    assert run.evaluator.early_end == (
        "RL ends early: 2 evaluations in a row far below iteration 10 (evaluate.patience)"
    )
    assert run.saved == [(10, str(run.folder / "models" / "best"))], "iteration 0 is models/pretrained"
    assert [(r["step"], round(r["heldout"])) for r in run.events("best")] == [(10, 30)]
    assert [(r["step"], r["best"]) for r in run.events("alarm")] == [(20, 10), (30, 10)]


class Unread(Client):
    """A judge that cannot read the prompts."""

    async def score(self, name, images, prompt):
        if name == "judge":
            raise RewardError("it knows no such prompt")
        return await super().score(name, images, prompt)


class Seen:
    """Distance and diversity of evaluations, one after another."""

    note, data = None, None

    def __init__(self, *rows):
        self.rows = iter(rows)

    def __call__(self, images):
        distance, diversity = next(self.rows)
        return {"distance": {"total": distance}, "diversity": diversity}


@pytest.mark.parametrize("heldout", [[], [{"name": "judge"}]])
def test_without_a_held_out_score_distance_and_diversity_raise_the_alarm(heldout, tmp_path):
    """A user's own prompts and reward: nothing is held out, or the judge cannot read the prompts."""
    values = CONFIG.model_dump(exclude_unset=True)
    config = build_config({**values, "rewards": {**values["rewards"], "heldout": heldout}})
    run = Run(tmp_path, config, Unread())
    run.evaluator.comparison = Seen((1.0, 0.1), (1.9, 0.1), (1.0, 0.02))
    for version in (0, 10, 20):
        run.evaluate(version)
    alarms = run.events("alarm")
    assert [(r["step"], r["best"], r["message"].split(":")[0]) for r in alarms] == [
        (10, None, "drift"),
        (20, None, "sameness"),
    ]
    assert "and there is no held-out score: look at the images" in alarms[0]["message"]
    assert run.saved == [] and run.events("best") == [] and run.evaluator.early_end is None


@pytest.mark.parametrize("again", [10, 20])
def test_a_resumed_runs_guard_knows_what_came_before_and_counts_nothing_twice(run, again):
    for version in (0, 10, 20):
        run.evaluate(version)
    resumed = Run(run.folder)
    resumed.evaluate(again)
    guard = resumed.evaluator.guard
    assert (guard.best.iteration, guard.below) == (10, {10: 0, 20: 1}[again]) and resumed.evaluator.early_end is None
    assert [version for version, _ in resumed.saved] == ([10] if again == 10 else []), "in case saving was cut short"
