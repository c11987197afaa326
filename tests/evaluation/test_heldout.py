import json
import math

import numpy as np
import pytest

from rlproxi.algorithms.guards.over_optimisation import Evaluated
from rlproxi.config.loading import build_config
from rlproxi.evaluation.heldout import evaluated, headline, mean_and_error, summarise

NAN = float("nan")
CONFIG = build_config(
    {
        "sampler": {"num_inference_steps": 4},
        "rewards": {
            "train": [{"name": "attributes", "weight": 2.0}, {"name": "jpeg", "weight": 0.5}],
            "heldout": [{"name": "judge"}],
        },
    }
)


def test_the_error_is_that_of_the_prompts_means():
    scores = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])  # three prompts of two samples
    result = mean_and_error(scores, 2)
    assert result == {"mean": pytest.approx(0.5), "sem": pytest.approx(np.std([0.5, 1, 0], ddof=1) / 3**0.5)}


def test_missing_scores_are_left_out_and_counted():
    result = mean_and_error(np.array([0.0, NAN, 1.0, 1.0, NAN, NAN]), 2)
    assert result["mean"] == pytest.approx(0.5) and result["missing"] == 3
    assert mean_and_error(np.full(4, NAN), 2) == {"mean": None, "sem": None, "missing": 4}


def entry(attributes=0.5, judge=0.6):
    scores = {"attributes": np.full(4, attributes), "jpeg": np.full(4, -2.0), "judge": np.full(4, judge)}
    return summarise(scores, {}, ["judge"], 2)


def test_what_was_seen_is_in_the_entry_and_what_is_not_known_is_not():
    seen = {"diversity": 0.1, "distance": {"total": 0.03, "layout": 0.02, "texture": 0.01}}
    found = summarise({"judge": np.ones(4)}, {}, ["judge"], 2, seen)
    assert {**entry(), **seen}.keys() == found.keys() and {k: found[k] for k in seen} == seen
    assert not {"diversity", "distance"} & entry().keys()


def test_the_headline_is_the_first_judge_and_the_weighted_training_rewards():
    seen = headline({"iteration": 30, "by_steps": {"2": entry(0.1, 0.1), "4": entry()}}, CONFIG)
    assert seen == Evaluated(30, pytest.approx(2 * 0.5 - 0.5 * 2), pytest.approx(0.6), 0.0)
    assert headline({"iteration": 30, "by_steps": {"2": entry()}}, CONFIG) is None
    unread = headline({"iteration": 30, "by_steps": {"4": entry(judge=NAN)}}, CONFIG)
    assert math.isnan(unread.heldout) and math.isnan(unread.sem) and unread.train == seen.train
    assert headline({"by_steps": {"4": entry()}}, CONFIG) is None, "written before evaluations knew their iteration"


def test_a_runs_evaluations_come_back_in_order(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for tag, iteration, judge in (("step-000100", 100, 0.8), ("before", 0, 0.6), ("step-000050", 50, 0.7)):
        (tmp_path / "evaluation" / f"{tag}.json").write_text(
            json.dumps({"iteration": iteration, "by_steps": {"4": entry(judge=judge)}})
        )
    assert [(e.iteration, round(e.heldout, 3)) for e in evaluated(tmp_path, CONFIG, 50)] == [(0, 0.6), (50, 0.7)]
    assert len(evaluated(tmp_path, CONFIG, 100)) == 3 and evaluated(tmp_path / "none", CONFIG, 5) == []
